"""Row functions in PyTorch: the same results as the Triton kernels, on any device.

Row data is small, so it is computed in float64 where the device has it. Sums over blocks and
sequences are segment reductions over rows sorted by segment: fixed order, no atomics.
"""

import torch
from torch import Tensor

FAR = torch.iinfo(torch.int64).max


def wide(x: Tensor) -> Tensor:
    """Row data in float64, or in float32 on devices that have nothing wider."""
    return x if x.device.type in ("mps", "xpu") else x.double()


def sequence_numbers(n_rows: int, length: int, cu_seqlens: Tensor | None, x: Tensor) -> Tensor:
    """A number in [0, N) for each row's sequence, [N] int64: its first row."""
    rows = torch.arange(n_rows, device=x.device)
    if cu_seqlens is None:
        length = max(length, 1)
        return rows // length * length
    borders = cu_seqlens.long()
    return borders[torch.searchsorted(borders, rows, right=True) - 1]


class Segments:
    """Rows grouped by an int64 key in [0, N]; reductions give every row its segment's value."""

    def __init__(self, key: Tensor) -> None:
        n = key.shape[0]
        self.key = key
        ordered, self.order = key.sort(stable=True)
        borders = torch.arange(n + 2, device=key.device)
        self.offsets = torch.searchsorted(ordered, borders)

    def reduce(self, x: Tensor, kind: str) -> Tensor:
        """Per-row result [N] of "sum", "max" or "min" over the row's segment."""
        if x.shape[0] == 0:
            return x
        per_segment = torch.segment_reduce(
            x[self.order].contiguous(), kind, offsets=self.offsets, axis=0, unsafe=True
        )
        return per_segment[self.key]


def _dense(sequence: Tensor, ids: Tensor) -> Tensor:
    """Number the distinct pairs (sequence, id), in [0, N)."""
    order = ids.sort(stable=True).indices
    order = order[sequence[order].sort(stable=True).indices]
    s, i = sequence[order], ids[order]
    new = torch.ones_like(s, dtype=torch.bool)
    new[1:] = (s[1:] != s[:-1]) | (i[1:] != i[:-1])
    key = torch.empty_like(order)
    key[order] = new.cumsum(0) - 1
    return key


