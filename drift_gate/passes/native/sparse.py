"""Gradients of listed words of a head in C: entries in the order of their words, and their sums."""

import torch
from torch import Tensor

from ..memory import empty
from .jobs import BY_WORD, WORD_SUMS
from .library import (
    CPU,
    INT64,
    NO_MEMORY,
    floats,
    function,
    listed,
    no_memory,
    rows_of,
    run,
)


def by_word(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Entries of ids [N, K] sorted by word: where each word's start [V + 1], and their order [N K].

    The entries of a word keep their order; those without a word come last.
    """
    ids, count = listed(ids), ids.numel()
    starts = torch.empty(vocab + 1, dtype=INT64, device=CPU)
    order = torch.empty(count, dtype=INT64, device=CPU)
    job = BY_WORD.pack(
        count, vocab, ids.data_ptr(), ids.dtype is INT64, starts.data_ptr(), order.data_ptr()
    )
    if function("by_word", False)(job, 0, count) == NO_MEMORY:
        raise no_memory()
    return starts, order


def sum_words(
    hidden: Tensor,  # [N, H] of KINDS, last dimension contiguous
    slope: Tensor,  # [N, K] float32
    starts: Tensor,  # [V + 1], from by_word
    order: Tensor,  # [N K], from by_word
) -> Tensor:
    """Row v: the sum of slope * hidden over the entries of word v, in float32, rounded once to the
    dtype of hidden; [V, H]."""
    (n, k), vocab, width = slope.shape, starts.numel() - 1, hidden.shape[1]
    starts, order = listed(starts, vocab + 1, INT64), listed(order, n * k, INT64)
    _slope, (slope_at,) = floats(n * k, slope)
    out = empty((vocab, width), hidden.dtype, CPU)
    job = WORD_SUMS.pack(
        *rows_of(hidden[None], n), *rows_of(out[None], vocab), width, k, slope_at,
        starts.data_ptr(), order.data_ptr(),
    )  # fmt: skip
    run("sum_words", job, vocab, width)
    return out
