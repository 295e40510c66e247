"""Hold a backend's results to the float64 reference.

A result must lie within the error budget of `drift_gate.budget`. Some problems are so drawn that a
rounding moves the truth further than that: drifts of 1e30 that cancel, a tau of 1e6, a ratio at the
border of its clip, a bucket whose mass is lost beside 1. Where a result is over the budget, the
float64 reference is run again with roundings of the accumulation dtype after every operation (see
`roundings`), and what those do to each element is allowed as well.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..budget import allowed, allowed_of
from ..options import Clip
from .evaluate import LOSS_SCALE, Problem, Results, bits, run_backend, run_reference
from .options import divides_by_0
from .roundings import Roundings
from .tensors import tensors

MOST_ROUNDED = 64  # runs with random roundings; one that explains the results ends them
SHARES = 1.0, 0.5  # of the operations that round, in turns
BORDER = 64  # roundings by which a ratio may lie beside a bound of its clip
ROUNDED_FACTOR = 4.0  # how many times the largest effect of the roundings is allowed
OF_HEADS = ("grad head", "grad head.weight", "grad head.bias")  # sums over the rows
SHORT_FACTOR = 4.0  # beside that, of gradients of heads in short dtypes: see `_twice_rounded`
LARGEST = 1e36  # where float32 may overflow on the way: such a row's gradient is not compared


def faults(problem: Problem) -> tuple[list[str], Results, Results, Results]:
    """What is wrong, in a line each; and the results of the backend, eager PyTorch and truth."""
    before = {name: bits(x).clone() for name, x in _inputs(problem)}
    got, in_place = run_backend(problem)
    again = got
    if not problem.choices.interpreted:  # which knows one order alone
        again, _ = run_backend(problem)
    found = [] if in_place else ["the gradient in place is elsewhere, or memory around it changed"]
    for name, x in _inputs(problem):
        if not torch.equal(bits(x), before[name]):
            found.append(f"input {name} was modified")
    for name, x in got.items():
        if not torch.equal(bits(x), bits(again[name])):
            found.append(f"{name}: other bits in a second run")
    eager = run_reference(problem, None)
    truth = run_reference(problem, torch.float64)
    if got.keys() != truth.keys():
        found.append(f"results {sorted(got)}, the reference has {sorted(truth)}")
        return found, got, eager, truth
    found += _rows_not_asked_for(problem, got)
    over = _over_budget(problem, got, eager, truth, {})
    if over:
        effects: Effects = {}
        for rounded in _rounded(problem):
            _add_effects(effects, rounded, truth)
            over = _over_budget(problem, got, eager, truth, effects)
            if not over:
                break
    return found + over, got, eager, truth


def _inputs(problem: Problem) -> Iterator[tuple[str, Tensor]]:
    for name, x in tensors(problem.arguments).items():
        yield name, problem.storages.get(name, x)


def _rows_not_asked_for(problem: Problem, got: Results) -> list[str]:
    """Results of invalid rows are exactly 0, or what stands for nothing."""
    if problem.valid is None or problem.valid.all():
        return []
    found = []
    for name, x in got.items():
        if name.startswith("metric") or name in OF_HEADS:
            continue
        if x.shape[: problem.valid.dim()] != problem.valid.shape:
            continue
        wanted = problem.function.not_asked.get(name, 0.0)
        if (x.cpu()[~problem.valid] != wanted).any():
            found.append(f"{name}: not {wanted:g} in a row that is not valid")
    return found


def _overflowed(truth: Results) -> bool:
    """Whether a loss is beyond what float32 holds on the way: sums and slopes may overflow."""
    losses = truth.get("token_loss")
    if losses is None:
        return False
    finite = losses[losses.isfinite()].abs()
    return bool(finite.numel()) and float(finite.max()) * LOSS_SCALE > LARGEST


def _is_infinite(problem: Problem, truth: Results) -> bool:
    """Whether a denominator of 0 leaves no finite loss, and so no gradients."""
    loss = truth.get("loss")
    return loss is not None and divides_by_0(problem.arguments) and not loss.isfinite().all()


def _beyond_half(problem: Problem, truth: Results) -> bool:
    """Whether a gradient of a head in float16 is so large that its parts may overflow."""
    found = (x for name, x in truth.items() if _twice_rounded(problem, name) and x.numel())
    return any(float(x.abs().max()) > torch.finfo(torch.float16).max / 64 for x in found)


Effects = dict[str, Tensor]
"""Of roundings on each result [elements]: the most by which they move it; infinite where they
change it between finite, infinite and NaN."""


def _rounded(problem: Problem) -> Iterator[Results]:
    """Truths, but for other bounds of a clip; then for random roundings of what is computed, and of
    inputs to be made shorter."""
    yield from _other_bounds(problem)
    dtype, given = _accumulation_dtype(problem), tensors(problem.arguments)
    for seed in range(MOST_ROUNDED):
        roundings = Roundings(dtype, seed, SHARES[seed % 2])

        def shorten(name: str, x: Tensor, roundings: Roundings = roundings) -> Tensor:
            longer = given[name].dtype.itemsize > dtype.itemsize
            return roundings.rounded(x) if longer and name not in problem.storages else x

        with roundings:
            yield run_reference(problem, torch.float64, shorten)


def _other_bounds(problem: Problem) -> Iterator[Results]:
    """Truths, but for bounds of the clip that lie a few roundings further out or in.

    "cispo" counts a ratio as clipped by bounds of 0 unless it is 1 exactly: so it is in float32 for
    log-probs that are equal there, and never in float64, whatever is rounded on the way.
    """
    clip = problem.arguments.get("clip")
    if not isinstance(clip, Clip):
        return
    step = BORDER * torch.finfo(_accumulation_dtype(problem)).eps
    for moved in (step, -step):
        bounds = {name: max(getattr(clip, name) + moved, 0.0) for name in ("low", "high")}
        changed = {**problem.arguments, "clip": dataclasses.replace(clip, **bounds)}
        near = problem._replace(arguments=changed)
        yield run_reference(near, torch.float64)


def _accumulation_dtype(problem: Problem) -> torch.dtype:
    carrier = problem.arguments.get(problem.leaves[0] if problem.leaves else "log_probs")
    return torch.promote_types(torch.float32 if carrier is None else carrier.dtype, torch.float32)


def _add_effects(effects: Effects, rounded: Results, truth: Results) -> None:
    for name, t in truth.items():
        if not t.is_floating_point():
            continue
        r = rounded[name].double()
        same = (r.isfinite() & t.isfinite()) | (r == t) | (r.isnan() & t.isnan())
        moved = (r - t).abs().nan_to_num(0.0).masked_fill(~same, torch.inf).flatten()
        effects[name] = torch.maximum(moved, effects[name]) if name in effects else moved


def _over_budget(
    problem: Problem,
    got: Results,
    eager: Results,
    truth: Results,
    effects: Effects,
) -> list[str]:
    overflowed = _overflowed(truth)
    infinite = _is_infinite(problem, truth) or _beyond_half(problem, truth)
    found = []
    for name, t in truth.items():
        g, e = got[name], eager[name]
        if name == "metric drift_noise":  # of the logits' dtype, which is not that of the truth
            if not torch.allclose(g, e, rtol=1e-3, atol=1e-6, equal_nan=True):
                found.append(f"{name}: {float(g):.9g}, eager PyTorch {float(e):.9g}")
            continue
        if (g.dtype, g.shape, t.shape) != (e.dtype, e.shape, e.shape):
            found.append(f"{name}: {g.dtype} {list(g.shape)}, eager {e.dtype} {list(e.shape)}")
        elif not g.is_floating_point():
            if not torch.equal(g, t):
                found.append(f"{name}: differs from the reference")
        elif g.numel() == 1 and _same_number(float(g), float(e), float(t), g.dtype):
            continue
        elif g.numel() and not (infinite and name.startswith("grad")):
            compared = _comparable(name, t, truth.get("token_loss"), overflowed)
            fault = _compare(
                name, (g, e, t), compared, effects.get(name), _twice_rounded(problem, name)
            )
            found += [fault] if fault else []
    return found


def _twice_rounded(problem: Problem, name: str) -> bool:
    """Whether a result is a product of rounded gradients of logits, rounded itself: of heads in
    short dtypes. How the roundings of few terms cancel is chance."""
    leaf = problem.arguments.get("hidden_states")
    return name.startswith("grad") and leaf is not None and leaf.dtype.itemsize < 4


def _same_number(got: float, eager: float, truth: float, dtype: torch.dtype) -> bool:
    """Whether one number is within the budget: `_compare` without tensors, which are slow."""
    if not (math.isfinite(got) and math.isfinite(eager) and abs(truth) < torch.finfo(dtype).max):
        return False  # for `_compare` to tell
    return abs(got - truth) <= allowed_of(abs(truth), abs(truth), abs(eager - truth), dtype)


def _compare(
    name: str,
    results: tuple[Tensor, Tensor, Tensor],
    compared: Tensor,
    effect: Tensor | None,
    twice_rounded: bool,
) -> str | None:
    """The fault of one result of the backend, beside eager PyTorch's and the truth; or None."""
    dtype = results[0].dtype
    g, e, t = (x.double().flatten() for x in results)
    rounded = t.to(dtype).double()
    special = (g.isfinite() & rounded.isfinite()).logical_not_() & (g != rounded)
    special = special & compared & ~(g.isnan() & rounded.isnan())
    if effect is not None:  # unless a border of finite and infinite is near
        near = (t.abs() - torch.finfo(dtype).max).abs() <= ROUNDED_FACTOR * effect
        special = special & effect.isfinite() & ~near
    if special.any():
        at = int(special.nonzero()[0])
        return f"{name}: {g[at]:g} where the reference has {t[at]:g} (element {at} of {len(t)})"
    compared = compared & g.isfinite() & rounded.isfinite()
    if not compared.any():
        return None
    g, e, t = g[compared], e[compared], t[compared]
    limit = allowed(t, (e - t).abs().nan_to_num(0.0, 0.0, 0.0), dtype)
    if twice_rounded:
        limit = SHORT_FACTOR * (limit + torch.finfo(dtype).eps * t.abs().max())
    if effect is not None:
        limit += ROUNDED_FACTOR * effect[compared]
    over = (g - t).abs() / limit
    at = int(over.argmax())
    if over[at] <= 1:
        return None
    return (
        f"{name}: {g[at]:.9g} where the reference has {t[at]:.9g} and eager PyTorch {e[at]:.9g} "
        f"({float(over[at]):.3g} times what is allowed; element {at} of {len(t)} finite ones)"
    )


def _comparable(name: str, truth: Tensor, losses: Tensor | None, overflowed: bool) -> Tensor:
    """[elements] bool. A row whose loss or slope is not finite has no gradient to speak of."""
    if not name.startswith("grad"):
        sure = name == "log_probs" or not overflowed
        return torch.full((truth.numel(),), sure, device=truth.device)
    rows = truth.reshape(-1, truth.shape[-1])
    sound = rows.isfinite().all(-1, keepdim=True) & (not overflowed)
    if losses is not None and name in OF_HEADS:
        sound = sound & losses.isfinite().all()
    elif losses is not None and losses.shape == truth.shape[:-1]:
        sound = sound & losses.isfinite().reshape(-1, 1)
    return sound.expand(rows.shape).flatten()
