"""Sums over rows that are measured in parts: block drift, and what the unit mean needs of gates.

Squares of large drifts overflow, and so do gates of negative exponents: parts are measured in units
of their own, and joined in the larger one's. Minima and maxima drop NaN; the totals keep it.
"""

import triton
import triton.language as tl

from .common import LARGEST_DRIFT


@triton.jit
def measure(d, member, AXIS: tl.constexpr, AGGREGATE: tl.constexpr):
    """A tile's part of an aggregate: (total, largest); that of "rms" is in units of `largest`."""
    tl.static_assert(
        AGGREGATE == "mean" or AGGREGATE == "mean_abs" or AGGREGATE == "rms"
        or AGGREGATE == "max_abs", "unknown aggregate",
    )  # fmt: skip
    size = tl.where(member, tl.abs(d), 0.0)
    largest = tl.max(size, AXIS)
    if AGGREGATE == "mean":
        total = tl.sum(tl.where(member, d, 0.0), AXIS)
    elif AGGREGATE == "mean_abs":
        total = tl.sum(size, AXIS)
    elif AGGREGATE == "max_abs":
        total = tl.sum(tl.where(size == size, 0.0, size), AXIS)
    else:
        share = size / tl.expand_dims(_unit(largest), AXIS)
        total = tl.sum(share * share, AXIS)
    return total, largest


@triton.jit
def _unit(largest):
    """What squares of drifts up to `largest` are summed in."""
    return tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)


@triton.jit
def rescaled(total, largest, top, AGGREGATE: tl.constexpr):
    """A total that was measured beside `largest`, in the units of `top`."""
    if AGGREGATE == "rms":
        share = _unit(largest) / _unit(top)
        total = tl.where(total == 0.0, 0.0, total * share * share)
    return total


@triton.jit
def joined(total, largest, other, other_largest, AGGREGATE: tl.constexpr):
    """(total, largest) of two parts together."""
    top = tl.maximum(largest, other_largest)
    mine = rescaled(total, largest, top, AGGREGATE)
    return mine + rescaled(other, other_largest, top, AGGREGATE), top


@triton.jit
def aggregated(total, largest, count, AGGREGATE: tl.constexpr):
    """|aggregate| of `count` rows."""
    over = tl.maximum(count.to(tl.float32), 1.0)
    if AGGREGATE == "mean":
        a = tl.abs(total / over)
    elif AGGREGATE == "mean_abs":
        a = total / over
    elif AGGREGATE == "max_abs":
        a = largest + total
    else:
        a = _unit(largest) * tl.sqrt(total / over)
    return a


@triton.jit
def held(a, HELD: tl.constexpr):
    """Where a call is a part of its batch, an infinite drift stays apart from no drift at all."""
    if HELD:
        MOST: tl.constexpr = LARGEST_DRIFT
        a = tl.where(a > MOST, MOST, a)
    return a


@triton.jit
def gate_beside(a, lowest, tau):
    """exp(-tau (a - lowest)), and 1 where they are equal, be it infinity."""
    return tl.where(a == lowest, 1.0, tl.exp(-tau * (a - lowest)))


@triton.jit
def gates_of(a, live, tau):
    """Smallest a of the live rows, the sum of their gates beside it, and how many they are."""
    lowest = tl.min(tl.where(live, a, float("inf")), 0)
    gates = tl.where(live, gate_beside(a, lowest, tau), 0.0)
    return lowest, tl.sum(gates, 0), tl.sum(live.to(tl.int32), 0)


@triton.jit
def gates_joined(lowest, total, count, other_lowest, other_total, other_count, tau):
    """What two sets of rows leave for the unit mean, put together; see `store_part`."""
    low = tl.minimum(lowest, other_lowest)
    mine = tl.where(count == 0, 0.0, total * gate_beside(lowest, low, tau))
    other = tl.where(other_count == 0, 0.0, other_total * gate_beside(other_lowest, low, tau))
    return low, mine + other, count + other_count


@triton.jit
def store_part(parts, n_parts, part, lowest, total, count, begun):
    """A program's column of parts [4, n_parts] float32: smallest a, gates beside it, rows, and
    sequences of which it has the first valid row. A program has fewer than 2^24 rows."""
    tl.store(parts + part, lowest)
    tl.store(parts + n_parts + part, total)
    tl.store(parts + 2 * n_parts + part, count.to(tl.float32))
    tl.store(parts + 3 * n_parts + part, begun.to(tl.float32))
