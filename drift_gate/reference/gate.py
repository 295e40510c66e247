"""The drift gate (arXiv 2606.24084): which blocks have moved how far, and what they weigh.

    d_t = old_log_prob_t - log_prob_t             drift, detached, of the measured rows
    a_b = |aggregate of d over the measured rows of block b|
    g_b = exp(-tau * a_b)
    w_t = g_b(t) / mean of g over the valid rows

Measured are the first valid row of a block, and every `sample_every`-th valid one after it. A
Python loop walks the sequences and blocks. `where` indexes the rows of one sequence.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..gate import DriftGate
from ..outputs import GateOutput, Metrics
from .vocabulary import accumulation_dtype

Sequences = list[tuple[Any, ...]]


def sequences_of(shape: torch.Size, cu_seqlens: Tensor | None) -> Sequences:
    """An index for the positions of each sequence of a padded [B, T] or packed [N] batch."""
    if cu_seqlens is not None:
        first = (0,) * (len(shape) - 1)  # packed batches may be [1, N]
        return [(*first, slice(a, b)) for a, b in pairwise(cu_seqlens.tolist())]
    if len(shape) == 1:
        return [(slice(None),)]
    return [(b,) for b in range(shape[0])]


def block_ids(
    valid: Tensor,
    sequences: Sequences,
    granularity: str,
    block_size: int,
    span_ids: Tensor | None,
) -> Tensor:
    """Number of each valid row's block, in the order in which blocks begin; -1 on other rows."""
    ids = torch.full(valid.shape, -1, dtype=torch.int64, device=valid.device)
    blocks: dict[tuple[int, int], int] = {}
    for s, where in enumerate(sequences):
        positions = valid[where].nonzero()[:, 0].tolist()
        for t in positions:
            if granularity == "token":
                key = t
            elif granularity == "block":
                key = (t - positions[0]) // block_size
            elif granularity == "span":
                assert span_ids is not None
                key = int(span_ids[where][t])
            else:
                key = 0
            ids[where][t] = blocks.setdefault((s, key), len(blocks))
    return ids


def measured_rows(ids: Tensor, sample_every: int) -> Tensor:
    """Where the drift is measured, from the block of each row: [...] bool."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    seen: dict[int, int] = {}
    for t, block in enumerate(ids.flatten().tolist()):
        if block >= 0:
            rank = seen.get(block, 0)
            out.view(-1)[t] = rank % sample_every == 0
            seen[block] = rank + 1
    return out


def aggregate(drift: Tensor, kind: str) -> Tensor:
    """Reduce the drift of one block's measured rows to a scalar."""
    if kind == "mean":
        return drift.mean()
    if kind == "mean_abs":
        return drift.abs().mean()
    if kind == "rms":
        unit = drift.abs().max()
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)
        return unit * (drift / unit).square().mean().sqrt()
    return drift.abs().max()


def of_blocks(x: Tensor, ids: Tensor, kind: str, measured: Tensor | None = None) -> Tensor:
    """The aggregate of each row's block, over all its rows or those measured; 0 on rows of none."""
    out = torch.zeros_like(x)
    for block in range(int(ids.max()) + 1 if ids.numel() else 0):
        its = ids == block
        out[its] = aggregate(x[its if measured is None else its & measured], kind)
    return out


def unit_mean(a: Tensor, valid: Tensor, tau: float) -> Tensor:
    """exp(-tau a) over its mean on the valid rows; 0 on the others.

    The smallest a is subtracted first: it cancels, and no drift, however large, makes this 0/0.
    """
    if not valid.any():
        return torch.zeros_like(a)
    g = torch.exp(-tau * (a - a[valid].min()))
    return torch.where(valid, g / (g[valid].sum() / valid.sum()), 0)


def normalized(a: Tensor, valid: Tensor, sequences: Sequences, gate: DriftGate) -> Tensor:
    """w of each row from the drift a of its block."""
    if gate.normalize == "batch":
        return unit_mean(a, valid, gate.tau)
    if gate.normalize == "none":
        return torch.where(valid, torch.exp(-gate.tau * a), 0)
    w = torch.zeros_like(a)
    for where in sequences:
        w[where] = unit_mean(a[where], valid[where], gate.tau)
    return w


def mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows; 0 without any."""
    return x[valid].sum() / valid.sum().clamp(min=1)


def gate_metrics(w: Tensor, raw: Tensor, drift: Tensor, valid: Tensor, measured: Tensor) -> Metrics:
    """The metrics of `GateOutput`; raw are the weights before their unit mean."""
    zero = w.new_zeros(())
    largest = w[valid].max() if valid.any() else zero
    share = (w / largest if largest != 0 else w)[valid]  # whose squares no dtype loses
    return {
        "gate_mean_raw": mean(raw, valid),
        "gate_min": w[valid].min() if valid.any() else zero,
        "gate_max": largest,
        "gate_ess": share.sum() ** 2 / share.square().sum() / valid.sum() if largest != 0 else zero,
        "drift_abs": mean(drift.abs(), measured),
        "drift_signed": mean(drift, measured),
    }


@torch.no_grad()
def weigh(
    gate: DriftGate, drift: Tensor, valid: Tensor, sequences: Sequences, span_ids: Tensor | None
) -> GateOutput:
    """Weights of rows whose drift is known, 0 on rows that are not valid."""
    ids = block_ids(valid, sequences, gate.granularity, gate.block_size, span_ids)
    measured = measured_rows(ids, gate.sample_every)
    drift = drift.masked_fill(valid & ~measured, torch.nan)
    a = of_blocks(drift, ids, gate.aggregate, measured).abs()
    w = normalized(a, valid, sequences, gate)
    metrics = gate_metrics(w, torch.exp(-gate.tau * a), drift, valid, measured)
    return GateOutput(w, drift, ids, metrics)


def gate_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    gate: DriftGate = DriftGate(),  # noqa: B008  (frozen)
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
) -> GateOutput:
    """`drift_gate.gate_weights`."""
    dtype = accumulation_dtype(log_probs)
    valid = torch.ones_like(log_probs, dtype=torch.bool)
    if response_mask is not None:
        valid = response_mask.bool()
    new, old = (x.detach().to(dtype) for x in (log_probs, old_log_probs))
    drift = torch.where(valid, old - new, 0)
    return weigh(gate, drift, valid, sequences_of(log_probs.shape, cu_seqlens), span_ids)
