"""Hold a backend's results to the float64 reference.

A result must lie within the error budget of `drift_gate.budget`. Some problems are so drawn that a
rounding of their inputs moves the truth further than that: drifts of 1e30 that cancel, a tau of
1e6, a ratio at the border of its clip. Where a result is over the budget, the reference is run
again in float64 with inputs a few roundings away, and what those moves do is allowed as well.
The logits move relative to the maximum of their row, since a large offset is no excuse.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..budget import allowed, allowed_of
from .evaluate import LOSS_SCALE, Problem, Results, bits, run_backend, run_reference

MOVES = 8  # problems nearby
MOVE = 2.0  # roundings in the accumulation dtype by which the inputs move, at most
NEARBY_FACTOR = 8.0  # how many times the largest effect of a move is allowed
MOST_UPSTREAM = 4.0  # a random weight of a loss
OF_HEADS = ("grad weight", "grad bias")  # sums over the rows
LARGEST = 1e36  # where float32 may overflow on the way: such a row's gradient is not compared


def faults(problem: Problem, backend: str) -> tuple[list[str], Results, Results, Results]:
    """What is wrong, in a line each; and the results of the backend, eager PyTorch and truth."""
    before = {name: bits(x).clone() for name, x in _inputs(problem)}
    got, in_place = run_backend(problem, backend)
    again = got
    if not problem.choices.interpreted:  # which knows one order alone
        again, _ = run_backend(problem, backend)
    found = [] if in_place else ["the gradient in place is elsewhere, or memory around it changed"]
    for name, x in _inputs(problem):
        if not torch.equal(bits(x), before[name]):
            found.append(f"input {name} was modified")
    for name, x in got.items():
        if not torch.equal(bits(x), bits(again[name])):
            found.append(f"{name}: other bits in a second run")
    eager = run_reference(problem, None, lambda name, x: x)
    truth = run_reference(problem, torch.float64, lambda name, x: x)
    if got.keys() != truth.keys():
        found.append(f"results {sorted(got)}, the reference has {sorted(truth)}")
        return found, got, eager, truth
    found += _rows_not_asked_for(problem, got)
    over = _over_budget(problem, got, eager, truth)
    if over:
        nearby = list(_nearby(problem, truth))
        found += _over_budget(problem, got, eager, truth, nearby)
    return found, got, eager, truth


def _inputs(problem: Problem) -> Iterator[tuple[str, Tensor]]:
    for name, value in problem.arguments.items():
        if isinstance(value, Tensor):
            yield name, problem.storages.get(name, value)


def _rows_not_asked_for(problem: Problem, got: Results) -> list[str]:
    """Results of invalid rows are exactly 0."""
    if problem.valid is None or problem.valid.all():
        return []
    found = []
    for name, x in got.items():
        if name.startswith("metric") or name in OF_HEADS:
            continue
        if x.shape[: problem.valid.dim()] != problem.valid.shape:
            continue
        wanted = -1 if name == "block_ids" else 0
        if (x.cpu()[~problem.valid] != wanted).any():
            found.append(f"{name}: not {wanted} in a row that is not valid")
    return found


class _Scale(NamedTuple):
    """What a problem's results are measured by."""

    eps: float
    """Of the accumulation dtype."""
    gradient: float
    """Most that a position's loss can move by with a mass of 1, after the upstream gradient."""
    losses: Tensor | None
    """True losses of the positions."""
    overflowed: bool
    """Whether one is beyond what float32 holds on the way: sums and slopes may overflow."""


def _scale(problem: Problem, truth: Results) -> _Scale:
    dtypes = [problem.arguments[name].dtype for name in problem.leaves] or [torch.float32]
    eps = torch.finfo(torch.promote_types(dtypes[0], torch.float32)).eps
    gate = truth.get("gate", torch.ones(1))
    largest = float(gate.nan_to_num(1.0).max()) if gate.numel() else 1.0
    coefficient = LOSS_SCALE * MOST_UPSTREAM * largest / problem.arguments.get("temperature", 1.0)
    if problem.arguments.get("support") == "tail" and "logits" in problem.arguments:
        rest, _ = _rest(problem, problem.arguments["logits"].double())
        coefficient /= max(float(rest.min()), eps) if rest.numel() else 1.0
    losses = truth.get("token_loss")
    overflowed = False
    if losses is not None:
        finite = losses[losses.isfinite()].abs()
        overflowed = bool(finite.numel()) and float(finite.max()) * LOSS_SCALE > LARGEST
    return _Scale(eps, coefficient, losses, overflowed)


def _over_budget(
    problem: Problem,
    got: Results,
    eager: Results,
    truth: Results,
    nearby: list[Results] | None = None,
) -> list[str]:
    scale = _scale(problem, truth)
    found = []
    for name, t in truth.items():
        g, e = got[name], eager[name]
        if (g.dtype, g.shape, t.shape) != (e.dtype, e.shape, e.shape):
            found.append(f"{name}: {g.dtype} {list(g.shape)}, eager {e.dtype} {list(e.shape)}")
        elif not g.is_floating_point():
            if not torch.equal(g, t):
                found.append(f"{name}: differs from the reference")
        elif g.numel() == 1 and _same_number(float(g), float(e), float(t), g.dtype):
            continue
        elif g.numel():
            moved = None
            if nearby is not None:
                moved = torch.stack([near[name].double().flatten() for near in nearby])
            fault = _compare(name, (g, e, t), moved, scale)
            found += [fault] if fault else []
    return found


