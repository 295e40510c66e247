"""`scan`: one read of the logits gives every statistic the losses need.

For a row z = scale * logits[row] and ids i_1 .. i_K:

    maximum = max_v z_v                 log_sum = log sum_v exp(z_v - maximum)
    gathered_k = z[i_k]                 log_probs_k = scale * (logits[i_k] - max logits) - log_sum
    entropy = log_sum - sum_v p_v (z_v - maximum)

and where a row has a label beside its list, the label's log-prob.

`maximum` and `log_sum` stay apart: subtracting their rounded sum from a large logit loses digits.
So do large products with the scale, which come after the difference where both are at hand.

Each lane keeps its own running maximum and sums (see `lanes`); they are reduced once, after the
loop over the vocabulary. Where rows are too few to fill the device, several programs share a row
and `_combine` folds their partial statistics in fixed order.

Bytes that must move: N * V * itemsize read, O(N K) besides.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lanes as threads
from .common import (
    ALIGNMENT,
    LOG2_E,
    ceil_div,
    power_of_2,
    programs_wanted,
    rows_aligned,
    vector_width,
)
from .lanes import LOWEST, lanes, load_lanes, move, top_of, words
from .launch import launch

# Rows of up to so many words: (warps of a program, 16-byte loads in flight of each thread).
# What a program does once a row (its launch, the sums over its warps, the gather) takes as long as
# some tiles. Short rows go to smaller programs, of which a multiprocessor holds more at a time.
TILES = ((65_536, 2, 4), (2**31, 4, 4))
WAVES = 4  # programs wanted, as multiples of those that run at once: the last wave is rarely full


@triton.jit
def _accumulate(
    xs, maximum, total, moment, scale_log2, WITH_ENTROPY: tl.constexpr, LOADS: tl.constexpr
):
    """Fold a tile into the lanes' running statistics."""
    LOWEST_: tl.constexpr = LOWEST
    new = top_of(xs, maximum, LOADS)
    shift, delta = move(maximum, new)
    carry = tl.exp2(delta * scale_log2)
    if WITH_ENTROPY:
        moment = (moment + total * delta) * carry
    total *= carry
    for i in tl.static_range(LOADS):
        centred = xs[i] - shift[:, None]
        weight = tl.exp2(centred * scale_log2)
        if WITH_ENTROPY:  # a weight of 0 times -inf counts 0; a weight of NaN stays
            moment += tl.sum(weight * tl.maximum(centred, LOWEST_), 1)
        total += tl.sum(weight, 1)
    return new, total, moment


@triton.jit
def _reduce(maximum, total, moment, scale_log2):
    """Fold lanes (or partial statistics of one row) into one."""
    top = tl.max(maximum, 0)
    _, delta = move(maximum, top)
    carry = tl.exp2(delta * scale_log2)
    return top, tl.sum(total * carry, 0), tl.sum((moment + total * delta) * carry, 0)


@triton.jit
def _store_entries(
    row_logits, row, live, column, k, maximum, log_sum, gathered, log_probs, vocab, scale,
    K: tl.constexpr,
):  # fmt: skip
    """Gather the entries `column` of a row, which are the k-th of its list."""
    readable = (column >= 0) & (column < vocab) & live
    x = tl.load(row_logits + column, mask=readable, other=float("nan")).to(tl.float32)
    tl.store(gathered + row * K + k, tl.where(live, x * scale, 0.0), mask=k < K)
    log_prob = (x - maximum) * scale - log_sum
    tl.store(log_probs + row * K + k, tl.where(live, log_prob, 0.0), mask=k < K)


