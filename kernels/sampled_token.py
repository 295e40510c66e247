"""`sampled_token`: gate, unit mean, position loss and its slope, reduction and metrics.

    g_t = exp(-tau a_t)                     a_t: block drift, from `row_blocks`
    w_t = g_t / mean_valid(g)               over the batch or the sequence, or not at all
    token_loss_t = v_t w_t L_t              v_t: the caller's row weights; L_t: see `position.py`
    loss = sum_t coefficient_t token_loss_t

Before the exponential the smallest a_t is subtracted: it cancels in w, and then no drift, however
large, makes w 0/0. `slope_t = d token_loss_t / d logp_t` is all that the backward needs.

A program takes a tile of rows. What is summed over all rows is in `row_sums.py`. What must be known
of all rows in advance (the unit mean, D) comes from the `parts` of `row_blocks`, or from
`_sequence_gates` where the mean is over sequences.
"""

import triton
import triton.language as tl

from .aggregates import gate_beside, gates_joined, gates_of
from .blocks import borders_of
from .position import position_loss
from .row_sums import conclude, leave, statistics_of


@triton.jit
def _whole(parts, n_parts, tau, WIDTH: tl.constexpr):
    """Of all rows: smallest a, mean gate beside it, valid rows, sequences with any."""
    lane = tl.arange(0, WIDTH)
    lowest = tl.full([WIDTH], float("inf"), tl.float32)
    count = tl.zeros([WIDTH], tl.int32)
    begun = tl.zeros([WIDTH], tl.int32)
    for at in range(0, n_parts, WIDTH):
        inside = at + lane < n_parts
        part = parts + at + lane
        lowest = tl.minimum(lowest, tl.load(part, mask=inside, other=float("inf")))
        count += tl.load(part + 2 * n_parts, mask=inside, other=0.0).to(tl.int32)
        begun += tl.load(part + 3 * n_parts, mask=inside, other=0.0).to(tl.int32)
    low = tl.min(lowest, 0)
    total = tl.zeros([WIDTH], tl.float32)
    for at in range(0, n_parts, WIDTH):
        inside = at + lane < n_parts
        part = parts + at + lane
        least = tl.load(part, mask=inside, other=float("inf"))
        gates = tl.load(part + n_parts, mask=inside, other=0.0)
        rows = tl.load(part + 2 * n_parts, mask=inside, other=0.0)
        total += tl.where(rows == 0.0, 0.0, gates * gate_beside(least, low, tau))
    n_valid = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(n_valid.to(tl.float32), 1.0)
    return low, mean, n_valid, tl.sum(begun, 0)


@triton.jit
def _sequence_gates(
    valid,  # [N] uint8
    cu_seqlens,  # [n_sequences + 1], or None
    gates,  # [N] float32: block drift; becomes the weight, whose mean over the sequence is 1
    n_rows,
    length,
    raw_at,  # exp(-tau a) is left so many numbers beyond
    tau,
    TILE: tl.constexpr,
):
    """Unit mean over each sequence, one a program; valid rows alone are read and written."""
    lo, hi = borders_of(tl.program_id(0), cu_seqlens, n_rows, length)
    lowest = float("inf")
    total = 0.0
    count = lo * 0
    for at in range(lo, hi, TILE):
        row = at + tl.arange(0, TILE)
        live = tl.load(valid + row, mask=row < hi, other=0) != 0
        a = tl.load(gates + row, mask=live, other=0.0)
        least, here, rows = gates_of(a, live, tau)
        lowest, total, count = gates_joined(lowest, total, count, least, here, rows, tau)
    mean = total / tl.maximum(count.to(tl.float32), 1.0)
    for at in range(lo, hi, TILE):
        row = at + tl.arange(0, TILE)
        live = tl.load(valid + row, mask=row < hi, other=0) != 0
        a = tl.load(gates + row, mask=live, other=0.0)
        tl.store(gates + raw_at + row, tl.exp(-tau * a), mask=live)
        tl.store(gates + row, tl.exp(-tau * (a - lowest)) / mean, mask=live)


