"""Which rows of a batch are worked on together where logits exist a chunk at a time.

Only valid rows are. Where gates are formed chunk by chunk no block may lie in two chunks.
"""

from bisect import bisect_right

import torch
from torch import Tensor

Rows = slice | Tensor  # consecutive rows, or an int64 index


def chunks(valid: Tensor, size: int, leaders: Tensor | None = None) -> list[Rows] | None:
    """Cut the valid rows [N] into chunks of at most `size`; reads values (a GPU synchronises).

    With `leaders` [N], the first valid row of each row's block, a chunk ends where a block does;
    None if a block is too long (or its rows lie too far apart) for that.
    """
    index = valid.nonzero()[:, 0]
    count = len(index)
    if leaders is None:
        ends = list(range(size, count, size)) + ([count] if count else [])
    else:
        possible = _block_ends(leaders[index].long(), len(valid))
        ends = []
        while count and (not ends or ends[-1] < count):
            begin = ends[-1] if ends else 0
            at = bisect_right(possible, begin + size) - 1
            if at < 0 or possible[at] <= begin:
                return None
            ends.append(possible[at])
    borders = list(zip([0, *ends], ends, strict=False))
    if count == len(valid):
        return [slice(a, b) for a, b in borders]
    return [index[a:b] for a, b in borders]


def _block_ends(leaders: Tensor, n_rows: int) -> list[int]:
    """Counts of leading rows that hold whole blocks only, rising."""
    position = torch.arange(len(leaders), device=leaders.device)
    last = torch.zeros(n_rows, dtype=torch.int64, device=leaders.device)
    last.scatter_reduce_(0, leaders, position, "amax")
    reach = last[leaders].cummax(0).values
    ends: list[int] = (position[reach == position] + 1).tolist()
    return ends


def take(x: Tensor, rows: Rows) -> Tensor:
    """x[rows]: a view where the rows are consecutive."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def put(x: Tensor, rows: Rows, values: Tensor) -> None:
    """x[rows] = values, along the first dimension."""
    if isinstance(rows, slice):
        x[rows] = values
    else:
        x.index_copy_(0, rows, values)
