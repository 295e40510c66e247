"""`row_blocks`: policy drift, reduced over the block of every row (arXiv 2606.24084).

    d_t = old_logp_t - logp_t              drift of row t
    a_t = | aggregate of d over the measured rows of t's block |: all valid ones, or some of them
    r_t = exp(- mean of d over them)       the block's ratio (GSPO, arXiv 2507.18071)

A block here is an interval of rows inside one sequence: `size` rows counted from the sequence's
first valid row, or the whole sequence; `spans.py` has the other kind. One program takes one block
after the other, so that each row is read once or twice however long its block is, the sums have a
fixed order, and all rows of a block get the same bits. Where each row is a block ("token"), one
program takes many.

Each program also leaves what the unit mean needs of its rows: the smallest a, the sum of
exp(-tau (a - smallest)), how many they are, and how many sequences begin with it. `sampled_token`
puts those of all programs together, so nothing has to wait for a scalar.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .aggregates import (
    aggregated,
    gate_beside,
    gates_joined,
    gates_of,
    held,
    joined,
    measure,
    store_part,
)
from .common import ceil_div, power_of_2
from .launch import launch

FAR = tl.constexpr(2**31 - 1)  # beyond all rows


@triton.jit
def sequence_start(row, cu_seqlens, n_rows, length, n_sequences):
    """First row of each row's sequence."""
    if cu_seqlens is None:
        start = row // length * length
    else:  # the last border that is at most `row`, by bisection
        low = row * 0
        high = low + n_sequences
        left = tl.program_id(0) * 0 + n_sequences
        while left > 1:
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle).to(tl.int32) <= row
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
            left = (left + 1) // 2
        start = tl.load(cu_seqlens + low).to(tl.int32)
    return start


@triton.jit
def borders_of(sequence, cu_seqlens, n_rows, length):
    """First row of a sequence and the row after its last, within [0, n_rows]."""
    if cu_seqlens is None:
        start = sequence * length
        end = start + length
    else:
        start = tl.load(cu_seqlens + sequence).to(tl.int32)
        end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
    start = tl.minimum(tl.maximum(start, 0), n_rows)
    return start, tl.minimum(tl.maximum(end, start), n_rows)


