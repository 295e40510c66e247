"""Which rows of a batch are worked on together where logits exist a chunk at a time.

Only valid rows are. Where gates are formed chunk by chunk no block may lie in two chunks. The host
learns which rows are valid, and where blocks end, in one read.
"""

from bisect import bisect_right

import numpy as np
import torch
from torch import Tensor

Rows = slice | Tensor  # consecutive rows, or an int64 index


def all_rows(n: int, size: int) -> list[Rows]:
    """Chunks of all of n rows."""
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def chunks(valid: Tensor, size: int, leaders: Tensor | None = None) -> list[Rows] | None:
    """Cut the valid rows [N] into chunks of at most `size`.

    With `leaders` [N], the first valid row of each row's block, a chunk ends where a block does;
    None if a block is too long (or its rows lie too far apart) for that.
    """
    if valid.is_cpu and bool(valid.all()) and (leaders is None or len(valid) <= size):
        return all_rows(len(valid), size)
    marks = valid.to(torch.int8) if leaders is None else valid + _block_ends(leaders, valid)
    found = marks.cpu().numpy()  # the one read
    index = np.flatnonzero(found)
    count = len(index)
    if count <= size:
        ends = [count] if count else []
    elif leaders is None:
        ends = [*range(size, count, size), count]
    else:
        possible = (np.flatnonzero(found[index] == 2) + 1).tolist()
        ends = []
        while not ends or ends[-1] < count:
            begin = ends[-1] if ends else 0
            at = bisect_right(possible, begin + size) - 1
            if at < 0 or possible[at] <= begin:
                return None
            ends.append(possible[at])
    borders = list(zip([0, *ends], ends, strict=False))
    if count == len(found):
        return [slice(a, b) for a, b in borders]
    order = (~valid).to(torch.int8).argsort(stable=True)[:count]  # known here without a copy back
    return [order[a:b] for a, b in borders]


def _block_ends(leaders: Tensor, valid: Tensor) -> Tensor:
    """[N] int8: 1 at valid rows up to which (among valid rows) whole blocks lie, else 0."""
    position = valid.cumsum(0) - 1
    blocks = torch.where(valid, leaders, 0).long()
    last = torch.zeros_like(position)
    last.scatter_reduce_(0, blocks, torch.where(valid, position, 0), "amax")
    reach = torch.where(valid, last[blocks], 0).cummax(0).values
    return ((reach == position) & valid).to(torch.int8)


def take(x: Tensor, rows: Rows) -> Tensor:
    """x[rows]: a view where the rows are consecutive."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """x[rows] = values, along the first dimension."""
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values)