@triton.jit
def _weights(given, table, drift_at, row, live, tau, lowest, mean, GATE: tl.constexpr):
    """Raw gate and weight of each row; see `_sampled_token`."""
    tl.static_assert(
        GATE == "off" or GATE == "given" or GATE == "none" or GATE == "batch"
        or GATE == "sequence", "unknown normalisation",
    )  # fmt: skip
    if GATE == "off":
        raw = tl.full(live.shape, 1.0, tl.float32)
        weight = raw
    elif GATE == "given":
        raw = tl.load(given + row, mask=live, other=0.0)
        weight = raw
    elif GATE == "sequence":
        raw = tl.load(table + drift_at + row, mask=live, other=0.0)
        weight = tl.load(table + row, mask=live, other=0.0)
        tl.debug_barrier()  # the drift will stand where raw gates did
    else:
        a = tl.load(table + row, mask=live, other=0.0)
        raw = tl.exp(-tau * a)
        weight = raw
        if GATE == "batch":
            weight = tl.exp(-tau * (a - lowest)) / mean
    return tl.where(live, raw, 0.0), tl.where(live, weight, 0.0)


@triton.jit
def _row_loss(
    now, old, target, row_weights, table, row, inside, live, n_rows, weight, coefficient,
    clip_low, clip_high, dual, advantage_low, advantage_high, floor,
    ESTIMATOR: tl.constexpr, ADVANTAGE: tl.constexpr, UNIT_RATIO: tl.constexpr,
    CLAMP: tl.constexpr, TOKEN_MEAN: tl.constexpr,
):  # fmt: skip
    """Fill in rows 1 to 3 of the table; losses, and which were clipped and floored."""
    log_ratio = now - old
    if UNIT_RATIO:
        log_ratio = tl.load(table + n_rows + row, mask=live, other=0.0)
    x = tl.load(target + row, mask=live, other=0.0)
    floored = live & (x < floor)
    x = tl.where(floored, floor, x)
    value, slope, clipped = position_loss(
        now, old, log_ratio, x, clip_low, clip_high, dual, advantage_low, advantage_high,
        ESTIMATOR, ADVANTAGE, CLAMP,
    )  # fmt: skip
    # NaN, which `clipped` is where nothing is clipped, is not.
    clipped = clipped & (value == value) & live
    value = tl.where(live, weight * value, 0.0)
    slope = tl.where(live, weight * slope, 0.0)
    if row_weights is not None:
        v = tl.load(row_weights + row, mask=live, other=0.0)
        value = tl.where(v == 0.0, 0.0, v * value)
        slope = tl.where(v == 0.0, 0.0, v * slope)
    if TOKEN_MEAN:
        in_sequence = tl.load(table + 3 * n_rows + row, mask=live, other=1.0)
        coefficient = coefficient / (in_sequence + 1e-8)
    coefficient = tl.where(live, coefficient, 0.0)
    tl.store(table + n_rows + row, value, mask=inside)
    tl.store(table + 2 * n_rows + row, slope, mask=inside)
    tl.store(table + 3 * n_rows + row, coefficient, mask=inside)
    return value * coefficient, clipped, floored


@triton.jit
def _coefficient(factor, n_valid, begun, DENOMINATOR: tl.constexpr):
    """The factor over the denominator that was counted."""
    tl.static_assert(
        DENOMINATOR == "given" or DENOMINATOR == "tokens" or DENOMINATOR == "sequences",
        "unknown denominator",
    )
    if DENOMINATOR == "tokens":
        factor = factor / tl.maximum(n_valid.to(tl.float32), 1.0)
    elif DENOMINATOR == "sequences":
        factor = factor / tl.maximum(begun.to(tl.float32), 1.0)
    return factor


@triton.jit
def _spaced(z, scale, BITS: tl.constexpr):
    """How far apart logits lie at z, with BITS of the mantissa beside its leading one; 0 at
    infinities. What is left of a number without its mantissa is the power of two below it."""
    SHARE: tl.constexpr = 2.0**-BITS
    size = tl.abs(z / scale) * (1.0 + 2.0**-13)
    power = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(size == float("inf"), 0.0, power * SHARE * scale)


@triton.jit
def _noise(now, maximum, log_sum, row, seen, scale, BITS: tl.constexpr):
    """The mean |drift| of each row that rounding of the logits alone would show, see
    `drift_gate/passes/rules.py`, Spacing; 0 where no drift is seen."""
    top = tl.load(maximum + row, mask=seen, other=0.0)
    log_s = tl.load(log_sum + row, mask=seen, other=0.0)
    p = tl.exp(now)
    largest = tl.exp(-log_s)
    beside = tl.where(now + log_s > -1e-4, 0.0, largest)
    rest = tl.maximum(1.0 - p - beside, 0.0)
    squares = tl.minimum(rest * rest / 3.0, largest * rest) + beside * beside
    own = _spaced(now + top + log_s, scale, BITS) * (1.0 - p)
    others = _spaced(top, scale, BITS)
    return tl.where(seen, tl.sqrt(own * own + others * others * squares) / 3.0, 0.0)


