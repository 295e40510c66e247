"""Parts of a batch: some of its sequences, or some positions of each; padded, packed or flat.

The arguments are those of a loss, and `valid`, whose shape is that of the rows. Parts are views.
"""

import torch
from torch import Tensor

from ..passes.torch.blocks import sequence_numbers
from .options import Arguments

WHOLE = "head", "teacher_head", "cu_seqlens"
"""Tensors that are not cut with the rows."""
LAYOUTS = ("contiguous", "striped")  # of the positions that a rank has


def across_sequences(arguments: Arguments) -> int:
    """The dimension along which sequences follow one another."""
    return 0 if arguments.get("cu_seqlens") is None else across_positions(arguments)


def across_positions(arguments: Arguments) -> int:
    """The dimension along which positions follow one another."""
    dim: int = arguments["valid"].dim() - 1
    return dim


def some_sequences(arguments: Arguments, parts: int, part: int) -> Arguments:
    """One of the parts into which the sequences fall."""
    borders, dim = arguments.get("cu_seqlens"), across_sequences(arguments)
    count = arguments["valid"].shape[0] if borders is None else len(borders) - 1
    first, last = (count * i // parts for i in (part, part + 1))
    cut: Arguments = {}
    if borders is not None:
        mine = borders[first : last + 1]
        mine = mine if last > first else mine[:1].repeat(2)  # borders are of a sequence at least
        cut["cu_seqlens"] = mine - mine[0]
        first, last = int(mine[0]), int(mine[-1])
    return cut | _taken(arguments, dim, slice(first, last))


def some_positions(arguments: Arguments, parts: int, part: int, layout: str) -> Arguments:
    """One of the parts into which the positions fall, all of one size."""
    dim, borders = across_positions(arguments), arguments.get("cu_seqlens")
    length = arguments["valid"].shape[dim]
    mine = slice(part * length // parts, (part + 1) * length // parts)
    if layout == "striped":
        mine = slice(part, None, parts)
    cut = _taken(arguments, dim, mine)
    if borders is not None:
        before = torch.searchsorted(torch.arange(length)[mine].contiguous(), borders.long())
        cut["cu_seqlens"] = before.to(borders.dtype)
    return cut


def in_order(x: Tensor, dim: int, parts: int, layout: str) -> Tensor:
    """Row data of all parts of the positions, one part after another, as they were."""
    if layout == "contiguous":
        return x
    places = torch.arange(x.shape[dim])
    return x.index_select(dim, torch.cat([places[i::parts] for i in range(parts)]).argsort())


def position_ids(arguments: Arguments) -> Tensor:
    """Of all rows, from 0 in each sequence."""
    valid: Tensor = arguments["valid"]
    rows = valid.numel()
    first = sequence_numbers(rows, valid.shape[-1], arguments.get("cu_seqlens"), valid)
    return (torch.arange(rows) - first).view(valid.shape)


def _taken(arguments: Arguments, dim: int, mine: slice) -> Arguments:
    at = (*[slice(None)] * dim, mine)
    return {k: x[at] for k, x in arguments.items() if isinstance(x, Tensor) and k not in WHOLE}
