"""`sampled_token`: gate, unit mean, loss and its slope, and the metrics, in one launch.

    g_t = exp(-tau a_t)                     a_t: block drift, from `row_blocks`
    w_t = g_t / mean_valid(g)               over the batch or the sequence, or not at all
    token_loss_t = w_t L_t                  L_t: the position's loss, a function of logp_t alone
    loss = sum_t coefficient_t token_loss_t

Before the exponential the smallest a_t is subtracted: it cancels in w, and then no drift, however
large, makes w 0/0. `slope_t = d token_loss_t / d logp_t` is all that the backward needs.

One program walks all rows: the sums have a fixed order and need no atomics, no second launch and
no host. It moves some 40 bytes a row where the vocabulary passes move 2 V, so that even at the
bandwidth of one multiprocessor it stays well below a hundredth of their time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TINY

TILE = 2048
NUM_WARPS = 16

METRICS = (
    "gate_mean_raw",
    "gate_min",
    "gate_max",
    "gate_ess",
    "drift_abs",
    "drift_signed",
    "pg_clipfrac",
    "ppo_kl",
    "valid_tokens",
)


@triton.jit
def _gate_mean(block_drift, valid, lo, hi, tau, TILE: tl.constexpr):
    """Smallest block drift of the valid rows in [lo, hi), and the mean gate relative to it."""
    lane = tl.arange(0, TILE)
    lowest = tl.full([TILE], float("inf"), tl.float32)
    count = tl.zeros([TILE], tl.float32)
    for start in range(lo, hi, TILE):
        live = tl.load(valid + start + lane, mask=start + lane < hi, other=0) != 0
        a = tl.load(block_drift + start + lane, mask=live, other=float("inf"))
        lowest = tl.minimum(lowest, a)
        count += live.to(tl.float32)
    shift = tl.min(lowest, 0)
    total = tl.zeros([TILE], tl.float32)
    for start in range(lo, hi, TILE):
        live = tl.load(valid + start + lane, mask=start + lane < hi, other=0) != 0
        a = tl.load(block_drift + start + lane, mask=live, other=0.0)
        total += tl.where(live, tl.exp(-tau * (a - shift)), 0.0)
    return shift, tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)


@triton.jit
def _unit(gates, valid, n_rows, tau, GIVEN: tl.constexpr, TILE: tl.constexpr):
    """The largest weight that has no unit mean: squares of smaller ones may be none of float32's.

    1 where it is none itself. gates: [N] the weights, or else block drifts.
    """
    lane = tl.arange(0, TILE)
    largest = tl.zeros([TILE], tl.float32)
    for start in range(0, n_rows, TILE):
        live = tl.load(valid + start + lane, mask=start + lane < n_rows, other=0) != 0
        gate = tl.load(gates + start + lane, mask=live, other=0.0)
        if not GIVEN:
            gate = tl.exp(-tau * gate)
        largest = tl.maximum(largest, tl.where(live, gate, 0.0))
    unit = tl.max(largest, 0)
    TINY_: tl.constexpr = TINY
    return tl.where(unit < TINY_, 1.0, unit)


@triton.jit
def _count(flags, n_rows, TILE: tl.constexpr):
    """Sum of float or integer flags [N]."""
    lane = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, n_rows, TILE):
        flag = tl.load(flags + start + lane, mask=start + lane < n_rows, other=0)
        total += flag.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _ratio_loss(
    new,
    old,
    teacher,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    CLIP_C: tl.constexpr,
    ADVANTAGE_CLIP: tl.constexpr,
    PPO: tl.constexpr,
):
    """Importance-weighted surrogate -r A, with PPO's clip and dual clip; its slope; clipped."""
    advantage = teacher - old
    if ADVANTAGE_CLIP is not None:
        bounded = tl.minimum(tl.maximum(advantage, -ADVANTAGE_CLIP), ADVANTAGE_CLIP)
        advantage = tl.where(advantage == advantage, bounded, advantage)
    log_ratio = new - old
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0))
    loss = -advantage * ratio
    slope = tl.where(tl.abs(log_ratio) <= 20.0, loss, 0.0)
    clipped = loss != loss
    if PPO:
        held = -advantage * tl.minimum(tl.maximum(ratio, 1.0 - CLIP_LOW), 1.0 + CLIP_HIGH)
        clipped = held > loss
        slope = tl.where(clipped, 0.0, slope)
        loss = tl.maximum(loss, held)
        ceiling = -advantage * CLIP_C
        dual = (advantage < 0.0) & (loss > ceiling)
        slope = tl.where(dual, 0.0, slope)
        loss = tl.where(dual, ceiling, loss)
    # Minima and maxima drop NaN; a NaN input must not become a number.
    bad = (log_ratio != log_ratio) | (advantage != advantage)
    loss = tl.where(bad, float("nan"), loss)
    return loss, tl.where(bad, float("nan"), slope), clipped