def _block_key(
    granularity: str, sequence: Tensor, first: Tensor, block_size: int, span_ids: Tensor | None
) -> Tensor:
    """Number of each row's block, in [0, N)."""
    n = sequence.shape[0]
    rows = torch.arange(n, device=sequence.device)
    if granularity == "token":
        return rows
    if granularity == "sequence":
        return sequence
    if granularity == "span":
        assert span_ids is not None
        return _dense(sequence, span_ids.long())
    return _dense(sequence, (rows - first) // block_size)


def _aggregate(drift: Tensor, blocks: Segments, valid: Tensor, kind: str) -> Tensor:
    """|aggregate of the drift| of each row's block, [N]."""
    count = blocks.reduce(valid.to(drift.dtype), "sum").clamp(min=1)
    if kind == "mean":
        return (blocks.reduce(drift, "sum") / count).abs()
    if kind == "mean_abs":
        return blocks.reduce(drift.abs(), "sum") / count
    largest = blocks.reduce(drift.abs(), "max")
    if kind == "max_abs":
        return largest
    unit = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return unit * (blocks.reduce((drift / unit).square(), "sum") / count).sqrt()


def row_blocks(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    valid: Tensor,
    span_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    granularity: str,
    block_size: int,
    aggregate: str,
    count: bool,
) -> tuple[Tensor, Tensor]:
    """See `drift_gate.rows.row_blocks`."""
    n = log_probs.shape[0]
    sequence = sequence_numbers(n, length, cu_seqlens, valid)
    sequences = Segments(sequence)
    rows = torch.arange(n, device=valid.device)
    candidate = torch.where(valid, rows, n).to(wide(log_probs).dtype)
    first = sequences.reduce(candidate, "min").long()
    out = log_probs.new_zeros(4 if count else 2, n)
    block_first = torch.full((n,), -1, dtype=torch.int32, device=valid.device)
    if count:
        out[2] = torch.where(valid, sequences.reduce(valid.to(candidate.dtype), "sum"), 0)
        out[3] = valid & (rows == first)
    if old_log_probs is None:
        return out, block_first
    drift = torch.where(valid, wide(old_log_probs) - wide(log_probs), 0)
    blocks = Segments(_block_key(granularity, sequence, first, block_size, span_ids))
    out[0] = drift
    out[1] = torch.where(valid, _aggregate(drift, blocks, valid, aggregate), 0)
    leader = blocks.reduce(candidate, "min")
    return out, torch.where(valid, leader, -1).to(torch.int32)


def _unit_mean(a: Tensor, valid: Tensor, tau: float, groups: Segments | None) -> Tensor:
    """exp(-tau a) over its mean on the valid rows, of each group or of all."""
    if a.shape[0] == 0:
        return a.clone()  # an op's result must not be its input
    masked = torch.where(valid, a, torch.inf)
    count = valid.to(a.dtype)
    if groups is None:
        g = torch.where(valid, torch.exp(-tau * (a - masked.min())), 0)
        mean = g.sum() / count.sum().clamp(min=1)
    else:
        g = torch.where(valid, torch.exp(-tau * (a - groups.reduce(masked, "min"))), 0)
        mean = groups.reduce(g, "sum") / groups.reduce(count, "sum").clamp(min=1)
    return torch.where(valid, g / mean, 0)


def _ratio_loss(
    new: Tensor,
    old: Tensor,
    teacher: Tensor,
    clip_low: float,
    clip_high: float,
    clip_c: float,
    advantage_clip: float | None,
    ppo: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Importance-weighted surrogate -r A, with PPO's clip and dual clip; its slope; clipped."""
    advantage = teacher - old
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    log_ratio = new - old
    ratio = log_ratio.clamp(-20, 20).exp()
    loss = -advantage * ratio
    slope = torch.where(log_ratio.abs() > 20, 0, loss)
    clipped = torch.zeros_like(loss, dtype=torch.bool)
    if ppo:
        held = -advantage * ratio.clamp(1 - clip_low, 1 + clip_high)
        clipped = held > loss
        loss = torch.maximum(loss, held)
        ceiling = -advantage * clip_c
        dual = (advantage < 0) & (loss > ceiling)
        slope = torch.where(clipped | dual, 0, slope)
        loss = torch.where(dual, ceiling, loss)
    return loss, slope, clipped


def _divergence_loss(new: Tensor, teacher: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """k1, k2, k3 of the reverse KL (Schulman 2020), with verl's clamps; and the slope."""
    log_ratio = new - teacher
    if estimator == "k1":
        return log_ratio, torch.ones_like(log_ratio)
    if estimator == "k2":
        return 0.5 * log_ratio.square(), log_ratio
    bounded = (-log_ratio).clamp(-20, 20)
    growth = torch.expm1(bounded)
    loss = growth - bounded
    slope = torch.where((log_ratio.abs() > 20) | (loss > 10), 0, -growth)
    return loss.clamp(max=10), slope


def _metrics(raw: Tensor, weight: Tensor, drift: Tensor, clipped: Tensor, valid: Tensor) -> Tensor:
    """Stack the metrics in the order of `drift_gate.rows.METRICS`."""
    n = valid.sum()
    over = 1 / n.clamp(min=1).to(weight.dtype)
    zero = torch.zeros_like(over)
    some = weight.shape[0] > 0
    lowest = torch.where(valid, weight, torch.inf).min() if some else zero
    largest = torch.where(valid, weight, -torch.inf).max() if some else zero
    largest = torch.where(n > 0, largest, zero)
    # Of the largest: the squares of small weights may be too small for their dtype.
    share = weight / torch.where(largest == 0, 1, largest)
    total, square = share.sum(), share.square().sum()
    return torch.stack(
        [
            torch.where(valid, raw, 0).sum() * over,
            torch.where(n > 0, lowest, zero),
            largest,
            torch.where(square == 0, zero, total / square * total * over),
            drift.abs().sum() * over,
            drift.sum() * over,
            (clipped & valid).sum() * over,
            drift.clamp(-20, 20).sum() * over,
            n.to(weight.dtype),
        ]
    )


def sampled_token(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    valid: Tensor,
    blocks: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    tau: float,
    normalize: str,
    estimator: str,
    clip_low: float,
    clip_high: float,
    clip_c: float,
    advantage_clip: float | None,
    factor: float,
    denominator: str,
    token_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `drift_gate.rows.sampled_token`."""
    dtype = log_probs.dtype
    new = torch.where(valid, wide(log_probs), 0)
    old = new if old_log_probs is None else torch.where(valid, wide(old_log_probs), 0)
    drift = torch.zeros_like(new) if old_log_probs is None else old - new
    raw = torch.ones_like(new)
    weight = valid.to(new.dtype)
    if normalize == "given":
        assert blocks is not None
        weight = raw = torch.where(valid, wide(blocks[1]), 0)
    elif normalize != "off":
        assert blocks is not None
        a = wide(blocks[1])
        raw = torch.where(valid, torch.exp(-tau * a), 0)
        weight = raw
        if normalize != "none":
            groups = None
            if normalize == "sequence":
                groups = Segments(sequence_numbers(len(new), length, cu_seqlens, valid))
            weight = _unit_mean(a, valid, tau, groups)
    clipped = torch.zeros_like(valid)
    if teacher_log_probs is None:
        metrics = _metrics(raw, weight, drift, clipped, valid)
        return new.new_zeros((), dtype=dtype), weight[None].to(dtype), metrics.to(dtype)

    teacher = torch.where(valid, wide(teacher_log_probs), 0)
    if estimator == "given":
        value, slope = teacher, torch.ones_like(teacher)
    elif estimator in ("ppo", "importance"):
        clips = clip_low, clip_high, clip_c, advantage_clip
        value, slope, clipped = _ratio_loss(new, old, teacher, *clips, estimator == "ppo")
    else:
        value, slope = _divergence_loss(new, teacher, estimator)
    coefficient = valid.to(new.dtype) * factor
    if denominator == "tokens":
        coefficient = coefficient / valid.sum().clamp(min=1)
    if denominator == "sequences":
        assert blocks is not None
        coefficient = coefficient / blocks[3].sum().clamp(min=1)
    if token_mean:
        assert blocks is not None
        coefficient = coefficient / (wide(blocks[2]) + 1e-8)
    value = torch.where(valid, weight * value, 0)
    slope = torch.where(valid, weight * slope, 0)
    rows = torch.stack([weight, value, slope, coefficient]).to(dtype)
    metrics = _metrics(raw, weight, drift, clipped, valid)
    return (value * coefficient).sum().to(dtype), rows, metrics.to(dtype)