@triton.jit
def _sampled_token(
    now,  # [N] float32
    old,  # [N] float32, or None
    target,  # [N] float32: see `position.py`; None: the weights alone are wanted
    valid,  # [N] uint8
    measured,  # [N] uint8: which of the valid rows have a drift; None: all
    given,  # [N] float32: the weights with GATE "given"
    row_weights,  # [N] float32, or None
    maximum,  # [N] float32, as the next, of the logits that `now` is of; None: nothing is rounded
    log_sum,  # [N] float32
    first,  # [N] int32: with BLOCKS first valid row of each valid row's block; all rows are written
    table,  # [5, N] float32: weight, token loss, slope, coefficient, drift; [2, N] without target.
    #         Before: block drift in row 0 (GATE "sequence": weights, and raw gates in the last),
    #         log-ratios in row 1, valid rows of the sequence in row 3
    left,  # float32: with PARTS [4, n_parts] from `row_blocks`; then, where there are several
    #        programs, [SUMS, programs] and WHOLE numbers for `_total`
    out,  # as `conclude` has it
    totals,
    n_rows,
    n_parts,
    tau,
    factor,  # of the sum over rows
    clip_low,  # bounds of the ratio
    clip_high,
    dual,
    advantage_low,
    advantage_high,
    floor,
    scale,  # of the logits
    BITS: tl.constexpr,  # of their mantissa
    GATE: tl.constexpr,  # "off", "given", or over what the mean is 1: "none", "batch", "sequence"
    BLOCKS: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    ADVANTAGE: tl.constexpr,
    UNIT_RATIO: tl.constexpr,  # log-ratios stand in the table
    CLAMP: tl.constexpr,
    DENOMINATOR: tl.constexpr,  # what else divides the sum: "given", "tokens", "sequences"
    TOKEN_MEAN: tl.constexpr,  # each sequence's sum divided by its valid rows
    HELD: tl.constexpr,  # an infinite drift is `LARGEST_DRIFT`
    PARTS: tl.constexpr,  # else one program has all rows
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < n_rows
    live = tl.load(valid + row, mask=inside, other=0) != 0
    if PARTS:
        lowest, mean, n_valid, begun = _whole(left, n_parts, tau, WIDTH)
    else:
        tl.static_assert(GATE == "off" or GATE == "given", "gates need the parts of row_blocks")
        tl.static_assert(DENOMINATOR != "sequences" and not TOKEN_MEAN, "nobody counted sequences")
        lowest, mean, n_valid, begun = 0.0, 1.0, tl.sum(live.to(tl.int32), 0), 0
    drift_at = (1 if target is None else 4) * n_rows
    new = tl.load(now + row, mask=live, other=0.0)
    before = new
    drift = tl.zeros([TILE], tl.float32)
    seen = live
    if old is not None:
        before = tl.load(old + row, mask=live, other=0.0)
        drift = before - new
        if measured is not None:
            seen = tl.load(measured + row, mask=live, other=0) != 0
            drift = tl.where(seen, drift, 0.0)
    noise = tl.zeros([TILE], tl.float32)
    if maximum is not None:
        noise = _noise(new, maximum, log_sum, row, seen, scale, BITS)
    raw, weight = _weights(given, table, drift_at, row, live, tau, lowest, mean, GATE)
    loss = tl.zeros([TILE], tl.float32)
    clipped = loss
    floored = loss
    if target is not None:
        loss, clipped, floored = _row_loss(
            new, before, target, row_weights, table, row, inside, live, n_rows, weight,
            _coefficient(factor, n_valid, begun, DENOMINATOR), clip_low, clip_high, dual,
            advantage_low, advantage_high, floor, ESTIMATOR, ADVANTAGE, UNIT_RATIO, CLAMP,
            TOKEN_MEAN,
        )  # fmt: skip
    tl.store(table + row, weight, mask=inside)
    shown = drift
    if measured is not None:
        shown = tl.where(live & ~seen, float("nan"), drift)
    tl.store(table + drift_at + row, shown, mask=inside)
    if BLOCKS:
        tl.store(first + row, tl.full([TILE], -1, tl.int32), mask=inside & (live == 0))
    else:
        tl.store(first + row, tl.where(live, row, -1), mask=inside)
    statistics = statistics_of(raw, weight, drift, live, seen, loss, clipped, floored, noise, GATE)
    if tl.num_programs(0) == 1:
        conclude(
            out, totals, statistics, n_valid, begun, lowest, tau, GATE, DENOMINATOR, HELD,
            measured is not None,
        )  # fmt: skip
    else:
        leave(left + 4 * n_parts, statistics, n_valid, begun, lowest)
