"""Which rows of a batch are worked on together where logits exist a chunk at a time.

Only valid rows are. Where gates are formed chunk by chunk no block may lie in two chunks. The host
learns which rows are valid, and where blocks end, in one read; where all rows are valid and blocks
end at regular places it knows that much.

Chunks are as few as their size allows and about alike, in whole tiles of a product: of 2,208 rows
the last tile would be an eighth full.
"""

from bisect import bisect_right

import numpy as np
import torch
from torch import Tensor

Rows = slice | Tensor  # consecutive rows, or an int64 index
TILE = 256  # rows of the widest tile of a product on a GPU


def all_rows(n: int, size: int, ends: list[int] | None = None) -> list[Rows] | None:
    """Chunks of all of n rows; with `ends`, where blocks end, as in `chunks`."""
    borders = _borders(n, size, ends)
    return None if borders is None else [slice(a, b) for a, b in borders]


def regular_ends(n: int, length: int, size: int) -> list[int]:
    """Where blocks of `size` rows end, in sequences of `length` rows; n rows, all valid."""
    ends = [*range(size, length, size), length]
    return [start + end for start in range(0, n, length) for end in ends]


def chunks(valid: Tensor, size: int, leaders: Tensor | None = None) -> list[Rows] | None:
    """Cut the valid rows [N] into chunks of at most `size`.

    With `leaders` [N], the first valid row of each row's block, a chunk ends where a block does;
    None if a block is too long (or its rows lie too far apart) for that.
    """
    if valid.is_cpu and bool(valid.all()) and (leaders is None or len(valid) <= size):
        return all_rows(len(valid), size)
    return cut(valid, marks_of(valid, leaders), size, leaders is not None)


def marks_of(valid: Tensor, leaders: Tensor | None) -> np.ndarray:
    """[N]: 0, or 1 for a valid row; with leaders 2 where whole blocks end. The one read."""
    marks = valid.to(torch.int8) if leaders is None else valid + _block_ends(leaders, valid)
    return marks.cpu().numpy()


def cut(valid: Tensor, marks: np.ndarray, size: int, blocks: bool) -> list[Rows] | None:
    """`chunks` from the marks of the rows; `blocks`: a chunk ends where a block does."""
    index = np.flatnonzero(marks)
    count = len(index)
    ends = None
    if blocks and count > size:
        ends = (np.flatnonzero(marks[index] == 2) + 1).tolist()
    borders = _borders(count, size, ends)
    if borders is None:
        return None
    if count == len(marks):
        return [slice(a, b) for a, b in borders]
    order = (~valid).to(torch.int8).argsort(stable=True)[:count]  # known here without a copy back
    return [order[a:b] for a, b in borders]


def chunks_of_most(valid: Tensor, most: int, size: int) -> list[Rows]:
    """Chunks of the valid rows, of which there are at most so many; others fill them up."""
    order = (~valid).to(torch.int8).argsort(stable=True)
    return [order[a:b] for a, b in _borders(min(most, len(valid)), size, None) or []]


def _borders(count: int, size: int, ends: list[int] | None) -> list[tuple[int, int]] | None:
    """First and last row of each chunk; `ends`, the last of them `count`, are where one may end."""
    parts = max(1, -(-count // size))
    step = min(size, -(-count // (parts * TILE)) * TILE)
    found: list[int] = []
    begin = 0
    while begin < count:
        rows = count - begin if count - begin <= size else step
        at = begin + rows if ends is None else _last(ends, begin, rows) or _last(ends, begin, size)
        if not at:
            return None
        found.append(at)
        begin = at
    return list(zip([0, *found], found, strict=False))


def _last(ends: list[int], begin: int, rows: int) -> int:
    """The last place where a chunk from `begin` on may end; 0 without any."""
    at = bisect_right(ends, begin + rows) - 1
    return ends[at] if at >= 0 and ends[at] > begin else 0


def _block_ends(leaders: Tensor, valid: Tensor) -> Tensor:
    """[N] int8: 1 at valid rows up to which (among valid rows) whole blocks lie, else 0."""
    position = valid.cumsum(0) - 1
    blocks = torch.where(valid, leaders, 0).long()
    last = torch.zeros_like(position)
    last.scatter_reduce_(0, blocks, torch.where(valid, position, 0), "amax")
    reach = torch.where(valid, last[blocks], 0).cummax(0).values
    return ((reach == position) & valid).to(torch.int8)


def longest(parts: list[Rows]) -> int:
    """Rows of the largest chunk; 0 where there is none."""
    most = 0
    for at in parts:
        most = max(most, at.stop - at.start if isinstance(at, slice) else at.shape[0])
    return most


def take(x: Tensor, rows: Rows) -> Tensor:
    """x[rows]: a view where the rows are consecutive."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """x[rows] = values, along the first dimension."""
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values)
