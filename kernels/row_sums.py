"""What a call's rows add up to: the loss, the metrics and the totals.

A program of `_sampled_token` leaves its tile's sums in a column of [SUMS, programs], and `_total`
adds the columns up in their order: no atomics, no host. Where one program has all rows it concludes
by itself.
"""

import triton
import triton.language as tl

from .common import LARGEST_DRIFT, TINY

METRICS = (
    "gate_mean_raw",
    "gate_min",
    "gate_max",
    "gate_ess",
    "drift_abs",
    "drift_signed",
    "pg_clipfrac",
    "ppo_kl",
    "drift_noise",
    "valid_tokens",
    "floored",
)
SUMS = tl.constexpr(14)  # rows of a column of `sums`; see `statistics_of`
WHOLE = tl.constexpr(3)  # numbers of the whole call that follow the columns


@triton.jit
def statistics_of(
    raw, weight, drift, live, seen, loss, clipped, floored, noise, GATE: tl.constexpr
):
    """What a tile's rows leave: loss, raw, share, squares, unit, least, most, |drift|, drift,
    clipped, kl, floored, measured, noise. share, squares: of the weights in units of `unit`."""
    TINY_: tl.constexpr = TINY
    unit = 1.0
    if GATE == "given" or GATE == "none":  # squares of small weights may be none of float32's
        unit = tl.max(weight, 0)
    share = weight / tl.where(unit < TINY_, 1.0, unit)
    kl = tl.clamp(drift, -20.0, 20.0, propagate_nan=tl.PropagateNan.ALL)
    return (
        tl.sum(loss, 0),
        tl.sum(raw, 0),
        tl.sum(share, 0),
        tl.sum(share * share, 0),
        unit,
        tl.min(tl.where(live, weight, float("inf")), 0),
        tl.max(tl.where(live, weight, float("-inf")), 0),
        tl.sum(tl.abs(drift), 0),
        tl.sum(drift, 0),
        tl.sum(clipped.to(tl.float32), 0),
        tl.sum(kl, 0),
        tl.sum(floored.to(tl.float32), 0),
        tl.sum(seen.to(tl.float32), 0),
        tl.sum(noise, 0),
    )


@triton.jit
def conclude(
    out,  # [1 + len(METRICS)] float32: the loss, the metrics
    totals,  # [4] float64: peak, log_mean, tokens, size
    statistics,
    n_valid,
    begun,
    lowest,
    tau,
    GATE: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    HELD: tl.constexpr,
    SAMPLED: tl.constexpr,  # not all valid rows are measured
):
    """Store what the sums over all rows give."""
    (
        loss, raw, share, squares, _, least, most, drift_abs, drift, clipped, kl, floored, seen,
        noise,
    ) = statistics  # fmt: skip
    some = n_valid > 0
    over = 1.0 / tl.maximum(n_valid.to(tl.float32), 1.0)
    over_drifts = over
    if SAMPLED:
        over_drifts = 1.0 / tl.maximum(seen, 1.0)
    # Minima and maxima drop NaN, the sum keeps it.
    known = share == share
    least = tl.where(some, tl.where(known, least, share), 0.0)
    most = tl.where(some, tl.where(known, most, share), 0.0)
    tl.store(out, loss)
    tl.store(out + 1, raw * over)
    tl.store(out + 2, least)
    tl.store(out + 3, most)
    tl.store(out + 4, tl.where(squares == 0.0, 0.0, share / squares * share * over))
    tl.store(out + 5, drift_abs * over_drifts)
    tl.store(out + 6, drift * over_drifts)
    tl.store(out + 7, clipped * over)
    tl.store(out + 8, kl * over_drifts)
    tl.store(out + 9, noise * over_drifts)
    tl.store(out + 10, n_valid.to(tl.float32))
    tl.store(out + 11, floored)
    peak = n_valid.to(tl.float64) * 0.0  # `most` may be NaN
    log_mean = peak
    if GATE == "batch":
        INFINITE: tl.constexpr = LARGEST_DRIFT
        peak = -(lowest.to(tl.float64) * tau)
        if HELD:
            peak = tl.where(lowest == INFINITE, float("-inf"), peak)
        peak = tl.where(some, tl.where(known, peak, share.to(tl.float64)), 0.0)
        log_mean = tl.where(some, -tl.log(most.to(tl.float64)), 0.0)
    size = n_valid
    if DENOMINATOR == "sequences":
        size = begun
    tl.store(totals, peak)
    tl.store(totals + 1, log_mean)
    tl.store(totals + 2, n_valid.to(tl.float64))
    tl.store(totals + 3, size.to(tl.float64))