@triton.jit
def _divergence_loss(new, teacher, ESTIMATOR: tl.constexpr):
    """k1, k2, k3 of the reverse KL (Schulman 2020), with verl's clamps; and the slope."""
    log_ratio = new - teacher
    if ESTIMATOR == "k1":
        loss = log_ratio
        slope = log_ratio * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        loss = 0.5 * log_ratio * log_ratio
        slope = log_ratio
    else:
        bounded = tl.minimum(tl.maximum(-log_ratio, -20.0), 20.0)
        ratio = tl.exp(bounded)
        loss = ratio - bounded - 1.0
        passes = (tl.abs(log_ratio) <= 20.0) & (loss <= 10.0)
        slope = tl.where(passes, 1.0 - ratio, 0.0)
        loss = tl.minimum(loss, 10.0)
        slope = tl.where(log_ratio == log_ratio, slope, log_ratio)
        loss = tl.where(log_ratio == log_ratio, loss, log_ratio)
    return loss, slope


@triton.jit
def _position_loss(
    new,
    old,
    teacher,
    ESTIMATOR: tl.constexpr,
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    CLIP_C: tl.constexpr,
    ADVANTAGE_CLIP: tl.constexpr,
):
    """L of each row, dL/d logp, and whether PPO's clip is active."""
    if ESTIMATOR == "given":
        return teacher, tl.full(teacher.shape, 1.0, tl.float32), teacher != teacher
    if ESTIMATOR == "ppo" or ESTIMATOR == "importance":
        return _ratio_loss(
            new, old, teacher, CLIP_LOW, CLIP_HIGH, CLIP_C, ADVANTAGE_CLIP, ESTIMATOR == "ppo"
        )
    value, slope = _divergence_loss(new, teacher, ESTIMATOR)
    return value, slope, value != value


@triton.jit
def _store_metrics(
    metrics_out,
    n_valid,
    raw,
    weight,
    square,
    weight_min,
    weight_max,
    drift_abs,
    drift,
    clipped,
    kl,
    unit,  # of the weights, whose squares are summed
):
    """Reduce the lanes' sums over the valid rows, in the order of METRICS."""
    over = 1.0 / tl.maximum(n_valid, 1.0)
    total = tl.sum(weight, 0)
    largest = tl.where(n_valid > 0.0, tl.max(weight_max, 0), 0.0)
    squares = tl.sum(square, 0)
    share = total / unit
    tl.store(metrics_out + 0, tl.sum(raw, 0) * over)
    # Minima and maxima drop NaN, the sum keeps it.
    lowest = tl.where(total == total, tl.min(weight_min, 0), total)
    tl.store(metrics_out + 1, tl.where(n_valid > 0.0, lowest, 0.0))
    tl.store(metrics_out + 2, tl.where(total == total, largest, total))
    tl.store(metrics_out + 3, tl.where(squares == 0.0, 0.0, share / squares * share * over))
    tl.store(metrics_out + 4, tl.sum(drift_abs, 0) * over)
    tl.store(metrics_out + 5, tl.sum(drift, 0) * over)
    tl.store(metrics_out + 6, tl.sum(clipped, 0) * over)
    tl.store(metrics_out + 7, tl.sum(kl, 0) * over)
    tl.store(metrics_out + 8, n_valid)


