"""A training step measured whole: forward and backward of a causal LM under each loss.

Time is wall-clock; memory the exact peak of a step, weights and batch included. Gradients are
dropped before each step, and no optimizer takes one: it would add the same to every row. The first
row has no loss but the sum of the hidden states: what a step takes beyond it is the loss's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from drift_gate import eager, linear_opd_loss, linear_topk_loss, opd_loss, topk_loss

from .bounds import Bounds, TooLong, within
from .cases import Case
from .harness import CUT, OUT_OF_MEMORY, UNREACHED, forget, machine, reason_of
from .measure import peak_bytes, quartiles, seconds
from .names import LAYERS, STEP
from .peers import plain, sampled
from .peers.guard import LeftOut, load
from .record import Result
from .runs import compiled_too
from .step_model import Problem, case_of, draw
from .timing import copy_bandwidth

Loss = Callable[[Tensor], Tensor]  # hidden states [B, T, H] -> loss []
ON_GPU = "Qwen3 1.7B", "Qwen3 0.6B", "Qwen3 4B"  # in the order in which they matter
ON_CPU = ("Qwen3 tiny",)
OPD, LSM = "eager OPD", "eager LSM"
SAME = 0.05  # by which gradient norms of one loss may differ: a gate left out makes more


class Entry(NamedTuple):
    """A loss of the model's last hidden states."""

    name: str
    make: Callable[[Problem], Loss]  # raises LeftOut
    unit: str = ""  # the entry that computes the same loss; "" for one that nobody else computes
    note: str = ""


def _rows(x: Problem) -> tuple[Tensor, ...]:
    """Labels, old, teacher, mask as a number, blocks: [N] each."""
    return (*(y.flatten() for y in (x.labels, x.old, x.teacher, x.mask.float())), x.blocks)


def _opd_eager(x: Problem) -> Loss:
    rows = _rows(x)
    return lambda hidden: eager.loss(x.logits(hidden).flatten(0, 1), *rows)


def _lsm_eager(x: Problem) -> Loss:
    labels, old, _, mask, blocks = _rows(x)
    ids, log_q = x.ids.flatten(0, 1), x.log_q.flatten(0, 1)

    def loss(hidden: Tensor) -> Tensor:
        table = plain.log_probs(x.logits(hidden).flatten(0, 1))
        drift = (old - plain.at(table.detach(), labels)) * mask
        weights = eager.drift_weights(drift, mask, blocks)
        return (weights * plain.lsm(table.gather(-1, ids), log_q)).sum() / mask.sum()

    return loss


def _compiled(make: Callable[[Problem], Loss]) -> Callable[[Problem], Loss]:
    """Head and loss in one graph, forward and backward."""
    return lambda x: compiled_too(make(x))


def _finished(x: Problem, log_probs: Callable[[Tensor], Tensor]) -> Loss:
    """Clip and gate eagerly, of somebody's log-probs [N]."""
    _, *rows = _rows(x)
    mask = rows[2]
    return lambda hidden: eager.row_loss(log_probs(hidden), *rows).sum() / mask.sum()


def _trl(x: Problem) -> Loss:
    function = load("trl.trainer.utils", "selective_log_softmax")
    return _finished(x, lambda hidden: function(x.logits(hidden), x.labels).flatten().float())


def _trl_linear(x: Problem) -> Loss:
    peer = next(p for p in sampled.FROM_HIDDEN if p.name.startswith("TRL"))
    function, labels = peer.load(x.tokens.device), x.labels.flatten()
    return _finished(x, lambda hidden: function(hidden.flatten(0, 1), x.weight, labels).float())


def _liger(x: Problem) -> Loss:
    function, valid = sampled.liger_grpo(x.tokens.device), x.mask.flatten()
    labels, old, teacher, *_ = (y[valid] for y in _rows(x))
    return lambda hidden: function(
        hidden.flatten(0, 1)[valid], x.weight, labels, teacher - old, old
    )


def _opd(x: Problem) -> Loss:
    rows = x.labels, x.old, x.teacher
    options = dict(response_mask=x.mask, inplace_backward=True)
    return lambda hidden: opd_loss(x.logits(hidden), *rows, **options).loss