@triton.jit
def _block_at(number, cu_seqlens, n_rows, length, n_sequences, size):
    """Sequence of a block, and the block's number in it; there may be more numbers than blocks.

    Sequence s, from row b_s on, has the numbers from b_s // size + s on: one more than enough.
    """
    if cu_seqlens is None:
        each = (length + size - 1) // size
        sequence = number // each
        block = number % each
    else:
        low = number * 0
        high = low + n_sequences
        while high - low > 1:
            middle = (low + high) // 2
            begin = tl.load(cu_seqlens + middle).to(tl.int32) // size + middle
            low = tl.where(begin <= number, middle, low)
            high = tl.where(begin <= number, high, middle)
        sequence = low
        block = number - (tl.load(cu_seqlens + low).to(tl.int32) // size + low)
    return sequence, block


@triton.jit
def _first_valid(valid, start, end, COUNT: tl.constexpr, WALK: tl.constexpr):
    """First valid row of a sequence, FAR without any; with COUNT how many it has, else 0."""
    FAR_: tl.constexpr = FAR
    first = start * 0 + FAR_
    count = start * 0
    at = start
    while at < end:
        j = at + tl.arange(0, WALK)
        live = tl.load(valid + j, mask=j < end, other=0) != 0
        first = tl.minimum(first, tl.min(tl.where(live, j, FAR_), 0))
        at += WALK
        if COUNT:
            count += tl.sum(live.to(tl.int32), 0)
        else:  # done as soon as one is found
            at = tl.where(first == FAR_, at, end)
    return first, count


@triton.jit
def _drift(now, old, valid, j, hi):
    """Drift of rows j before hi, 0 where not valid; and whether they are."""
    live = tl.load(valid + j, mask=j < hi, other=0) != 0
    d = tl.load(old + j, mask=live, other=0.0) - tl.load(now + j, mask=live, other=0.0)
    return d, live


@triton.jit
def _reduce(now, old, valid, measured, lo, hi, AGGREGATE: tl.constexpr, LANES: tl.constexpr):
    """Of the valid rows in [lo, hi): |aggregate| of those measured, mean drift, how many, and the
    first."""
    FAR_: tl.constexpr = FAR
    total = 0.0
    largest = 0.0
    signed = 0.0
    count = lo * 0
    drifts = count
    leader = count + FAR_
    at = lo
    while at < hi:
        j = at + tl.arange(0, LANES)
        d, live = _drift(now, old, valid, j, hi)
        seen = live
        if measured is not None:
            seen = tl.load(measured + j, mask=live, other=0) != 0
            drifts += tl.sum(seen.to(tl.int32), 0)
        here, top = measure(d, seen, 0, AGGREGATE)
        total, largest = joined(total, largest, here, top, AGGREGATE)
        signed += tl.sum(d, 0)
        count += tl.sum(live.to(tl.int32), 0)
        leader = tl.minimum(leader, tl.min(tl.where(live, j, FAR_), 0))
        at += LANES
    if measured is None:
        drifts = count
    mean = signed / tl.maximum(count.to(tl.float32), 1.0)
    return aggregated(total, largest, drifts, AGGREGATE), mean, count, leader


@triton.jit
def _token_gates(now, old, valid, lo, hi, tau, HELD: tl.constexpr, LANES: tl.constexpr):
    """Smallest |d| of the valid rows in [lo, hi), gates beside it, and how many rows."""
    lowest = float("inf")
    total = 0.0
    count = lo * 0
    at = lo
    while at < hi:
        d, live = _drift(now, old, valid, at + tl.arange(0, LANES), hi)
        least, here, rows = gates_of(held(tl.abs(d), HELD), live, tau)
        lowest, total, count = gates_joined(lowest, total, count, least, here, rows, tau)
        at += LANES
    return lowest, total, count


@triton.jit
def _write(now, old, valid, lo, hi, table, first, n_rows, a, mean, leader, in_sequence,
           TOKEN: tl.constexpr, GATE: tl.constexpr, RATIO: tl.constexpr, COUNT: tl.constexpr,
           HELD: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Give the valid rows in [lo, hi) what is known of their block and sequence."""
    zeros = tl.zeros([LANES], tl.float32)
    at = lo
    while at < hi:
        j = at + tl.arange(0, LANES)
        live = tl.load(valid + j, mask=j < hi, other=0) != 0
        if GATE:
            if TOKEN:
                d, _ = _drift(now, old, valid, j, hi)
                tl.store(table + j, held(tl.abs(d), HELD), mask=live)
                tl.store(first + j, j, mask=live)
            else:
                tl.store(table + j, zeros + a, mask=live)
                tl.store(first + j, tl.zeros([LANES], tl.int32) + leader, mask=live)
        if RATIO:
            tl.store(table + n_rows + j, zeros - mean, mask=live)
        if COUNT:
            tl.store(table + 3 * n_rows + j, zeros + in_sequence, mask=live)
        at += LANES


@triton.jit
def _row_blocks(
    now,  # [N] float32
    old,  # [N] float32, or None: neither drift nor ratio is wanted
    valid,  # [N] uint8
    measured,  # [N] uint8: which of the valid rows enter the block drift; None: all
    cu_seqlens,  # [n_sequences + 1] int32 or int64, or None: sequences of `length` rows
    table,  # [2 or 5, N] float32 out, of the valid rows: with GATE block drift in row 0, with
    #         RATIO their block's log-ratio in row 1, with COUNT rows of their sequence in row 3
    first,  # [N] int32 out: with GATE first valid row of each valid row's block
    parts,  # [4, n_parts] float32 out with TALLY or BEGUN: see `store_part`
    n_rows,
    length,
    n_sequences,
    n_blocks,
    size,  # rows a block at most
    each,  # blocks a program
    n_parts,
    first_part,  # column of `parts` of the first program
    tau,
    GRANULARITY: tl.constexpr,  # "token", "block", "sequence"
    AGGREGATE: tl.constexpr,  # "mean", "mean_abs", "rms", "max_abs"
    GATE: tl.constexpr,
    RATIO: tl.constexpr,
    COUNT: tl.constexpr,
    TALLY: tl.constexpr,  # valid rows are counted in `parts`
    BEGUN: tl.constexpr,  # sequences are
    HELD: tl.constexpr,
    LANES: tl.constexpr,
    WALK: tl.constexpr,
):
    TOKEN: tl.constexpr = GRANULARITY == "token"
    FROM_FIRST: tl.constexpr = GRANULARITY == "block"
    tl.static_assert(TOKEN or FROM_FIRST or GRANULARITY == "sequence", "unknown granularity")
    tl.static_assert(not TOKEN or not RATIO, "the ratio of a token needs no block")
    FAR_: tl.constexpr = FAR
    program = tl.program_id(0)
    lowest = float("inf")
    total = 0.0
    count = program * 0
    begun = program * 0
    for number in range(program * each, tl.minimum(program * each + each, n_blocks)):
        sequence, block = _block_at(number, cu_seqlens, n_rows, length, n_sequences, size)
        start, end = borders_of(sequence, cu_seqlens, n_rows, length)
        opening = start
        in_sequence = 0
        if FROM_FIRST or BEGUN or COUNT:
            opening, in_sequence = _first_valid(valid, start, end, COUNT, WALK)
            if BEGUN:
                begun += ((block == 0) & (opening != FAR_)).to(tl.int32)
        lo = start + block * size
        if FROM_FIRST:
            lo = tl.where(opening == FAR_, end, opening + block * size)
        hi = tl.minimum(lo + size, end)
        a = 0.0
        mean = 0.0
        leader = lo
        if (GATE and not TOKEN) or RATIO:
            a, mean, rows, leader = _reduce(now, old, valid, measured, lo, hi, AGGREGATE, LANES)
            a = held(a, HELD)
            if TALLY:
                least = tl.where(rows == 0, float("inf"), a)
                gates = rows.to(tl.float32) * gate_beside(a, a, tau)
                lowest, total, count = gates_joined(lowest, total, count, least, gates, rows, tau)
        elif TALLY and GATE:
            least, gates, rows = _token_gates(now, old, valid, lo, hi, tau, HELD, LANES)
            lowest, total, count = gates_joined(lowest, total, count, least, gates, rows, tau)
        elif TALLY:
            _, rows = _first_valid(valid, lo, hi, True, WALK)
            count += rows
        if GATE or RATIO or COUNT:
            _write(
                now, old, valid, lo, hi, table, first, n_rows, a, mean, leader, in_sequence,
                TOKEN, GATE, RATIO, COUNT, HELD, LANES,
            )  # fmt: skip
    if TALLY or BEGUN:
        store_part(parts, n_parts, first_part + program, lowest, total, count, begun)


class Unit(NamedTuple):
    """What drift is reduced over, and what for."""

    granularity: str  # "token" (or no reduction at all), "block", "span", "sequence"
    size: int  # of a block
    aggregate: str
    gate: bool = False  # block drift is wanted
    ratio: bool = False  # the block's log-ratio is
    count: bool = False  # the valid rows of each row's sequence are
    begun: bool = False  # sequences with valid rows are to be counted
    tally: bool = False  # valid rows are


class Tiles(NamedTuple):
    """Rows at a time, and programs."""

    lanes: int = 4096  # of a block
    tokens: int = 1024  # a program, where each row is a block of its own
    programs: int = 4096  # at most, where blocks are many
    walk: int = 1024  # on the way to a sequence's first valid row
    places: int = 128  # of sorted spans, a program
    columns: int = 8  # of them beside each other
    ends: int = 256  # tiles whose first and last spans are looked at
    alone: int = 2048  # that one program of `_sampled_token` takes by itself
    rows: int = 512  # a program, where there are more
    sequence: int = 2048  # of a sequence, for its unit mean
    sums: int = 128  # programs whose sums are added up at a time


class Shape(NamedTuple):
    """How rows fall into sequences."""

    n_rows: int
    length: int  # of each sequence, where they are not packed
    n_sequences: int
    packed: bool


class Plan(NamedTuple):
    """A launch of `_row_blocks`, for all tensors of one shape."""

    programs: int
    packed: bool  # it needs the borders of sequences
    numbers: tuple[int, ...]
    options: dict[str, Any]


def plan_blocks(shape: Shape, unit: Unit, held: bool, tiles: Tiles) -> Plan:
    """Blocks of rows and programs that take them."""
    n_rows, length, n_sequences, packed = shape
    if unit.granularity == "token" and not (unit.count or unit.begun):
        length, n_sequences, packed = n_rows, 1, False  # sequences do not matter
    longest = n_rows if packed else length
    size = {"token": tiles.tokens, "block": unit.size}.get(unit.granularity, longest)
    size = min(size, longest)
    if packed:
        n_blocks = n_rows // size + n_sequences
    else:
        n_blocks = n_sequences * ceil_div(length, size)
    each = ceil_div(n_blocks, tiles.programs)
    usual = min(size, 2 * ceil_div(n_rows, n_sequences))  # the lengths of packed ones vary
    lanes = min(tiles.lanes, max(32, power_of_2(usual)))
    options = dict(
        GRANULARITY=unit.granularity, AGGREGATE=unit.aggregate, GATE=unit.gate, RATIO=unit.ratio,
        COUNT=unit.count, TALLY=unit.tally, BEGUN=unit.begun, HELD=held,
        LANES=lanes, WALK=tiles.walk, num_warps=min(16, max(1, lanes // 256)),
    )  # fmt: skip
    numbers = n_rows, length, n_sequences, n_blocks, size, each
    return Plan(ceil_div(n_blocks, each), packed, numbers, options)


def reduce_blocks(
    plan: Plan,
    data: Any,  # `RowData`
    valid: Tensor,  # [N] uint8
    measured: Tensor | None,  # [N] uint8
    table: Tensor,
    first: Tensor,
    parts: Tensor,
    n_parts: int,
    first_part: int,
    tau: float,
) -> None:
    """Launch `_row_blocks`, which has the shapes."""
    launch(
        _row_blocks, (plan.programs,), data.now, data.old, valid, measured,
        data.cu_seqlens if plan.packed else None, table, first, parts, *plan.numbers,
        n_parts, first_part, tau, **plan.options,
    )  # fmt: skip
