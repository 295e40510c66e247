"""Rows of [B, T, V] tensors a few at a time: which, where they lie, and the scratch they pass.

Threads share Python's interpreter lock, and one that has to wait for it sleeps for longer than an
operation on a row takes. So all views are made before the threads start, and a thread's work on a
chunk is a few calls into ATen, which run without the lock.
"""

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

WORDS_PER_THREAD = 1 << 18  # 1 MiB of float32
# Blocks over 32 MiB go back to the system when freed; touching new pages costs more than the work.
MOST_WORDS = 1 << 23
DEVICE_WORDS = 1 << 26  # where there are thousands of threads


class Piece(NamedTuple):
    """Some rows of a tensor: a view where they are consecutive, else all rows and an index."""

    x: Tensor
    chosen: Tensor | None  # [rows] int64

    def read(self) -> Tensor:
        """The rows: a view, or a copy."""
        return self.x if self.chosen is None else self.x.index_select(0, self.chosen)

    def write(self, values: Tensor) -> None:
        """Overwrite the rows, rounding once."""
        if self.chosen is None:
            self.x.copy_(values)
        else:
            self.x.index_copy_(0, self.chosen, values.to(self.x.dtype))

    def zero(self) -> None:
        """Overwrite the rows with 0."""
        if self.chosen is None:
            self.x.zero_()
        else:
            self.x.index_fill_(0, self.chosen, 0)


def accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 data."""
    return torch.promote_types(x.dtype, torch.float32)


def worker_count(logits: Tensor) -> int:
    """Threads that share a pass; other devices share their work themselves."""
    return torch.get_num_threads() if logits.is_cpu else 1


def rows_at_once(logits: Tensor) -> int:
    """How many rows a thread passes through a block of its scratch at once."""
    batch, length, vocab = logits.shape
    most = MOST_WORDS // worker_count(logits)
    words = min(WORDS_PER_THREAD, most) if logits.is_cpu else DEVICE_WORDS
    return max(1, min(batch * length, round(words / vocab)))


def new_scratch(logits: Tensor, blocks: int, size: int) -> list[list[Tensor]]:
    """For each worker, `blocks` blocks [size, V] in the accumulator's dtype."""
    shape = worker_count(logits), blocks, size, logits.shape[2]
    scratch = logits.new_empty(shape, dtype=accumulator(logits))
    return [list(block.unbind()) for block in scratch.unbind()]


def cut(blocks: list[Tensor], count: int) -> list[Tensor]:
    """The first `count` rows of each."""
    return blocks if len(blocks[0]) == count else [block[:count] for block in blocks]


def sequences(
    tensors: tuple[Tensor, ...],  # [B, T, V]
    row_data: tuple[Tensor | None, ...],  # [N] or [N, 1]
) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """Views [rows, V] and [rows, ...] of all rows where the strides allow it, else of each b."""
    batch, length, _ = tensors[0].shape
    if batch < 2 or length < 2 or all(x.stride(0) == length * x.stride(1) for x in tensors):
        yield [x.view(batch * length, x.shape[2]) for x in tensors], list(row_data)
        return
    for b in range(batch):
        rows = slice(b * length, (b + 1) * length)
        yield [x[b] for x in tensors], [None if x is None else x[rows] for x in row_data]


def chunks(
    mask: Tensor | None, size: int, *tensors: Tensor | None
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The rows that the mask selects, in order, at most `size` at a time.

    For each chunk: the number of its rows, and those rows of each tensor, None for None.
    """
    count = next(len(x) for x in tensors if x is not None)
    if mask is None or bool(mask.all()):
        # All views of a tensor in one call.
        views = [repeat(None) if x is None else torch.split(x, size) for x in tensors]
        numbers = range(0, count, size)
        for i, *parts in zip(numbers, *views, strict=False):
            yield min(size, count - i), tuple(x if x is None else Piece(x, None) for x in parts)
        return
    selected = mask.nonzero()[:, 0].tolist()
    for i in range(0, len(selected), size):
        rows = selected[i : i + size]
        n = len(rows)
        if rows[-1] - rows[0] + 1 == n:
            parts = [x if x is None else x.narrow(0, rows[0], n) for x in tensors]
            yield n, tuple(x if x is None else Piece(x, None) for x in parts)
        else:
            index = torch.tensor(rows, device=mask.device)
            yield n, tuple(x if x is None else Piece(x, index) for x in tensors)


def spread(values: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The rows of `values` [k, selected] as k tensors [N], with 0 where the mask is False."""
    if mask is None:
        return tuple(x.clone() for x in values)
    return tuple(x.new_zeros(len(mask)).masked_scatter_(mask, x) for x in values)


def scaled(x: Tensor, scale: float, block: Tensor) -> Tensor:
    """scale * x in the block, [rows, V]; x itself where there is nothing to do."""
    if x.dtype == block.dtype:
        return x if scale == 1 else torch.mul(x, scale, out=block)
    block.copy_(x)
    return block if scale == 1 else block.mul_(scale)