@triton.jit
def _sampled_token(
    log_probs,  # [N] float32
    old_log_probs,  # [N] float32, or None
    teacher_log_probs,  # [N] float32; ESTIMATOR "given": L itself; None: the gate alone is wanted
    valid,  # [N] uint8
    blocks,  # [2 or 4, N] float32 from row_blocks, or None where neither gate nor counts are
    cu_seqlens,  # [n_sequences + 1], or None
    loss_out,  # [] float32
    rows_out,  # [4, N] float32: weight, token loss, slope, coefficient; [1, N] without a loss
    metrics_out,  # [len(METRICS)] float32
    n_rows,
    length,
    n_sequences,
    tau,
    factor,  # of the sum over rows
    GATE: tl.constexpr,  # "off", "given" (in blocks), or over what the mean is 1: "none",
    #                      "batch", "sequence"
    ESTIMATOR: tl.constexpr,
    DENOMINATOR: tl.constexpr,  # what else divides the sum: "given", "tokens", "sequences"
    TOKEN_MEAN: tl.constexpr,  # each sequence's sum divided by its valid rows
    CLIP_LOW: tl.constexpr,
    CLIP_HIGH: tl.constexpr,
    CLIP_C: tl.constexpr,
    ADVANTAGE_CLIP: tl.constexpr,  # or None
    TILE: tl.constexpr,
):
    lane = tl.arange(0, TILE)
    n_valid = _count(valid, n_rows, TILE)
    if DENOMINATOR == "tokens":
        factor = factor / tl.maximum(n_valid, 1.0)
    elif DENOMINATOR == "sequences":
        factor = factor / tl.maximum(_count(blocks + 3 * n_rows, n_rows, TILE), 1.0)
    shift = 0.0
    mean = 1.0
    unit = 1.0
    if GATE == "batch":
        shift, mean = _gate_mean(blocks + n_rows, valid, 0, n_rows, tau, TILE)
    elif GATE == "none" or GATE == "given":
        unit = _unit(blocks + n_rows, valid, n_rows, tau, GATE == "given", TILE)
    inverse = 1.0 / unit

    loss_sum = tl.zeros([TILE], tl.float32)
    raw_sum = tl.zeros([TILE], tl.float32)
    weight_sum = tl.zeros([TILE], tl.float32)
    square_sum = tl.zeros([TILE], tl.float32)
    drift_sum = tl.zeros([TILE], tl.float32)
    drift_abs = tl.zeros([TILE], tl.float32)
    clipped_sum = tl.zeros([TILE], tl.float32)
    kl_sum = tl.zeros([TILE], tl.float32)
    weight_min = tl.full([TILE], float("inf"), tl.float32)
    weight_max = tl.full([TILE], float("-inf"), tl.float32)

    for group in range(0, n_sequences if GATE == "sequence" else 1):
        lo = 0
        hi = n_rows
        if GATE == "sequence":
            lo = group * length
            hi = lo + length
            if cu_seqlens is not None:
                lo = tl.load(cu_seqlens + group).to(tl.int32)
                hi = tl.load(cu_seqlens + group + 1).to(tl.int32)
            shift, mean = _gate_mean(blocks + n_rows, valid, lo, hi, tau, TILE)
        for start in range(lo, hi, TILE):
            row = start + lane
            inside = row < hi
            live = tl.load(valid + row, mask=inside, other=0) != 0
            new = tl.load(log_probs + row, mask=live, other=0.0)
            old = new
            if old_log_probs is not None:
                old = tl.load(old_log_probs + row, mask=live, other=0.0)
            raw = tl.full([TILE], 1.0, tl.float32)
            weight = raw
            if GATE == "given":
                weight = tl.load(blocks + n_rows + row, mask=live, other=0.0)
                raw = weight
            elif GATE != "off":
                a = tl.load(blocks + n_rows + row, mask=live, other=0.0)
                raw = tl.exp(-tau * a)
                weight = tl.exp(-tau * (a - shift)) / mean
            weight = tl.where(live, weight, 0.0)
            tl.store(rows_out + row, weight, mask=inside)

            drift = tl.zeros([TILE], tl.float32)
            if old_log_probs is not None:
                drift = tl.where(live, old - new, 0.0)
            raw_sum += tl.where(live, raw, 0.0)
            weight_sum += weight
            share = weight * inverse
            square_sum += share * share
            weight_min = tl.minimum(weight_min, tl.where(live, weight, float("inf")))
            weight_max = tl.maximum(weight_max, tl.where(live, weight, float("-inf")))
            drift_sum += drift
            drift_abs += tl.abs(drift)
            kl_sum += tl.clamp(drift, -20.0, 20.0, propagate_nan=tl.PropagateNan.ALL)

            if teacher_log_probs is not None:
                teacher = tl.load(teacher_log_probs + row, mask=live, other=0.0)
                value, slope, clipped = _position_loss(
                    new, old, teacher, ESTIMATOR, CLIP_LOW, CLIP_HIGH, CLIP_C, ADVANTAGE_CLIP
                )
                # NaN, which `clipped` is where nothing is clipped, is not.
                clipped_sum += (clipped & (value == value) & live).to(tl.float32)
                value = tl.where(live, weight * value, 0.0)
                slope = tl.where(live, weight * slope, 0.0)
                coefficient = tl.where(live, factor, 0.0)
                if TOKEN_MEAN:
                    in_sequence = tl.load(blocks + 2 * n_rows + row, mask=live, other=1.0)
                    coefficient = coefficient / (in_sequence + 1e-8)
                loss_sum += value * coefficient
                tl.store(rows_out + n_rows + row, value, mask=inside)
                tl.store(rows_out + 2 * n_rows + row, slope, mask=inside)
                tl.store(rows_out + 3 * n_rows + row, coefficient, mask=inside)

    tl.store(loss_out, tl.sum(loss_sum, 0))
    _store_metrics(
        metrics_out, n_valid, raw_sum, weight_sum, square_sum, weight_min, weight_max,
        drift_abs, drift_sum, clipped_sum, kl_sum, unit,
    )  # fmt: skip


