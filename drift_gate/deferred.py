"""Gates of a batch that is seen a chunk of rows at a time.

A block's gate depends on that block alone, and the unit mean is one number for the whole batch. So
a chunk of whole blocks gets its gates before the mean is known,

    u_t = exp(-tau (a_t - shift))         w_t = u_t / mean(u)

and whatever was summed with u is multiplied by 1 / mean(u) at the end. The shift keeps drifts,
however large, from making that 0/0: it is the smallest block drift of the first chunk, and
when a later one lies further below it than 1 / tau, the sums are moved to the new shift.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import rows
from .chunks import Rows, take


class GateRules(NamedTuple):
    """`DriftGate` and the layout, as the row functions take them."""

    granularity: str
    block_size: int
    aggregate: str
    tau: float
    normalize: str  # "batch", "sequence", "none", or "off" without a gate
    part: bool = False  # of a batch larger than the call


class RowData(NamedTuple):
    """What is known of each row [N] before its logits are."""

    valid: Tensor  # bool
    old: Tensor | None  # old log-probs
    spans: Tensor | None  # int64
    cu_seqlens: Tensor | None
    length: int
    coefficient: Tensor
    """d loss / d (w L), what `loss_agg_mode` makes of the row, over the largest of the batch's."""


def block_leaders(data: RowData, gate: GateRules, backend: str) -> Tensor | None:
    """First valid row of each row's block, [N]; None where every row is a block."""
    if gate.normalize == "off" or gate.granularity == "token":
        return None
    zeros = torch.zeros_like(data.coefficient)
    _, first = rows.row_blocks(
        zeros, zeros, data.valid, data.spans, data.cu_seqlens, data.length,
        gate.granularity, gate.block_size, "mean", False, backend,
    )  # fmt: skip
    return first


def all_weights(log_probs: Tensor, data: RowData, gate: GateRules, backend: str) -> Tensor:
    """w [N] of a batch whose log-probs [N] are all known."""
    if gate.normalize == "off":
        return torch.ones_like(log_probs)
    blocks, _ = rows.row_blocks(
        log_probs, data.old, data.valid, data.spans, data.cu_seqlens, data.length,
        gate.granularity, gate.block_size, gate.aggregate, False, backend,
    )  # fmt: skip
    if gate.part:
        blocks = rows.part_blocks(blocks, gate.normalize, gate.tau)
    _, weights, _ = rows.sampled_token(
        log_probs, data.old, None, data.valid, blocks, data.cu_seqlens, data.length, gate.tau,
        gate.normalize, "ppo", 0.2, 0.2, 3.0, None, 1.0, "given", False, backend,
    )  # fmt: skip
    return weights[0]


class KnownWeights:
    """Gates of a batch whose log-probs are all known beforehand."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    def of(self, at: Rows, log_probs: Tensor) -> tuple[Tensor, float]:
        """Gates [C] of a chunk; and what the sums so far are to be multiplied by: 1."""
        return take(self.weights, at), 1.0

    def mean(self) -> Tensor:
        """What the sums are to be divided by."""
        return self.weights.new_ones(())


class DeferredWeights:
    """Gates of a batch as its chunks come; `leaders` as `block_leaders` gives them."""

    def __init__(
        self, data: RowData, gate: GateRules, leaders: Tensor | None, backend: str
    ) -> None:
        self.data, self.gate, self.leaders, self.backend = data, gate, leaders, backend
        self.shift = math.inf if gate.normalize == "batch" else 0.0
        self.total = torch.zeros_like(data.coefficient[:1], dtype=torch.float64).sum()

    def of(self, at: Rows, log_probs: Tensor) -> tuple[Tensor, float]:
        """Gates u [C] of a chunk, and what the sums so far are to be multiplied by."""
        if self.gate.normalize == "off":
            return torch.ones_like(log_probs), 1.0
        drift = self._block_drift(at, log_probs)
        tau, factor = self.gate.tau, 1.0
        lowest = float(drift.min()) if self.gate.normalize == "batch" else 0.0
        if self.shift == math.inf:  # nothing has weighed yet
            self.shift = min(self.shift, lowest)
        elif tau * (self.shift - lowest) > 1:
            factor = math.exp(-tau * (self.shift - lowest))
            self.shift = lowest
        if self.shift == math.inf:
            weights = torch.full_like(drift, 0.0 if tau > 0 and lowest == math.inf else math.nan)
        else:
            weights = torch.exp(-tau * (drift - self.shift))
        self.total = self.total * factor + weights.sum(dtype=self.total.dtype)
        return weights, factor

    def mean(self) -> Tensor:
        """What the sums are to be divided by."""
        if self.gate.normalize != "batch":
            return torch.ones_like(self.total)
        count = self.data.valid.sum()
        weighs = count > 0
        if self.gate.part and self.gate.tau > 0:
            weighs &= self.total != 0  # where all gates are 0 the rest of the batch decides
        return torch.where(weighs, self.total / count, 1)

    def _block_drift(self, at: Rows, log_probs: Tensor) -> Tensor:
        assert self.data.old is not None
        old = take(self.data.old, at)
        whole = torch.ones_like(old, dtype=torch.bool)
        granularity, spans = "token", None
        if self.leaders is not None:
            granularity, spans = "span", take(self.leaders, at).long()
        blocks, _ = rows.row_blocks(
            log_probs, old, whole, spans, None, len(old), granularity, 1, self.gate.aggregate,
            False, self.backend,
        )  # fmt: skip
        return blocks[1]
