"""`measured_rows`: where the drift of a block is measured, if not at all of its valid rows.

The first valid row of each block, and every `sample_every`-th valid one after it. Blocks are
intervals of rows inside one sequence, as in `blocks.py`; a program takes one block after the other.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import FAR, Shape, Tiles, Unit, _block_at, _first_valid, borders_of, plan_blocks
from .launch import launch

TILES = Tiles()


@triton.jit
def _measured_rows(
    valid,  # [N] uint8
    cu_seqlens,  # [n_sequences + 1], or None: sequences of `length` rows
    measured,  # [N] uint8 out, at the rows of blocks
    n_rows,
    length,
    n_sequences,
    n_blocks,
    size,  # rows a block at most
    each,  # blocks a program
    every,
    FROM_FIRST: tl.constexpr,  # blocks are counted from a sequence's first valid row
    LANES: tl.constexpr,
    WALK: tl.constexpr,
):
    FAR_: tl.constexpr = FAR
    program = tl.program_id(0)
    for number in range(program * each, tl.minimum(program * each + each, n_blocks)):
        sequence, block = _block_at(number, cu_seqlens, n_rows, length, n_sequences, size)
        start, end = borders_of(sequence, cu_seqlens, n_rows, length)
        lo = start + block * size
        if FROM_FIRST:
            opening, _ = _first_valid(valid, start, end, False, WALK)
            lo = tl.where(opening == FAR_, end, opening + block * size)
        hi = tl.minimum(lo + size, end)
        before = lo * 0
        at = lo
        while at < hi:
            j = at + tl.arange(0, LANES)
            live = tl.load(valid + j, mask=j < hi, other=0) != 0
            rank = before + tl.cumsum(live.to(tl.int32), 0) - 1
            tl.store(measured + j, (live & (rank % every == 0)).to(tl.uint8), mask=j < hi)
            before += tl.sum(live.to(tl.int32), 0)
            at += LANES


def measured_rows(data: Any, gate: Any) -> Tensor:
    """[N] bool, from `RowData` and a gate of blocks or sequences; no log-prob is read."""
    valid, borders, length = data.valid, data.cu_seqlens, data.length or 1
    n_rows, packed = valid.numel(), borders is not None
    measured = torch.zeros_like(valid)
    if not n_rows:
        return measured
    sequences = borders.numel() - 1 if packed else n_rows // length
    unit = Unit(gate.granularity, gate.block_size, gate.aggregate)
    plan = plan_blocks(Shape(n_rows, length, sequences, packed), unit, False, TILES)
    options = {name: plan.options[name] for name in ("LANES", "WALK", "num_warps")}
    launch(
        _measured_rows, (plan.programs,), valid.view(torch.uint8), borders,
        measured.view(torch.uint8), *plan.numbers, gate.sample_every,
        FROM_FIRST=gate.granularity == "block", **options,
    )  # fmt: skip
    return measured