def _topk(x: Problem) -> Loss:
    rows = x.labels, x.old, x.ids, x.log_q
    options = dict(response_mask=x.mask, inplace_backward=True)
    return lambda hidden: topk_loss(x.logits(hidden), *rows, **options).loss


def _linear_opd(x: Problem) -> Loss:
    rows = x.labels, x.old, x.teacher
    return lambda hidden: linear_opd_loss(hidden, x.weight, *rows, response_mask=x.mask).loss


def _linear_topk(x: Problem) -> Loss:
    rows = x.labels, x.old, x.ids, x.log_q
    return lambda hidden: linear_topk_loss(hidden, x.weight, *rows, response_mask=x.mask).loss


UNGATED = "no gate, no dual clip"
ENTRIES = (  # what a time budget cuts off comes last
    Entry(LAYERS, lambda x: lambda hidden: hidden.float().sum(), note="no head"),
    Entry(OPD, _opd_eager, OPD),
    Entry("drift_gate linear_opd_loss", _linear_opd, OPD),
    Entry("drift_gate linear_topk_loss", _linear_topk, LSM),
    Entry(LSM, _lsm_eager, LSM),
    Entry("drift_gate opd_loss, in place", _opd, OPD),
    Entry("drift_gate topk_loss, in place", _topk, LSM),
    Entry(f"torch.compile of {OPD}", _compiled(_opd_eager), OPD),
    Entry(f"torch.compile of {LSM}", _compiled(_lsm_eager), LSM),
    Entry("TRL ChunkedLogProbFunction", _trl_linear, OPD, "log-probs; clip and gate eager"),
    Entry("TRL selective_log_softmax", _trl, OPD, "log-probs; clip and gate eager"),
    Entry("Liger fused linear GRPO", _liger, note=UNGATED),
)


