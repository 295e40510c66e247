"""Sparse products of an LM head: K rows of it for each row of hidden states.

    gather        z_nk = hidden_n . W[ids_nk] + bias[ids_nk]
    weigh_words   grad_hidden_n = sum_k slope_nk W[ids_nk]
    sum_words     grad_weight_v = sum over the entries (n, k) with ids_nk = v of slope_nk hidden_n

Each moves N K H elements, most of which the caches hold where rows list the same words, and
`sum_words` writes V H. Its entries are sorted by word first, so that a program adds a word's
entries in their order: no atomics, the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 512  # elements of a row of the head in a tile
ENTRIES = 8  # rows of a tile: loads in flight
NUM_WARPS = 4


@triton.jit
def _gather(
    hidden,  # [N, H], rows `hidden_stride` apart
    weight,  # [V, H], rows `weight_stride` apart
    bias,  # [V], or None
    ids,  # [N, K] int32 or int64
    valid,  # [N] uint8
    out,  # [N, K] float32 out
    hidden_stride,
    weight_stride,
    vocab,
    width,  # H
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(valid + row) != 0
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    word = tl.load(ids + row * K + k, mask=k < K, other=-1).to(tl.int64)
    known = (word >= 0) & (word < vocab) & live
    total = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < width
        h = tl.load(hidden + row * hidden_stride + column, mask=inside & live, other=0.0)
        w = tl.load(
            weight + word[:, None] * weight_stride + column[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        total += w.to(tl.float32) * h.to(tl.float32)[None, :]
    z = tl.sum(total, 1)
    if bias is not None:
        z += tl.load(bias + word, mask=known, other=0.0).to(tl.float32)
    z = tl.where(known, z, float("nan"))
    tl.store(out + row * K + k, tl.where(live, z, 0.0), mask=k < K)


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
def _sum_words(
    hidden,  # [N, H], rows `hidden_stride` apart
    slope,  # [N, K] float32
    starts,  # [V + 1] int64: the first of each word's entries
    order,  # [N K] int64: entries (n K + k) sorted by word
    out,  # [V, H] out, contiguous
    hidden_stride,
    width,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    word = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    begin = tl.load(starts + word)
    end = tl.load(starts + word + 1)
    total = tl.zeros([ENTRIES, WIDTH], tl.float32)
    for first in range(begin, end, ENTRIES):
        at = first + tl.arange(0, ENTRIES)
        live = at < end
        entry = tl.load(order + at, mask=live, other=0)
        s = tl.load(slope + entry, mask=live, other=0.0)
        h = tl.load(
            hidden + (entry // K)[:, None] * hidden_stride + column[None, :],
            mask=live[:, None] & inside[None, :],
            other=0.0,
        )
        total += h.to(tl.float32) * s[:, None]
    result = tl.sum(total, 0)
    tl.store(out + word * width + column, result.to(out.dtype.element_ty), mask=inside)


def _tile(width: int) -> int:
    return min(WIDTH, triton.next_power_of_2(width))


def _rows(x: Tensor) -> Tensor:
    """x [N, H] with its last dimension contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def gather(
    hidden: Tensor,  # [N, H] bfloat16, float16 or float32
    weight: Tensor,  # [V, H] the same dtype
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [N, K] int32 or int64, contiguous
    valid: Tensor,  # [N] bool
) -> Tensor:
    """hidden . W[ids] + bias[ids], [N, K] float32; 0 on invalid rows.

    An id outside the vocabulary is not read and gives NaN.
    """
    hidden, weight = _rows(hidden), _rows(weight)
    (n, k), (vocab, width) = ids.shape, weight.shape
    out = torch.empty(n, k, dtype=torch.float32, device=hidden.device)
    block = min(ENTRIES, triton.next_power_of_2(k))  # for one warp, which needs no barrier
    tile = WIDTH if block == 1 else 512 // weight.element_size()
    if n:
        _gather[(n, triton.cdiv(k, block))](
            hidden, weight, bias, ids, valid.view(torch.uint8), out,
            hidden.stride(0), weight.stride(0), vocab, width,
            K=k, BLOCK_K=block, WIDTH=min(tile, _tile(width)), num_warps=1,
        )  # fmt: skip
    return out


def weigh_words(weight: Tensor, ids: Tensor, slope: Tensor) -> Tensor:
    """sum_k slope_k W[ids_k], [N, H] in the dtype of W [V, H]; ids and slope [N, K].

    Ids outside the vocabulary are no words.
    """
    weight = _rows(weight)
    (n, k), (vocab, width) = ids.shape, weight.shape
    out = torch.empty(n, width, dtype=weight.dtype, device=weight.device)
    tile = _tile(width)
    if n:
        _weigh_words[(n, triton.cdiv(width, tile))](
            weight, ids, slope, out, weight.stride(0), vocab, width,
            K=k, ENTRIES=ENTRIES, WIDTH=tile, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def sum_words(
    hidden: Tensor,  # [N, H]
    slope: Tensor,  # [N, K] float32, contiguous
    starts: Tensor,  # [V + 1] int64: where each word's entries begin in the order
    order: Tensor,  # [N K] int64: entries sorted by word, those without a word last
) -> Tensor:
    """Row v: the sum of slope * hidden over the entries of word v; [V, H] like hidden."""
    hidden = _rows(hidden)
    vocab, width = len(starts) - 1, hidden.shape[1]
    out = torch.empty(vocab, width, dtype=hidden.dtype, device=hidden.device)
    tile = _tile(width)
    _sum_words[(vocab, triton.cdiv(width, tile))](
        hidden, slope, starts, order, out, hidden.stride(0), width,
        K=slope.shape[1], ENTRIES=ENTRIES, WIDTH=tile, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
