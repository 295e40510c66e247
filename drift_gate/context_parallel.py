"""Sequences cut over ranks: blocks are reduced over all of a sequence, whichever rank has it.

A rank holds some positions of every sequence, in any layout (contiguous, zigzag); `position_ids`
say which. What the gate needs of a position are a few numbers, so they are gathered: each rank then
reduces the blocks of whole sequences, and keeps what belongs to its own rows. The gather is one
collective of 48 bytes a position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import rows
from .arguments import Layout, check_integer, check_like, flat
from .gate import DriftGate
from .ranks import gather_ranks, rank_in
from .torch_rows import Segments, sequence_numbers, wide


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


def context_of(
    position_ids: Tensor | None, group: str, layout: Layout, device: torch.device, of: str
) -> Context | None:
    """Check and flatten; None where sequences are not cut.

    Raises ValueError where one of position_ids and the group is missing.
    """
    if position_ids is None:
        return None
    check_integer("position_ids", position_ids)
    check_like("position_ids", position_ids, layout.shape, device, of)
    if not group:
        return None  # whole sequences: positions say nothing new
    rows_ = torch.arange(layout.rows, device=device)
    if layout.cu_seqlens is None:
        length = max(layout.length, 1)
        return Context(group, flat(position_ids).long(), rows_ // length, layout.rows // length)
    borders = layout.cu_seqlens.long()
    number = torch.searchsorted(borders, rows_, right=True) - 1
    return Context(group, flat(position_ids).long(), number, len(borders) - 1)


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


def _bits(x: Tensor) -> Tensor:
    """Row data as int64, which holds every span id: integers as they are, numbers bit by bit."""
    if not x.is_floating_point():
        return x.long()
    x = wide(x.contiguous())
    return x.view(torch.int64) if x.dtype == torch.float64 else x.view(torch.int32).long()


def _number(bits: Tensor) -> Tensor:
    """What `_bits` was made from."""
    if wide(bits[:0]).dtype == torch.float64:
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


def row_blocks(
    context: Context,
    log_probs: Tensor,
    old: Tensor | None,
    valid: Tensor,
    spans: Tensor | None,
    gate: DriftGate | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks of whole sequences, for this rank's rows.

    Returns what `rows.row_blocks` has of each row, with counts, [4, N]; the number of its block
    [N], -1 where not valid; and the weights [N] where each sequence has unit mean by itself.
    """
    cut, position = gathered(context, log_probs, old, valid, spans)
    ids, granularity = cut.spans, "token" if gate is None else gate.granularity
    if granularity == "block":
        assert gate is not None
        sequence = sequence_numbers(len(position), 0, cut.cu_seqlens, position)
        candidate = torch.where(cut.valid, wide(position), torch.inf)
        first = Segments(sequence).reduce(candidate, "min")
        ids = torch.where(cut.valid, (position - first) // gate.block_size, 0).long()
        granularity = "span"
    aggregate = "mean" if gate is None else gate.aggregate
    blocks, leader = rows.row_blocks(
        cut.log_probs, cut.old, cut.valid, ids if granularity == "span" else None, cut.cu_seqlens,
        0, granularity, 1, aggregate, True, "torch",
    )  # fmt: skip
    weights = None
    if gate is not None and gate.normalize == "sequence":
        _, row_data, _ = rows.sampled_token(
            cut.log_probs, cut.old, None, cut.valid, blocks, cut.cu_seqlens, 0, float(gate.tau),
            gate.normalize, "ppo", 0.2, 0.2, 3.0, None, 1.0, "given", False, "torch",
        )  # fmt: skip
        weights = row_data[0][cut.mine].to(log_probs.dtype)
    numbers = rows.number_blocks(leader)[cut.mine]
    return blocks[:, cut.mine].to(log_probs.dtype), numbers, weights
