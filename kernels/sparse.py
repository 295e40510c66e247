"""Sparse products of an LM head: the gradients of K listed words for each row of hidden states.

    weigh_words   grad_hidden_n = sum_k slope_nk W[ids_nk]
    sum_words     grad_weight_v = sum over the entries (n, k) with ids_nk = v of slope_nk hidden_n

Each moves N K H elements, most of which the caches hold where rows list the same words, and
`sum_words` writes V H.

`sum_words` takes the entries sorted by word (`by_word`), and a program adds a word's entries in
their order. Some words stand in thousands of rows: the sorted entries are cut into segments, and of
a word with more entries than a segment has, one program sums what lies in each segment. A segment
holds parts of two such words at most, the one that ends in it and the one that begins in it, so
two rows of scratch a segment are enough, whatever the lists. No atomics, no counts on the host, and
the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div, power_of_2, rows_of
from .launch import launch

# Elements of a row in a tile, rows of a tile, warps. So narrow a slice of 151,936 words is 39 MB:
# all programs read the same slice at a time, and the second level of the cache keeps it.
WEIGH_WIDTH, WEIGH_ENTRIES, WEIGH_WARPS = 128, 8, 1
SUM_WIDTH, SUM_WARPS = 512, 1
SEGMENT = 64  # entries at least,
SCRATCH = 1 << 24  # and so many that the sums of the segments are about as many float32
KEYS = 4096  # of a program


@triton.jit
def _weigh_words(
    weight,  # [V, H], rows `weight_stride` apart
    ids,  # [N, K]; outside [0, V): no word
    slope,  # [N, K] float32
    out,  # [N, H] out, contiguous
    weight_stride,
    vocab,
    width,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros([ENTRIES, WIDTH], tl.float32)
    for start in range(0, K, ENTRIES):
        k = start + tl.arange(0, ENTRIES)
        word = tl.load(ids + row * K + k, mask=k < K, other=-1).to(tl.int64)
        known = (word >= 0) & (word < vocab)
        s = tl.load(slope + row * K + k, mask=known, other=0.0)
        w = tl.load(
            weight + word[:, None] * weight_stride + column[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        total += w.to(tl.float32) * s[:, None]
    result = tl.sum(total, 0)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_entries(
    hidden, slope, order, column, inside, begin, end, hidden_stride, K: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The sum of slope * hidden over the sorted entries [begin, end), [WIDTH]."""
    total = tl.zeros([WIDTH], tl.float32)
    for at in tl.range(begin, end, loop_unroll_factor=4):
        entry = tl.load(order + at)
        s = tl.load(slope + entry)
        h = tl.load(hidden + (entry // K) * hidden_stride + column, mask=inside, other=0.0)
        total += h.to(tl.float32) * s
    return total


@triton.jit
def _sum_segment(
    hidden, slope, starts, order, partials, word, begin, end, row, column, inside, vocab, width,
    hidden_stride, K: tl.constexpr, SEGMENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row `row` of the partials: the sum of those of the entries [begin, end) that have `word`.

    Nothing is written where the word has few.
    """
    known = word < vocab
    first = tl.load(starts + word, mask=known, other=0)
    last = tl.load(starts + word + 1, mask=known, other=0)
    if last - first > SEGMENT:
        total = _sum_entries(
            hidden, slope, order, column, inside, tl.maximum(begin, first), tl.minimum(end, last),
            hidden_stride, K, WIDTH,
        )  # fmt: skip
        tl.store(partials + row * width + column, total, mask=inside)


@triton.jit
def _sum_segments(
    hidden,  # [N, H], rows `hidden_stride` apart
    slope,  # [N, K] float32
    starts,  # [V + 1] int64: the first of each word's entries
    order,  # [E] int64: entries (n K + k) sorted by word
    words,  # [E] int32: their words; those without a word have V
    partials,  # [segments, 2, H] float32 out: of the first word of a segment, and of its last
    hidden_stride,
    entries,  # E
    vocab,
    width,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    begin = segment * SEGMENT
    end = tl.minimum(begin + SEGMENT, entries)
    word = tl.load(words + begin)
    other = tl.load(words + end - 1)
    _sum_segment(
        hidden, slope, starts, order, partials, word, begin, end, 2 * segment, column, inside,
        vocab, width, hidden_stride, K, SEGMENT, WIDTH,
    )  # fmt: skip
    if other != word:
        _sum_segment(
            hidden, slope, starts, order, partials, other, begin, end, 2 * segment + 1, column,
            inside, vocab, width, hidden_stride, K, SEGMENT, WIDTH,
        )  # fmt: skip


@triton.jit
def _sum_words(
    hidden,  # [N, H], rows `hidden_stride` apart
    slope,  # [N, K] float32
    starts,  # [V + 1] int64: the first of each word's entries
    order,  # [E] int64: entries (n K + k) sorted by word
    partials,  # [segments, 2, H] float32, or None: no word has more entries than a segment
    out,  # [V, H] out, contiguous
    hidden_stride,
    width,
    K: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    begin = tl.load(starts + word)
    end = tl.load(starts + word + 1)
    many = False
    if partials is not None:
        many = end - begin > SEGMENT
    total = _sum_entries(
        hidden, slope, order, column, inside, begin, tl.where(many, begin, end), hidden_stride, K,
        WIDTH,
    )  # fmt: skip
    if partials is not None:
        if many:
            first = begin // SEGMENT
            row = 2 * first + tl.where(begin % SEGMENT == 0, 0, 1)
            total = tl.load(partials + row * width + column, mask=inside, other=0.0)
            for segment in tl.range(first + 1, (end - 1) // SEGMENT + 1, loop_unroll_factor=4):
                at = partials + 2 * segment * width + column
                total += tl.load(at, mask=inside, other=0.0)
    tl.store(out + word * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _keys(ids, keys, entries, vocab, KEYS: tl.constexpr):
    """The word of each entry; V where it has none."""
    at = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    word = tl.load(ids + at, mask=at < entries, other=0)
    word = tl.where((word >= 0) & (word < vocab), word, vocab)
    tl.store(keys + at, word.to(tl.int32), mask=at < entries)


def weigh_words(weight: Tensor, ids: Tensor, slope: Tensor) -> Tensor:
    """sum_k slope_k W[ids_k], [N, H] in the dtype of W [V, H]; ids and slope [N, K].

    Ids outside the vocabulary are no words.
    """
    weight = rows_of(weight)
    (n, k), (vocab, width) = ids.shape, weight.shape
    out = torch.empty(n, width, dtype=weight.dtype, device=weight.device)
    tile = min(WEIGH_WIDTH, power_of_2(width))
    if n:
        launch(
            _weigh_words,
            (n, ceil_div(width, tile)),
            weight,
            ids,
            slope,
            out,
            weight.stride(0),
            vocab,
            width,
            K=k,
            ENTRIES=WEIGH_ENTRIES,
            WIDTH=tile,
            num_warps=WEIGH_WARPS,
        )
    return out


def by_word(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of ids [N, K] sorted by word, as `sum_words` takes them: (starts, order, words).

    starts [V + 1] int64: where each word's entries begin; order [N K] int64: the entries n K + k;
    words [N K] int32. The entries of a word keep their order; those without a word come last.
    """
    ids = ids.contiguous()
    keys = torch.empty(
        ids.numel(), dtype=torch.int32, device=ids.device
    )  # sorted faster than int64
    if ids.numel():
        launch(_keys, (ceil_div(ids.numel(), KEYS),), ids, keys, ids.numel(), vocab, KEYS=KEYS)
    words, order = keys.sort(stable=True)
    every = torch.arange(vocab + 1, dtype=torch.int32, device=ids.device)
    return torch.searchsorted(words, every), order, words


def segment_length(entries: int, width: int) -> int:
    """Entries of a segment, a power of two: the sums of all take some SCRATCH float32 at most."""
    return max(SEGMENT, power_of_2(ceil_div(2 * entries * width, SCRATCH)))


def sum_words(
    hidden: Tensor,  # [N, H]
    slope: Tensor,  # [N, K] float32, contiguous
    starts: Tensor,  # [V + 1], from by_word, as the next two
    order: Tensor,  # [N K]
    words: Tensor,  # [N K]
) -> Tensor:
    """Row v: the sum of slope * hidden over the entries of word v; [V, H] like hidden."""
    hidden = rows_of(hidden)
    vocab, width, entries = len(starts) - 1, hidden.shape[1], len(order)
    out = torch.empty(vocab, width, dtype=hidden.dtype, device=hidden.device)
    tile = min(SUM_WIDTH, power_of_2(width))
    columns, length = ceil_div(width, tile), segment_length(entries, width)
    options = dict(K=slope.shape[1], SEGMENT=length, WIDTH=tile, num_warps=SUM_WARPS)
    partials = None
    if entries > length:
        segments = ceil_div(entries, length)
        partials = torch.empty(segments, 2, width, dtype=torch.float32, device=hidden.device)
        launch(
            _sum_segments,
            (segments, columns),
            hidden,
            slope,
            starts,
            order,
            words,
            partials,
            hidden.stride(0),
            entries,
            vocab,
            width,
            **options,
        )
    launch(
        _sum_words,
        (vocab, columns),
        hidden,
        slope,
        starts,
        order,
        partials,
        out,
        hidden.stride(0),
        width,
        **options,
    )
    return out