def sampled_token(
    log_probs: Tensor,  # [N] float32
    old_log_probs: Tensor | None,  # [N] float32
    teacher_log_probs: Tensor | None,  # [N] float32, or with "given" L itself; None: the gate alone
    valid: Tensor,  # [N] bool
    blocks: Tensor | None,  # [2 or 4, N] float32, from row_blocks
    cu_seqlens: Tensor | None,  # [B + 1]
    length: int,  # rows of a sequence where cu_seqlens is None
    tau: float,
    normalize: str,  # "batch", "sequence", "none"; "off": no gate; "given": weights in blocks
    estimator: str,
    clip_low: float,
    clip_high: float,
    clip_c: float,
    advantage_clip: float | None,
    factor: float,
    denominator: str,  # "given", "tokens", "sequences"
    token_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss [], rows [4, N]: weight, token loss, slope, coefficient, metrics [9]).

    One launch; all float32. `rows` has its first row alone where no teacher is given.
    """
    n_rows = log_probs.shape[0]
    new = dict(dtype=torch.float32, device=log_probs.device)
    loss, metrics = torch.empty((), **new), torch.empty(len(METRICS), **new)
    rows = torch.empty(1 if teacher_log_probs is None else 4, n_rows, **new)
    packed = cu_seqlens is not None
    _sampled_token[(1,)](
        log_probs, old_log_probs, teacher_log_probs, valid.view(torch.uint8), blocks, cu_seqlens,
        loss, rows, metrics, n_rows, length,
        cu_seqlens.shape[0] - 1 if packed else n_rows // max(length, 1), tau, factor,
        GATE=normalize, ESTIMATOR=estimator, DENOMINATOR=denominator, TOKEN_MEAN=token_mean,
        CLIP_LOW=clip_low, CLIP_HIGH=clip_high, CLIP_C=clip_c, ADVANTAGE_CLIP=advantage_clip,
        TILE=min(TILE, max(128, triton.next_power_of_2(n_rows))), num_warps=NUM_WARPS,
    )  # fmt: skip
    return loss, rows, metrics
