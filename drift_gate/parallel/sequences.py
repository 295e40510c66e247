"""Sequences cut over ranks: blocks are reduced over all of a sequence, whichever rank has it.

A rank holds some positions of every sequence, in any layout (contiguous, zigzag); `position_ids`
say which. What the gate needs of a position are a few numbers, so they are gathered: each rank then
reduces the blocks of whole sequences, and keeps what belongs to its own rows. The gather is one
collective of 48 bytes a position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..passes.rules import GateRule, RowData
from .ranks import gather_ranks, rank_in


class Context(NamedTuple):
    """How this rank's rows lie in their sequences."""

    group: str  # named, see `ranks`
    position: Tensor  # [N] int64, in its sequence
    sequence: Tensor  # [N] int64, the number of the sequence
    sequences: int


class Cut(NamedTuple):
    """Row data of whole sequences, of all ranks, as `gathered` orders them: [R N]."""

    log_probs: Tensor
    old: Tensor | None
    valid: Tensor
    spans: Tensor | None
    cu_seqlens: Tensor
    mine: Tensor  # [N], where this rank's rows are


def context_of(positions: Tensor, cu_seqlens: Tensor | None, length: int, group: str) -> Context:
    """From positions [N] of rows that `cu_seqlens` or the length cuts into sequences."""
    n = len(positions)
    rows = torch.arange(n, device=positions.device)
    if cu_seqlens is None:
        length = max(length, 1)
        return Context(group, positions, rows // length, n // length)
    borders = cu_seqlens.long()
    number = torch.searchsorted(borders, rows, right=True) - 1
    return Context(group, positions, number, len(borders) - 1)


def gathered(
    context: Context, log_probs: Tensor, old: Tensor | None, valid: Tensor, spans: Tensor | None
) -> tuple[Cut, Tensor]:
    """The rows [N] of all ranks by sequence and position, and their positions.

    Raises ValueError on a CPU where two valid rows have one place.
    """
    zeros = torch.zeros_like(context.position)
    parts = [context.position, context.sequence, valid, log_probs, old, spans]
    stacked = torch.stack([zeros if x is None else _bits(x) for x in parts])
    n = len(valid)
    every = gather_ranks(stacked, context.group).transpose(0, 1).flatten(1)  # [6, R N]
    order = every[0].sort(stable=True).indices
    order = order[every[1, order].sort(stable=True).indices]
    position, sequence, on, now, before, span = every[:, order].unbind()
    valid = on != 0
    if log_probs.device.type == "cpu":
        _check_places(position[valid], sequence[valid])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    first = n * rank_in(context.group)
    numbers = torch.arange(context.sequences + 1, device=order.device)
    cut = Cut(
        _number(now), None if old is None else _number(before), valid,
        None if spans is None else span, torch.searchsorted(sequence, numbers),
        place[first : first + n],
    )  # fmt: skip
    return cut, position


def _wide(x: Tensor) -> Tensor:
    """Row data in float64, or in float32 on devices that have nothing wider."""
    return x if x.device.type in ("mps", "xpu") else x.double()


def _bits(x: Tensor) -> Tensor:
    """Row data as int64, which holds every span id: integers as they are, numbers bit by bit."""
    if not x.is_floating_point():
        return x.long()
    x = _wide(x.contiguous())
    return x.view(torch.int64) if x.dtype == torch.float64 else x.view(torch.int32).long()


def _number(bits: Tensor) -> Tensor:
    """What `_bits` was made from."""
    if _wide(bits[:0]).dtype == torch.float64:
        return bits.view(torch.float64)
    return bits.int().view(torch.float32)


def _check_places(position: Tensor, sequence: Tensor) -> None:
    """Raise where a position of a sequence is there twice."""
    if not len(position):
        return
    span = position.max() - position.min() + 1
    key = (sequence * span + position - position.min()).sort().values
    twice = (key[1:] == key[:-1]).nonzero()
    if len(twice):
        found = key[twice[0, 0]]
        raise ValueError(
            "position_ids must name each valid position of a sequence once over the "
            f"context_parallel_group; sequence {int(found // span)} has position "
            f"{int(found % span + position.min())} twice (ranks with other sequences belong in "
            "group alone)"
        )


def whole_sequences(
    context: Context, data: RowData, gate: GateRule
) -> tuple[RowData, GateRule, Tensor]:
    """The rows of all ranks, by sequence and position; the gate for them, a block being a span
    there; and where this rank's rows are [N]."""
    cut, position = gathered(context, data.now, data.old, data.valid, data.spans)
    spans = cut.spans
    if gate.granularity == "block" and gate.normalize != "off":
        first = _first_positions(cut, position)
        spans = torch.where(cut.valid, (position - first) // gate.block_size, 0)
        gate = gate._replace(granularity="span")
    rows = RowData(cut.valid, cut.log_probs, cut.old, spans, cut.cu_seqlens, 0)
    return rows, gate, cut.mine


def _first_positions(cut: Cut, position: Tensor) -> Tensor:
    """Position of the first valid row of each row's sequence, [R N]; any number without one."""
    n = len(position)
    rows = torch.arange(n, device=position.device)
    number = torch.searchsorted(cut.cu_seqlens, rows, right=True) - 1
    far = torch.iinfo(torch.int64).max
    first = torch.full_like(cut.cu_seqlens, far)
    first.scatter_reduce_(0, number, torch.where(cut.valid, position, far), "amin")
    return first[number]


def begin_here(every: RowData, mine: Tensor) -> Tensor:
    """How many sequences have their first valid row among this rank's rows, float64."""
    assert every.cu_seqlens is not None
    before = torch.nn.functional.pad(every.valid.cumsum(0), (1, 0))
    rows = torch.arange(len(every.valid), device=mine.device)
    number = torch.searchsorted(every.cu_seqlens, rows, right=True) - 1
    begins = every.valid & (before[:-1] == before[every.cu_seqlens[number]])
    return _wide(begins[mine].sum().float())
