"""A batch larger than a call: unit mean and denominators over ranks and over micro-batches.

A block's gate depends on that block alone; what a call cannot know by itself are two numbers of the
whole batch, the mean gate and the denominator D. So a call computes with those of its own rows,

    w_t = g_t / mean_call(g)        loss = sum w L / D_call

and is then multiplied by mean_call(g) / mean(g) and D_call / D. The means are kept as logarithms:
no drift, however large, makes their quotient 0/0.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .gating import Gated
from .outputs import LossOutput, Metrics
from .ranks import gather_ranks
from .rows import LARGEST_DRIFT
from .torch_rows import wide


class Totals(NamedTuple):
    """Of the valid rows of a call or of all ranks; float64 scalars (else float32).

    The mean of the raw gates exp(-tau a) is exp(peak + log_mean). The two are kept apart: a peak of
    1e30 would lose the digits of the other.
    """

    peak: Tensor
    """Logarithm of the largest gate; -inf where all are 0, 0 where no mean is asked for."""
    log_mean: Tensor
    """Logarithm of the mean gate over the largest."""
    tokens: Tensor
    size: Tensor
    """What divides the loss where it is counted: the valid tokens, or the sequences with any."""

    def log_quotient(self, other: "Totals") -> Tensor:
        """Of the mean gates; 0 where there are no rows of which one could be."""
        between = (self.peak - other.peak) + (self.log_mean - other.log_mean)
        return torch.where(self.tokens > 0, between, 0)


class Scales(NamedTuple):
    """What a call's results are to be multiplied by."""

    gate: Tensor
    size: Tensor


class Normalizer(Protocol):
    """What collects the micro-batches of a step: see `GateNormalizer`."""

    def collect(self, call: Totals, everyone: Totals, counted: bool) -> Scales: ...

    def record(self, loss: Tensor) -> None: ...


class Scope(NamedTuple):
    """Where the rest of the batch is."""

    group: str = ""  # named, see `ranks`; "" for this rank alone
    normalizer: Normalizer | None = None

    @property
    def single(self) -> bool:
        """Whether this call sees all of the batch."""
        return not self.group and self.normalizer is None


def call_totals(found: Gated, weights: Tensor, valid: Tensor, size: Tensor | None = None) -> Totals:
    """Totals of a call, from its weights of unit mean [N]; without `size`, that is the tokens."""
    tokens = wide(valid.sum().to(weights.dtype))
    peak = log_mean = torch.zeros_like(tokens)
    if found.normalize == "batch":
        assert found.blocks is not None
        peak, log_mean = _mean_gate(found.blocks[1], weights, valid, found.tau)
    return Totals(peak, log_mean, tokens, tokens if size is None else size)


def _mean_gate(
    block_drift: Tensor, weights: Tensor, valid: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """`peak` and `log_mean`: the row that weighs most tells, w = exp(-tau a) / mean.

    0 without a valid row. The peak is -inf where all drifts are infinite (see `rows.part_blocks`).
    """
    a, w = wide(block_drift), wide(weights)
    lowest = torch.where(valid, a, torch.inf).amin() if len(a) else a.sum()
    largest = torch.where(valid, w, 0).amax() if len(a) else a.sum()
    peak = torch.where(lowest == LARGEST_DRIFT, -torch.inf, -tau * lowest)
    some = valid.any()
    return torch.where(some, peak, 0), torch.where(some, -largest.log(), 0)


def joined(parts: Tensor) -> Totals:
    """Totals of several parts of a batch, given as [parts, 4]."""
    peaks, log_means, tokens, sizes = parts.unbind(-1)
    some = tokens > 0  # a part without any has no say
    peak = torch.where(some, peaks, -torch.inf).amax()
    weighed = torch.where(some, (peaks - peak) + log_means + tokens.log(), -torch.inf)
    total = tokens.sum()
    log_mean = torch.where(total > 0, weighed.logsumexp(0) - total.log(), 0)
    return Totals(torch.where(total > 0, peak, 0), log_mean, total, sizes.sum())


def over_ranks(call: Totals, group: str) -> Totals:
    """The totals of all ranks of a group: one collective of four numbers a rank."""
    return joined(gather_ranks(torch.stack(call), group)) if group else call


def at_least_one(size: Tensor) -> Tensor:
    """A denominator: the losses of an empty batch are 0, not 0/0."""
    return size.clamp(min=1)


def scales(scope: Scope, call: Totals, counted: bool) -> Scales:
    """What takes a call's results to those of the whole batch, or of the step's first call."""
    everyone = over_ranks(call, scope.group)
    if scope.normalizer is not None:
        return scope.normalizer.collect(call, everyone, counted)
    size = torch.ones_like(call.size)
    if counted:
        size = at_least_one(call.size) / at_least_one(everyone.size)
    return Scales(torch.exp(call.log_quotient(everyone)), size)


def scaled(metrics: Metrics, gate: Tensor) -> Metrics:
    """Metrics of weights that are multiplied by a number."""
    return metrics | {name: metrics[name] * gate for name in ("gate_min", "gate_max")}


def rescaled(x: Tensor, gate: Tensor, valid: Tensor) -> Tensor:
    """Row data of weights that are multiplied by a number; invalid rows are 0 whatever it is."""
    return torch.where(valid, x * gate, 0)


def rescale(
    scope: Scope, output: LossOutput, valid: Tensor, call: Totals, counted: bool, none: bool
) -> LossOutput:
    """The output of a call as part of its batch.

    `valid` [N]. `counted`: D was counted from the call's rows. `none`: the caller reduces, the loss
    is the per-token losses.
    """
    gate, size = (x.to(output.gate.dtype) for x in scales(scope, call, counted))
    valid = valid.view(output.gate.shape)
    token_loss = rescaled(output.token_loss, gate, valid)
    loss = token_loss if none else output.loss * (gate * size)
    if scope.normalizer is not None:
        scope.normalizer.record(loss)
    return output._replace(
        loss=loss,
        token_loss=token_loss,
        gate=rescaled(output.gate, gate, valid),
        metrics=scaled(output.metrics, gate),
    )