class Step(NamedTuple):
    """One training step of a model under a loss."""

    problem: Problem
    loss: Loss
    device: torch.device

    def __call__(self) -> Tensor:
        loss = self.loss(self.problem.hidden_states())
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        """Drop the gradients."""
        self.problem.model.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Of one step."""
        self.forget()
        return seconds(self, self.device)

    def measured(self) -> dict[str, float]:
        """Loss, norm of all gradients, and bytes at the peak of one step."""
        self.forget()
        gc.collect()
        with peak_bytes(self.device) as memory:
            loss = self()
        grads = [p.grad for p in self.problem.model.parameters() if p.grad is not None]
        norm = torch.stack([x.norm(dtype=torch.float32) for x in grads]).norm()
        held = self.problem.held_bytes
        return dict(
            loss=float(loss), gradient_norm=float(norm), held_bytes=held,
            peak_bytes=held + memory.peak,
        )  # fmt: skip


class StepSuite(NamedTuple):
    """The suite as the others look to those who run them."""

    name: str
    works: tuple[str, ...]
    implementations: tuple[Entry, ...]

    def cases(self, grid: str, on_gpu: bool) -> list[Case]:
        """The models; the first alone in the grids quick and targets."""
        if grid == "growth":
            return []
        found = [case_of(name) for name in (ON_GPU if on_gpu else ON_CPU)]
        if grid == "dry":
            return [case_of("Qwen3 dry")]
        return found if grid in ("star", "full") else found[:1]

    def chosen(self, grid: str, on_gpu: bool) -> list[Entry]:
        return list(self.implementations)

    def measure(
        self, case: Case, device: torch.device, bounds: Bounds, wanted: Iterable[str] = (),
        keep: Callable[[dict[str, Result]], object] = lambda results: None,
    ) -> dict[str, Result]:  # fmt: skip
        """Results by loss: those wanted (all, if none are), the layers and the eager losses."""
        beside = (LAYERS, OPD, LSM)
        chosen = [e for e in self.implementations if not wanted or e.name in (*wanted, *beside)]
        results = {entry.name: _blank(entry, case, device) for entry in chosen}
        keep(results)
        try:
            problem = draw(case, device)
        except (LeftOut, torch.OutOfMemoryError) as reason:
            for result in results.values():
                result.left_out = reason_of(reason)
            return results
        _measure(chosen, problem, results, bounds, keep)
        return results


def _measure(
    chosen: list[Entry], problem: Problem, results: dict[str, Result], bounds: Bounds,
    keep: Callable[[dict[str, Result]], object],
) -> None:  # fmt: skip
    """Warm every loss and note its memory; then rounds of all, in turn."""
    torch._dynamo.reset()
    steps: dict[str, Step] = {}
    warm: dict[str, float] = {}
    for entry in chosen:
        result = results[entry.name]
        try:
            steps[entry.name], warm[entry.name] = _warmed(
                entry, problem, result, bounds, sum(warm.values())
            )
        except Exception as error:  # what a peer may raise is not known
            ours = not isinstance(error, (LeftOut, torch.OutOfMemoryError))
            if ours and (entry.name.startswith("drift_gate") or entry.name in (LAYERS, OPD, LSM)):
                raise
            result.left_out = reason_of(error)
        problem.model.zero_grad(set_to_none=True)
        forget(problem.tokens.device)
        keep(results)
    _judge(chosen, results, steps)
    _rounds(steps, results, bounds, sum(warm.values()), keep)


def _warmed(
    entry: Entry, problem: Problem, result: Result, bounds: Bounds, others: float
) -> tuple[Step, float]:
    """A warm step and its seconds; `others` are those of the steps that are to have rounds.

    Raises:
        LeftOut: no time is left for it.
    """
    must = entry.name in (LAYERS, OPD) or entry.name.startswith("drift_gate linear")
    left = bounds.left() - others
    if not must and left <= 0:
        raise LeftOut(UNREACHED)
    step = Step(problem, entry.make(problem), problem.tokens.device)
    try:
        with within(bounds.most() if must else left):
            step.seconds()
            result.step = step.measured()
            found = step.seconds()
    except TooLong:
        raise LeftOut(f"{UNREACHED}: compiling and two steps took longer than was left") from None
    result.extra_bytes = int(result.step["peak_bytes"] - result.step["held_bytes"])
    result.seconds, result.left_out = [[found]], None
    return step, found


def _rounds(
    steps: dict[str, Step], results: dict[str, Result], bounds: Bounds, longest: float,
    keep: Callable[[dict[str, Result]], object],
) -> None:  # fmt: skip
    """Rounds of all steps in turn, in the place of the warm step's time."""
    found: dict[str, list[list[float]]] = {name: [] for name in steps}
    for i in range(bounds.rounds):
        if bounds.left() < longest:
            break
        for name, step in list(steps.items()):
            try:
                found[name].append([step.seconds()])
            except torch.OutOfMemoryError:  # among what the others leave, where it fitted alone
                results[name].left_out, results[name].seconds = OUT_OF_MEMORY, []
                del steps[name], found[name]
            step.forget()
        for name, seconds_ in found.items():
            results[name].seconds = seconds_
        if i == 0 or i == bounds.rounds - 1:
            keep(results)
    base = results.get(OPD)
    for name in steps:
        if base is not None and base.seconds:
            ratios = [a / b for a, b in zip(results[name].samples, base.samples, strict=True)]
            results[name].ratio_quartiles = quartiles(ratios)
    keep(results)


def _judge(chosen: list[Entry], results: dict[str, Result], steps: dict[str, Step]) -> None:
    """Leave out whose gradients are not those of the eager loss that it is to compute."""
    for entry in chosen:
        found, unit = results[entry.name].step, results.get(entry.unit)
        if found is None or unit is None or unit.step is None:
            continue
        norm, wanted = found["gradient_norm"], unit.step["gradient_norm"]
        if not abs(norm - wanted) <= SAME * wanted:
            said = f"wrong: its gradient has norm {norm:.3g}, that of {entry.unit} {wanted:.3g}"
            results[entry.name].left_out, results[entry.name].seconds = said, []
            del steps[entry.name]


def _blank(entry: Entry, case: Case, device: torch.device) -> Result:
    return Result(
        STEP, case._asdict(), entry.name, entry.note, OPD, bytes_must_move=0, flops=0,
        machine=machine(device), copy_bytes_per_s=copy_bandwidth(device), left_out=CUT,
    )  # fmt: skip


SUITE = StepSuite(STEP, (*ON_GPU, *ON_CPU), ENTRIES)