def _same_number(got: float, eager: float, truth: float, dtype: torch.dtype) -> bool:
    """Whether one number is within the budget: `_compare` without tensors, which are slow."""
    if not (math.isfinite(got) and math.isfinite(eager) and abs(truth) < torch.finfo(dtype).max):
        return False  # for `_compare` to tell
    return abs(got - truth) <= allowed_of(abs(truth), abs(truth), abs(eager - truth), dtype)


def _compare(
    name: str, results: tuple[Tensor, Tensor, Tensor], moved: Tensor | None, scale: _Scale
) -> str | None:
    """The fault of one result of the backend, beside eager PyTorch's and the truth; or None."""
    dtype = results[0].dtype
    gradient = name.startswith("grad")
    compared = _comparable(name, results[2], scale)
    if scale.overflowed and not gradient and name != "log_probs":
        return None
    g, e, t = (x.double().flatten() for x in results)
    rounded = t.to(dtype).double()
    special = (g.isfinite() & rounded.isfinite()).logical_not_() & (g != rounded)
    special = special & compared & ~(g.isnan() & rounded.isnan())
    if moved is not None:  # unless a border of finite and infinite is near
        special = special & (moved.isfinite() == t.isfinite()).all(0)
    if special.any():
        at = int(special.nonzero()[0])
        return f"{name}: {g[at]:g} where the reference has {t[at]:g} (element {at} of {len(t)})"
    compared = compared & g.isfinite() & rounded.isfinite()
    if not compared.any():
        return None
    g, e, t = g[compared], e[compared], t[compared]
    limit = allowed(t, (e - t).abs().nan_to_num(0.0, 0.0, 0.0), dtype)
    if moved is not None:
        effect = (moved[:, compared] - t).abs().nan_to_num(torch.inf).max()
        unit = scale.gradient if gradient else 1.0
        limit += NEARBY_FACTOR * (effect + scale.eps * (t.abs().max() + unit))
    over = (g - t).abs() / limit
    at = int(over.argmax())
    if over[at] <= 1:
        return None
    return (
        f"{name}: {g[at]:.9g} where the reference has {t[at]:.9g} and eager PyTorch {e[at]:.9g} "
        f"({float(over[at]):.3g} times what is allowed; element {at} of {len(t)} finite ones)"
    )


def _comparable(name: str, truth: Tensor, scale: _Scale) -> Tensor:
    """[elements] bool. A row whose loss or slope is not finite has no gradient to speak of."""
    if not name.startswith("grad"):
        return torch.ones(truth.numel(), dtype=torch.bool, device=truth.device)
    rows = truth.reshape(-1, truth.shape[-1])
    sound = rows.isfinite().all(-1, keepdim=True) & (not scale.overflowed)
    if scale.losses is not None and name in OF_HEADS:
        sound = sound & scale.losses.isfinite().all()
    elif scale.losses is not None and scale.losses.shape == truth.shape[:-1]:
        sound = sound & scale.losses.isfinite().reshape(-1, 1)
    return sound.expand(rows.shape).flatten()


def _rest(problem: Problem, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mass of the words that no list has [..., 1], and which words those are [..., V]."""
    ids = problem.arguments["teacher_topk_ids"].clamp(0, logits.shape[-1] - 1).long()
    unlisted = torch.ones_like(logits).scatter_(-1, ids, 0.0)
    masses = (logits / problem.arguments["temperature"]).softmax(-1) * unlisted
    return masses.sum(-1, keepdim=True).nan_to_num(1.0), unlisted


def _move_of_the_rest(problem: Problem, logits: Tensor, eps: float) -> Tensor:
    """What moves the words not listed as roundings of the listed masses move 1 - their sum."""
    rest, unlisted = _rest(problem, logits)
    return unlisted * problem.arguments["temperature"] * (MOVE * eps / rest).clamp(max=1.0)


def _nearby(problem: Problem, truth: Results) -> Iterator[Results]:
    """Truths of problems whose inputs lie a few roundings away."""
    wide = any(problem.arguments[name].dtype == torch.float64 for name in problem.leaves)
    eps = torch.finfo(torch.float64 if wide else torch.float32).eps
    # A temperature rounds the logits themselves; and for float64 no eager result says what rounds.
    temperatures = (
        problem.arguments.get("temperature"),
        problem.arguments.get("teacher_temperature"),
    )
    scaled = any(t not in (None, 1.0) for t in temperatures)
    generator = torch.Generator().manual_seed(len(problem.arguments))

    def coarsen(name: str, x: Tensor) -> Tensor:
        """Row data without what is lost beside its largest value."""
        if not x.dim() or name in problem.storages or not x.isfinite().any():
            return x
        unit = eps * x[x.isfinite()].abs().max()
        coarse = (x / unit).round() * unit if unit > 0 else x
        if name == "old_log_probs" and "log_probs" in truth:  # a drift of 0, not a log-prob of 0
            coarse = torch.where(coarse == 0, truth["log_probs"], coarse)
        return coarse

    def move(name: str, x: Tensor) -> Tensor:
        if not x.dim() or name == "response_mask":
            return x
        sizes = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        factor = 1 + MOVE * eps * sizes.to(x.device)
        shift = MOVE * eps * sizes.roll(1).to(x.device)  # as log-probs near 0 are rounded
        if name not in problem.storages or not x.numel():
            return x * factor + shift
        if problem.arguments.get("support") == "tail" and name == "logits":
            x = x + _move_of_the_rest(problem, x, eps) * (1 - 2 * (next(turn) % 2))
        if wide or scaled:
            return x * factor
        top = x.amax(-1, keepdim=True)
        shifted = top + (x - top) * factor + shift
        return torch.where(top.isfinite() & x.isfinite(), shifted, x)

    turn = itertools.count()
    yield run_reference(problem, torch.float64, coarsen)
    for _ in range(MOVES):
        yield run_reference(problem, torch.float64, move)
