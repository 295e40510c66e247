"""`weigh` and `finish`: how rows [N] weigh, and the gated loss of their positions.

What they take and give stands in `drift_gate/passes/rules.py`. In launches:

    _row_blocks     blocks of rows, their drift, counts of rows and sequences    `blocks.py`
    _span_parts, _span_blocks     the same of spans, after a sort by id          `spans.py`
    _sequence_gates unit mean over each sequence, where it is asked for          `sampled_token.py`
    _sampled_token  weights, losses, slopes, sums
    _total          the sums of more than one program                            `row_sums.py`

so two for a gate over a few thousand rows, three beyond. All results of a call, and what one kernel
leaves for the next, are one allocation.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import Plan, Shape, Tiles, Unit, plan_blocks, reduce_blocks
from .common import ceil_div, power_of_2
from .launch import launch
from .row_sums import METRICS, SUMS, WHOLE, _total
from .sampled_token import _sampled_token, _sequence_gates
from .spans import plan_spans, reduce_spans

TILES = Tiles()
RATIOS = ("ppo", "importance", "cispo")  # estimators with a ratio
OUT = 1 + len(METRICS)  # the loss, the metrics
HEAD = 20  # numbers before those: totals, out
NO_SPACING = None, None, 0, 1.0
NO_BOUNDS = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0)


class _Plan(NamedTuple):
    """All that a call needs to know beside its tensors, its tau and its factor."""

    reductions: tuple[Plan, ...]
    spans: tuple[bool, ...]  # which of them are of spans
    columns: tuple[int, ...]  # of `parts`, that each of them fills
    n_parts: int
    sequences: tuple[int, int] | None  # how many, and tile, where each has unit mean
    programs: int  # of `_sampled_token`
    lines: int  # of the table
    scratch: int  # numbers that kernels leave for the next one, a multiple of 4
    bounds: tuple[float, ...]
    options: dict[str, Any]
    last: dict[str, Any]  # options of `_total`


def weigh(data: Any, gate: Any, given: Tensor | None = None) -> tuple[Tensor, ...]:
    """weight [N], drift [N], first [N] int32, metrics [11], totals [4] float64."""
    _, table, first, metrics, totals = finish(data, gate, given, None, None, None, None)
    return table[0], table[1], first, metrics, totals


def finish(
    data: Any,
    gate: Any,
    given: Tensor | None,
    row_weights: Tensor | None,
    target: Tensor | None,  # None, as position and reduce: the weights alone, and a table [2, N]
    position: Any,
    reduce: Any,
) -> tuple[Tensor, ...]:
    """loss [], table [5, N], first [N] int32, metrics [11], totals [4] float64."""
    valid, now, old, _, borders, length, measured, spacing = data
    n_rows, packed = valid.numel(), borders is not None
    length = length or 1
    shape = Shape(n_rows, length, borders.numel() - 1 if packed else n_rows // length, packed)
    rule = None if reduce is None else (reduce.denominator, reduce.token_mean)
    plan = _plan(shape, old is not None, measured is not None, gate, position, rule, TILES)
    tau, factor = float(gate.tau), 1.0 if reduce is None else float(reduce.factor)
    valid = valid.view(torch.uint8)
    measured = None if measured is None else measured.view(torch.uint8)
    rows_at = HEAD + plan.scratch
    table_at = rows_at + 4 * ceil_div(n_rows, 4)  # all begin on 16 bytes
    size = table_at + plan.lines * n_rows
    memory = torch.empty(size, dtype=torch.float32, device=valid.device)
    totals = memory.as_strided((8,), (1,), 0).view(torch.float64)
    out = memory.as_strided((OUT,), (1,), 8)
    left = memory.as_strided((plan.scratch,), (1,), HEAD)
    first = memory.as_strided((n_rows,), (1,), rows_at).view(torch.int32)
    table = memory.as_strided((plan.lines, n_rows), (n_rows, 1), table_at)
    column = 0
    for step, spans, its in zip(plan.reductions, plan.spans, plan.columns, strict=True):
        run = reduce_spans if spans else reduce_blocks
        seen = measured if step.options["GATE"] else None  # the ratio is of all valid rows
        run(step, data, valid, seen, table, first, left, plan.n_parts, column, tau)
        column += its
    if plan.sequences is not None:
        _normalise_sequences(plan, valid, borders, table, shape, tau)
    maximum, log_sum, bits, scale = NO_SPACING if spacing is None or old is None else spacing
    launch(
        _sampled_token, (plan.programs,), now, old, target, valid, measured,
        given if plan.options["GATE"] == "given" else None, row_weights, maximum, log_sum, first,
        table, left, out, totals, n_rows, plan.n_parts, tau, factor, *plan.bounds, float(scale),
        BITS=bits, **plan.options,
    )  # fmt: skip
    if plan.programs > 1:
        launch(
            _total, (1,), left, out, totals, plan.n_parts, plan.programs, tau,
            SAMPLED=measured is not None, **plan.last,
        )  # fmt: skip
    loss, metrics = out.as_strided((), (), 8), out.as_strided((OUT - 1,), (1,), 9)
    return loss, table, first, metrics, totals


@functools.lru_cache(maxsize=256)
def _plan(
    shape: Shape,
    drifting: bool,
    sampled: bool,  # not all valid rows have a drift
    gate: Any,
    position: Any,
    reduce: tuple[str, bool] | None,
    tiles: Tiles,
) -> _Plan:
    n_rows = shape.n_rows
    weighing = gate.normalize if n_rows and (drifting or gate.normalize == "given") else "off"
    tile = tiles.rows if n_rows > tiles.alone else max(128, power_of_2(n_rows))
    programs = max(1, ceil_div(n_rows, tile))
    units = []
    if n_rows:
        units = _units(weighing, drifting, sampled, gate, position, reduce, programs)
    held = gate.part and weighing == "batch" and gate.tau > 0
    spans = tuple(unit.granularity == "span" for unit in units)
    plans = tuple(
        (plan_spans if span else plan_blocks)(shape, unit, held, tiles)
        for unit, span in zip(units, spans, strict=True)
    )
    columns = tuple(
        plan.programs if unit.tally or unit.begun else 0
        for unit, plan in zip(units, plans, strict=True)
    )
    n_parts = sum(columns)
    sums = SUMS.value * programs + WHOLE.value if programs > 1 else 0
    lines = 2 if position is None else 5
    shared = dict(
        GATE=weighing,
        DENOMINATOR=reduce[0] if reduce is not None and n_rows else "given",
        HELD=held,
    )
    options = dict(
        **_loss_options(position),
        BLOCKS=weighing not in ("off", "given"),
        UNIT_RATIO=any(unit.ratio for unit in units),
        TOKEN_MEAN=bool(reduce is not None and reduce[1] and n_rows),
        PARTS=n_parts > 0,
        TILE=tile,
        WIDTH=tile,
        num_warps=min(16, max(4, tile // 128)),
        **shared,
    )
    return _Plan(
        plans, spans, columns, n_parts,
        _sequence_tiles(shape, tiles) if weighing == "sequence" else None,
        programs, lines, 4 * n_parts + 4 * ceil_div(sums, 4),
        NO_BOUNDS if position is None else _bounds(position),
        options, dict(WIDTH=tiles.sums, num_warps=4, **shared),
    )  # fmt: skip


def _bounds(position: Any) -> tuple[float, ...]:
    """Numbers of a position rule, as the kernel takes them."""
    _, low, high, dual, least, most, *_ = position
    return tuple(map(float, (1 - low, 1 + high, dual, least, most, position.floor)))


def _loss_options(position: Any) -> dict[str, Any]:
    """Names of a position rule, as the kernel takes them."""
    if position is None:
        return dict(ESTIMATOR="given", ADVANTAGE="given", CLAMP=False)
    return dict(
        ESTIMATOR=position.estimator, ADVANTAGE=position.advantage, CLAMP=bool(position.clamp)
    )


def _units(
    weighing: str,
    drifting: bool,
    sampled: bool,
    gate: Any,
    position: Any,
    reduce: tuple[str, bool] | None,
    programs: int,
) -> list[Unit]:
    """What must be reduced before the rows are weighed; the first unit counts the valid rows."""
    denominator, count = reduce or ("given", False)
    begun = denominator == "sequences"
    wanted: dict[tuple[str, int, bool], dict[str, bool]] = {}  # the last: of measured rows alone
    if weighing not in ("off", "given"):
        blocks = _blocks(gate.granularity, gate.block_size)
        wanted.setdefault((*blocks, sampled), {})["gate"] = True
    if position is not None and position.estimator in RATIOS and drifting:
        blocks = _blocks(position.ratio, gate.block_size)
        if blocks[0] != "token":
            wanted.setdefault((*blocks, False), {})["ratio"] = True
    if count or begun:
        plain = next((blocks for blocks in wanted if blocks[0] != "span"), ("token", 1, False))
        wanted.setdefault(plain, {}).update(count=count, begun=begun)
    if not wanted and programs > 1:
        wanted["token", 1, False] = {}
    return [
        Unit(*blocks[:2], gate.aggregate, tally=i == 0, **purposes)
        for i, (blocks, purposes) in enumerate(wanted.items())
    ]


def _blocks(granularity: str, size: int) -> tuple[str, int]:
    """Granularity and rows of a block; blocks of one row are tokens."""
    if granularity != "block":
        return granularity, 1
    return ("token", 1) if size == 1 else ("block", size)


def _sequence_tiles(shape: Shape, tiles: Tiles) -> tuple[int, int]:
    """How many sequences there are, and rows of one at a time."""
    longest = shape.length
    if shape.packed:  # lengths vary
        longest = min(shape.n_rows, 2 * ceil_div(shape.n_rows, shape.n_sequences))
    return shape.n_sequences, min(tiles.sequence, max(128, power_of_2(longest)))


def _normalise_sequences(
    plan: _Plan, valid: Tensor, borders: Tensor | None, table: Tensor, shape: Shape, tau: float
) -> None:
    """Turn block drifts into weights of unit mean over each sequence."""
    assert plan.sequences is not None
    sequences, tile = plan.sequences
    launch(
        _sequence_gates, (sequences,), valid, borders, table, shape.n_rows, shape.length,
        (plan.lines - 1) * shape.n_rows, tau, TILE=tile, num_warps=max(1, tile // 128),
    )  # fmt: skip
