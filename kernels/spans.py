"""Policy drift reduced over spans: the rows of a sequence that bear the same id, wherever they are.

A stable sort by id brings the rows of a span together, in their order, whatever the ids are: spans
become intervals of sorted places. Two launches then reduce them, with work that does not depend on
how many rows a span has:

    _span_parts   every TILE places: the aggregate over the first span in them, and over the last
    _span_blocks  every TILE places: spans that begin and end inside are reduced pair by pair; the
                  first and the last one from the parts of all tiles that have the same span

Each member of a span adds the same numbers in the same order, and gets the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregates import aggregated, gates_of, held, joined, measure, rescaled, store_part
from .blocks import FAR, Plan, Shape, Tiles, Unit, sequence_start
from .common import ceil_div
from .launch import launch


@triton.jit
def _store_end(ends, end_rows, column, n_tiles, d, row, seen, member, AGGREGATE: tl.constexpr):
    """A tile's part of the span at one of its ends: see `_span_parts`."""
    FAR_: tl.constexpr = FAR
    live = member & (row != FAR_)
    seen &= live
    total, largest = measure(d, seen, 0, AGGREGATE)
    tl.store(ends + column, total)
    tl.store(ends + 2 * n_tiles + column, largest)
    tl.store(ends + 4 * n_tiles + column, tl.sum(tl.where(seen, d, 0.0), 0))
    tl.store(end_rows + column, tl.sum(seen.to(tl.int32), 0))
    tl.store(end_rows + 2 * n_tiles + column, tl.min(tl.where(live, row, FAR_), 0))


@triton.jit
def _span_parts(
    now,  # [N] float32
    old,  # [N] float32
    valid,  # [N] uint8
    measured,  # [N] uint8: which of the valid rows are reduced; None: all
    cu_seqlens,  # [n_sequences + 1], or None
    ids,  # [N] int64, sorted
    order,  # [N] int64: which row stands at each place
    drift,  # [N] float32 out: of the row at each place
    rows,  # [2 or 3, N] int32 out: that row, FAR where not valid; the first row of its sequence;
    #        where `measured` is given whether it is
    ends,  # [3, 2, n_tiles] float32 out: total, largest and sum, of the first and the last span
    end_rows,  # [2, 2, n_tiles] int32 out: their measured rows, and the first valid one
    n_rows,
    length,
    n_sequences,
    AGGREGATE: tl.constexpr,
    TILE: tl.constexpr,
):
    FAR_: tl.constexpr = FAR
    tile = tl.program_id(0)
    n_tiles = tl.num_programs(0)
    lane = tl.arange(0, TILE)
    place = tile * TILE + lane
    inside = place < n_rows
    row = tl.load(order + place, mask=inside, other=0).to(tl.int32)
    id = tl.load(ids + place, mask=inside, other=0)
    start = sequence_start(row, cu_seqlens, n_rows, length, n_sequences)
    live = tl.load(valid + row, mask=inside, other=0) != 0
    d = tl.load(old + row, mask=live, other=0.0) - tl.load(now + row, mask=live, other=0.0)
    seen = live
    if measured is not None:
        seen = tl.load(measured + row, mask=live, other=0) != 0
        tl.store(rows + 2 * n_rows + place, seen.to(tl.int32), mask=inside)
    row = tl.where(live, row, FAR_)
    tl.store(drift + place, d, mask=inside)
    tl.store(rows + place, row, mask=inside)
    tl.store(rows + n_rows + place, start, mask=inside)
    for end in tl.static_range(2):
        at = 0
        if end == 1:
            at = tl.minimum(TILE, n_rows - tile * TILE) - 1
        same = id == tl.load(ids + tile * TILE + at)
        same &= start == tl.sum(tl.where(lane == at, start, 0), 0)
        column = end * n_tiles + tile
        _store_end(ends, end_rows, column, n_tiles, d, row, seen, inside & same, AGGREGATE)