@triton.jit
def leave(sums, statistics, n_valid, begun, lowest):
    """Store a program's column of `sums`; the first program what is known of the whole call."""
    programs = tl.num_programs(0)
    program = tl.program_id(0)
    for i in tl.static_range(SUMS):
        tl.store(sums + i * programs + program, statistics[i])
    if program == 0:
        whole = sums + SUMS * programs
        tl.store(whole, n_valid.to(tl.float32, bitcast=True))
        tl.store(whole + 1, begun.to(tl.float32, bitcast=True))
        tl.store(whole + 2, lowest)


@triton.jit
def _total(
    left,  # as `_sampled_token` has it
    out,
    totals,
    n_parts,
    programs,
    tau,
    GATE: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    HELD: tl.constexpr,
    SAMPLED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up the columns that the programs left, and conclude."""
    sums = left + 4 * n_parts
    TINY_: tl.constexpr = TINY
    lane = tl.arange(0, WIDTH)
    number = tl.arange(0, 16)[:, None]
    units = tl.zeros([WIDTH], tl.float32)
    lows = tl.full([WIDTH], float("inf"), tl.float32)
    highs = tl.full([WIDTH], float("-inf"), tl.float32)
    for at in range(0, programs, WIDTH):
        column = sums + at + lane
        inside = at + lane < programs
        units = tl.maximum(units, tl.load(column + 4 * programs, mask=inside, other=0.0))
        low = tl.load(column + 5 * programs, mask=inside, other=float("inf"))
        high = tl.load(column + 6 * programs, mask=inside, other=float("-inf"))
        lows = tl.minimum(lows, low)
        highs = tl.maximum(highs, high)
    unit = tl.max(units, 0)
    added = tl.zeros([16, WIDTH], tl.float32)
    for at in range(0, programs, WIDTH):
        column = (at + lane)[None, :]
        inside = (column < programs) & (number < SUMS)
        x = tl.load(sums + number * programs + column, mask=inside, other=0.0)
        mine = tl.load(sums + 4 * programs + column, mask=column < programs, other=0.0)
        scale = tl.where(mine < TINY_, 1.0, mine) / tl.where(unit < TINY_, 1.0, unit)
        x *= tl.where(number == 2, scale, tl.where(number == 3, scale * scale, 1.0))
        added += x
    sums_of_rows = tl.sum(added, 1)
    one = tl.arange(0, 16)
    statistics = (
        tl.sum(tl.where(one == 0, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 1, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 2, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 3, sums_of_rows, 0.0), 0),
        unit,
        tl.min(lows, 0),
        tl.max(highs, 0),
        tl.sum(tl.where(one == 7, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 8, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 9, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 10, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 11, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 12, sums_of_rows, 0.0), 0),
        tl.sum(tl.where(one == 13, sums_of_rows, 0.0), 0),
    )
    whole = sums + SUMS * programs
    n_valid = tl.load(whole).to(tl.int32, bitcast=True)
    begun = tl.load(whole + 1).to(tl.int32, bitcast=True)
    conclude(
        out, totals, statistics, n_valid, begun, tl.load(whole + 2), tau, GATE, DENOMINATOR, HELD,
        SAMPLED,
    )  # fmt: skip
