"""A batch larger than a call: unit mean and denominators over ranks and over micro-batches.

A block's gate depends on that block alone; what a call cannot know by itself are two numbers of the
whole batch, the mean gate and the denominator D. So a call computes with those of its own rows,

    w_t = g_t / mean_call(g)        loss = sum w L / D_call

and is then multiplied by mean_call(g) / mean(g) and D_call / D. The means are kept as logarithms:
no drift, however large, makes their quotient 0/0.
"""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..gate import DriftGate
from .ranks import gather_ranks


class Totals(NamedTuple):
    """Of the valid rows of a call or of all ranks; float64 scalars (float32 where there are none).

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


class Collector(abc.ABC):
    """What collects the micro-batches of a step, in a loss's `gate`: see `GateNormalizer`."""

    gate: DriftGate | None

    @abc.abstractmethod
    def collect(self, call: Totals, everyone: Totals, counted: bool) -> Scales:
        """Take a call's totals; what its results are to be multiplied by."""

    @abc.abstractmethod
    def follow(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """A call's loss and token losses, as it returns them."""

    @abc.abstractmethod
    def record(self, loss: Tensor) -> None:
        """Add a call's loss."""


def totals(stacked: Tensor) -> Totals:
    """From a tensor [4]."""
    return Totals(*stacked.unbind())


def joined(parts: Tensor) -> Totals:
    """Totals of several parts of a batch, given as [parts, 4]."""
    peaks, log_means, tokens, sizes = parts.unbind(-1)
    some = tokens > 0  # a part without any has no say
    peak = torch.where(some, peaks, -torch.inf).amax()
    weighed = torch.where(some, (peaks - peak) + log_means + tokens.log(), -torch.inf)
    total = tokens.sum()
    log_mean = torch.where(total > 0, weighed.logsumexp(0) - total.log(), 0)
    return Totals(torch.where(total > 0, peak, 0), log_mean, total, sizes.sum())


def over_ranks(mine: Totals, group: str) -> Totals:
    """The totals of all ranks of a group: one collective of four numbers a rank."""
    return joined(gather_ranks(torch.stack(mine), group)) if group else mine


def at_least_one(size: Tensor) -> Tensor:
    """A denominator: the losses of an empty batch are 0, not 0/0."""
    return size.clamp(min=1)


def scales(call: Totals, everyone: Totals, counted: bool) -> Scales:
    """What takes a call's results to those of the whole batch; `counted`: D was."""
    size = torch.ones_like(call.size)
    if counted:
        size = at_least_one(call.size) / at_least_one(everyone.size)
    return Scales(torch.exp(call.log_quotient(everyone)), size)


def rescaled(x: Tensor, factor: Tensor, valid: Tensor) -> Tensor:
    """Row data of weights that are multiplied by a number; invalid rows are 0 whatever it is."""
    return torch.where(valid, x * factor.to(x.dtype), 0)