@triton.jit
def _pairs(drift, rows, ids, id, start, tile, n_rows, SAMPLED: tl.constexpr,
           AGGREGATE: tl.constexpr, TILE: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Of the span at each place, within the tile: total, largest, sum and number of the measured
    rows, and the first valid one."""
    FAR_: tl.constexpr = FAR
    total = tl.zeros([TILE], tl.float32)
    largest = tl.zeros([TILE], tl.float32)
    signed = tl.zeros([TILE], tl.float32)
    count = tl.zeros([TILE], tl.int32)
    leader = tl.full([TILE], FAR_, tl.int32)
    for at in range(0, TILE, COLS):
        place = tile * TILE + at + tl.arange(0, COLS)
        inside = place < n_rows
        row = tl.load(rows + place, mask=inside, other=FAR_)
        member = tl.load(ids + place, mask=inside, other=0)[None, :] == id[:, None]
        member &= tl.load(rows + n_rows + place, mask=inside, other=-1)[None, :] == start[:, None]
        member &= (row != FAR_)[None, :]
        d = tl.load(drift + place, mask=inside, other=0.0)[None, :]
        seen = member
        if SAMPLED:
            seen &= (tl.load(rows + 2 * n_rows + place, mask=inside, other=0) != 0)[None, :]
        here, top = measure(d, seen, 1, AGGREGATE)
        total, largest = joined(total, largest, here, top, AGGREGATE)
        signed += tl.sum(tl.where(seen, d, 0.0), 1)
        count += tl.sum(seen.to(tl.int32), 1)
        leader = tl.minimum(leader, tl.min(tl.where(member, row[None, :], FAR_), 1))
    return total, largest, signed, count, leader


@triton.jit
def _end(rows, ids, ends, end_rows, id, start, tile, n_rows, LAST: tl.constexpr,
         AGGREGATE: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The same of one span, the first or the last of a tile, over all tiles that have it.

    Tiles before this one have it last, those after it first.
    """
    FAR_: tl.constexpr = FAR
    n_tiles = tl.num_programs(0)
    total = tl.zeros([WIDTH], tl.float32)
    largest = tl.zeros([WIDTH], tl.float32)
    signed = tl.zeros([WIDTH], tl.float32)
    count = tl.zeros([WIDTH], tl.int32)
    leader = tl.full([WIDTH], FAR_, tl.int32)
    for at in range(0, n_tiles, WIDTH):
        other = at + tl.arange(0, WIDTH)
        last = other < tile + LAST
        place = tl.where(last, tl.minimum(other * TILE + TILE, n_rows) - 1, other * TILE)
        same = other < n_tiles
        same &= tl.load(ids + place, mask=same, other=0) == id
        same &= tl.load(rows + n_rows + place, mask=same, other=-1) == start
        column = other + tl.where(last, n_tiles, 0)
        here = tl.load(ends + column, mask=same, other=0.0)
        top = tl.load(ends + 2 * n_tiles + column, mask=same, other=0.0)
        total, largest = joined(total, largest, here, top, AGGREGATE)
        signed += tl.load(ends + 4 * n_tiles + column, mask=same, other=0.0)
        count += tl.load(end_rows + column, mask=same, other=0)
        first = tl.load(end_rows + 2 * n_tiles + column, mask=same, other=FAR_)
        leader = tl.minimum(leader, first)
    highest = tl.max(largest, 0)
    total = tl.sum(rescaled(total, largest, highest, AGGREGATE), 0)
    return total, highest, tl.sum(signed, 0), tl.sum(count, 0), tl.min(leader, 0)


@triton.jit
def _span_blocks(
    ids,  # these from `_span_parts`
    drift,
    rows,
    ends,
    end_rows,
    table,  # these as `_row_blocks` has them
    first,
    parts,
    n_rows,
    n_parts,
    first_part,
    tau,
    SAMPLED: tl.constexpr,  # not all valid rows are measured
    AGGREGATE: tl.constexpr,
    GATE: tl.constexpr,
    RATIO: tl.constexpr,
    TALLY: tl.constexpr,
    HELD: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    FAR_: tl.constexpr = FAR
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    place = tile * TILE + lane
    inside = place < n_rows
    id = tl.load(ids + place, mask=inside, other=0)
    start = tl.load(rows + n_rows + place, mask=inside, other=-1)
    row = tl.load(rows + place, mask=inside, other=FAR_)
    live = row != FAR_
    total, largest, signed, count, leader = _pairs(
        drift, rows, ids, id, start, tile, n_rows, SAMPLED, AGGREGATE, TILE, COLS
    )
    for end in tl.static_range(2):
        at = tile * TILE
        if end == 1:
            at = tl.minimum(at + TILE, n_rows) - 1
        its_id = tl.load(ids + at)
        its_start = tl.load(rows + n_rows + at)
        found = _end(
            rows, ids, ends, end_rows, its_id, its_start, tile, n_rows, end, AGGREGATE, TILE, WIDTH
        )
        same = (id == its_id) & (start == its_start)
        total = tl.where(same, found[0], total)
        largest = tl.where(same, found[1], largest)
        signed = tl.where(same, found[2], signed)
        count = tl.where(same, found[3], count)
        leader = tl.where(same, found[4], leader)
    a = held(aggregated(total, largest, count, AGGREGATE), HELD)
    if GATE:
        tl.store(table + row, a, mask=live)
        tl.store(first + row, leader, mask=live)
    if RATIO:
        mean = signed / tl.maximum(count.to(tl.float32), 1.0)
        tl.store(table + n_rows + row, -mean, mask=live)
    if TALLY:
        lowest, gates, n_valid = gates_of(a, live, tau)
        store_part(parts, n_parts, first_part + tile, lowest, gates, n_valid, n_valid * 0)


def plan_spans(shape: Shape, unit: Unit, held: bool, tiles: Tiles) -> Plan:
    """Tiles of sorted places."""
    options = dict(
        AGGREGATE=unit.aggregate, GATE=unit.gate, RATIO=unit.ratio, TALLY=unit.tally, HELD=held,
        TILE=tiles.places, COLS=tiles.columns, WIDTH=tiles.ends, num_warps=4,
    )  # fmt: skip
    numbers = shape.n_rows, shape.length, shape.n_sequences
    return Plan(ceil_div(shape.n_rows, tiles.places), shape.packed, numbers, options)


def reduce_spans(
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
    """Sort by id, and launch `_span_parts` and `_span_blocks`."""
    n_rows, tiles = plan.numbers[0], plan.programs
    ids, order = data.spans.sort(stable=True)
    sampled = measured is not None
    sizes = [n_rows, 6 * tiles, (2 + sampled) * n_rows, 4 * tiles]
    memory = torch.empty(sum(sizes), dtype=torch.float32, device=valid.device)
    drift, ends, rows, end_rows = memory.split_with_sizes(sizes)
    rows, end_rows = rows.view(torch.int32), end_rows.view(torch.int32)
    aggregate, tile = plan.options["AGGREGATE"], plan.options["TILE"]
    launch(
        _span_parts, (tiles,), data.now, data.old, valid, measured, data.cu_seqlens, ids, order,
        drift, rows, ends, end_rows, *plan.numbers, AGGREGATE=aggregate, TILE=tile, num_warps=4,
    )  # fmt: skip
    launch(
        _span_blocks, (tiles,), ids, drift, rows, ends, end_rows, table, first, parts,
        n_rows, n_parts, first_part, tau, SAMPLED=sampled, **plan.options,
    )  # fmt: skip