@triton.jit
def _finish(
    row_logits,  # the row's first logit
    row,
    live,  # False: an ignored row, every output is 0
    column,  # the first BLOCK_K ids of the row
    maximum,
    total,
    moment,
    ids,
    labels,
    gathered,
    log_probs,
    of_labels,
    maximum_out,
    log_sum_out,
    entropy_out,
    vocab,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather the listed entries of the row and store its statistics."""
    log_sum = tl.log(total)
    tl.store(maximum_out + row, tl.where(live, maximum * scale, 0.0))
    tl.store(log_sum_out + row, tl.where(live, log_sum, 0.0))
    if entropy_out is not None:
        entropy = log_sum - scale * moment / total
        tl.store(entropy_out + row, tl.where(live, entropy, 0.0))
    if labels is not None:
        label = tl.load(labels + row)
        known = (label >= 0) & (label < vocab) & live
        x = tl.load(row_logits + label, mask=known, other=float("nan")).to(tl.float32)
        tl.store(of_labels + row, tl.where(live, (x - maximum) * scale - log_sum, 0.0))
    k = tl.arange(0, BLOCK_K)
    _store_entries(
        row_logits, row, live, column, k, maximum, log_sum, gathered, log_probs, vocab, scale, K
    )
    for start in range(BLOCK_K, K, BLOCK_K):
        column = tl.load(ids + row * K + start + k, mask=start + k < K, other=-1)
        _store_entries(
            row_logits, row, live, column, start + k, maximum, log_sum, gathered, log_probs, vocab,
            scale, K,
        )  # fmt: skip


@triton.jit
def _scan(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    ids,  # [N, K] int32 or int64
    labels,  # [N] int32 or int64, or None
    valid,  # [N] uint8, or None
    gathered,  # [N, K] float32 out
    log_probs,  # [N, K] float32 out
    of_labels,  # [N] float32 out: log-probs of the labels
    maximum_out,  # [N] float32 out
    log_sum_out,  # [N] float32 out
    entropy_out,  # [N] float32 out, or None
    partials,  # [3, N, SPLITS] float32 out: maximum, sum, moment; only where SPLITS > 1
    stride_batch,
    stride_row,
    n_rows,
    length,  # T
    vocab,  # V
    scale,  # 1 / temperature
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    WITH_ENTROPY: tl.constexpr = entropy_out is not None
    LOG2_E_: tl.constexpr = LOG2_E
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    offset = (row // length) * stride_batch + (row % length) * stride_row
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    # Tiles start on 16-byte boundaries; in the first one, `shift` elements lie before the row.
    shift = 0
    if not ALIGNED:
        shift = (offset % VECTOR).to(tl.int32)
    aligned = tl.multiple_of(offset - shift, VECTOR)
    word = words(LANES, VECTOR)
    pointers = logits + aligned + word
    # The ids are under way while the row is read.
    k = tl.arange(0, BLOCK_K)
    column = tl.load(ids + row * K + k, mask=k < K, other=-1)

    full = (vocab + shift) // TILE  # tiles [0, full) end inside the row
    tiles = (vocab + shift + TILE - 1) // TILE
    first = split * tiles // SPLITS
    last = (split + 1) * tiles // SPLITS
    last = tl.where(live, last, first)

    scale_log2 = scale * LOG2_E_
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    begin = first
    if not ALIGNED:
        if (first == 0) & (last > 0):
            xs = load_lanes(pointers, word, shift, vocab + shift, LOADS, True)
            maximum, total, moment = _accumulate(
                xs, maximum, total, moment, scale_log2, WITH_ENTROPY, LOADS
            )
        begin = tl.maximum(first, 1)
    for tile in range(begin, tl.minimum(last, full)):
        xs = load_lanes(pointers + tile * TILE, word, 0, TILE, LOADS, False)
        maximum, total, moment = _accumulate(
            xs, maximum, total, moment, scale_log2, WITH_ENTROPY, LOADS
        )
    if (full >= begin) & (full < last):
        rest = vocab + shift - full * TILE
        xs = load_lanes(pointers + full * TILE, word, 0, rest, LOADS, True)
        maximum, total, moment = _accumulate(
            xs, maximum, total, moment, scale_log2, WITH_ENTROPY, LOADS
        )
    top, row_total, row_moment = _reduce(maximum, total, moment, scale_log2)
    if SPLITS == 1:
        _finish(
            logits + offset, row, live, column, top, row_total, row_moment, ids, labels, gathered,
            log_probs, of_labels, maximum_out, log_sum_out, entropy_out, vocab, scale, K, BLOCK_K,
        )  # fmt: skip
    else:
        tl.store(partials + row * SPLITS + split, top)
        tl.store(partials + (row + n_rows) * SPLITS + split, row_total)
        tl.store(partials + (row + 2 * n_rows) * SPLITS + split, row_moment)


@triton.jit
def _combine(
    logits,  # [B, T, V]
    ids,  # [N, K]
    labels,  # [N], or None
    valid,  # [N] uint8, or None
    gathered,  # [N, K] out
    log_probs,  # [N, K] out
    of_labels,  # [N] out
    maximum_out,  # [N] out
    log_sum_out,  # [N] out
    entropy_out,  # [N] out, or None
    partials,  # [3, N, SPLITS]
    stride_batch,
    stride_row,
    n_rows,
    length,
    vocab,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    LOG2_E_: tl.constexpr = LOG2_E
    row = tl.program_id(0).to(tl.int64)
    offset = (row // length) * stride_batch + (row % length) * stride_row
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    k = tl.arange(0, BLOCK_K)
    column = tl.load(ids + row * K + k, mask=k < K, other=-1)
    split = tl.arange(0, SPLITS)
    maximum = tl.load(partials + row * SPLITS + split)
    total = tl.load(partials + (row + n_rows) * SPLITS + split)
    moment = tl.load(partials + (row + 2 * n_rows) * SPLITS + split)
    top, row_total, row_moment = _reduce(maximum, total, moment, scale * LOG2_E_)
    _finish(
        logits + offset, row, live, column, top, row_total, row_moment, ids, labels, gathered,
        log_probs, of_labels, maximum_out, log_sum_out, entropy_out, vocab, scale, K, BLOCK_K,
    )  # fmt: skip


def _splits(rows: int, tiles: int, at_once: int) -> int:
    """Programs per row, a power of two: one where the rows alone fill the device WAVES times.

    A program has two tiles at least, unless a row has but one.
    """
    wanted = ceil_div(WAVES * at_once, max(rows, 1))
    return min(power_of_2(wanted), 1 << max(tiles // 2, 1).bit_length() - 1, 64)


@functools.lru_cache(maxsize=256)
def _plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    on_boundary: bool,
    vector: int,
    k: int,
    at_once: int,
    tiles: tuple[tuple[int, int, int], ...],
    warp: int,  # of `lanes`
) -> tuple[int, int, dict[str, Any], dict[str, Any]]:
    """Programs a row; warps, and what `_scan` and `_combine` are compiled with."""
    batch, length, vocab = shape
    warps, loads = next(tile[1:] for tile in tiles if vocab <= tile[0])
    tile = lanes(vocab, vector, warps, loads)
    of_row = ceil_div(vocab, tile["LOADS"] * tile["LANES"] * vector)
    splits = _splits(batch * length, of_row, at_once)
    options = dict(K=k, BLOCK_K=min(power_of_2(k), 256), SPLITS=splits)
    aligned = on_boundary and rows_aligned(shape, strides, vector)
    return splits, warps, {**options, "ALIGNED": aligned, **tile}, options


def scan(
    logits: Tensor,  # [B, T, V] bfloat16, float16 or float32; last dimension contiguous
    ids: Tensor,  # [N, K] int32 or int64, contiguous
    valid: Tensor | None,  # [N] bool
    scale: float,  # 1 / temperature
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (gathered [N, K], log_probs [N, K], maximum [N], log_sum [N], entropy [N] or [0]).

    All float32. Rows that are not valid are not read and give 0. An id outside the vocabulary is
    not read and gives NaN.
    """
    return _read(logits, ids, None, valid, scale, with_entropy)[:5]


def scan_lists(
    logits: Tensor,
    labels: Tensor,  # [N] int32 or int64, contiguous
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan`, and the labels' log-probs [N]; a label outside the vocabulary gives NaN."""
    return _read(logits, ids, labels, valid, scale, with_entropy)


def _read(
    logits: Tensor,
    ids: Tensor,
    labels: Tensor | None,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, strides = logits.shape, logits.stride()
    rows, k = ids.shape
    splits, warps, options, last = _plan(
        shape, strides, logits.data_ptr() % ALIGNMENT == 0, vector_width(logits), k,
        programs_wanted(logits.device), TILES, threads.WARP,
    )  # fmt: skip
    new = dict(dtype=torch.float32, device=logits.device)
    gathered, log_probs = torch.empty(rows, k, **new), torch.empty(rows, k, **new)
    maximum, log_sum = torch.empty(rows, **new), torch.empty(rows, **new)
    entropy = torch.empty(rows if with_entropy else 0, **new)
    of_labels = maximum if labels is None else torch.empty(rows, **new)
    partials = torch.empty(3, rows, splits, **new) if splits > 1 else None
    if rows:
        arguments = (
            logits, ids, labels, None if valid is None else valid.view(torch.uint8), gathered,
            log_probs, None if labels is None else of_labels, maximum, log_sum,
            entropy if with_entropy else None, partials, *strides[:2], rows, *shape[1:], scale,
        )  # fmt: skip
        launch(_scan, (rows * splits,), *arguments, **options, num_warps=warps)
        if splits > 1:
            launch(_combine, (rows,), *arguments, **last, num_warps=1)
    return gathered, log_probs, maximum, log_sum, entropy, of_labels
