"""`gather`: listed logits of an LM head, without the others.

    z_nk = hidden_n . W[ids_nk] + bias[ids_nk]

N K H elements of the head are read. Where words are listed again and again, but the head is larger
than the cache, a word has left the cache before it is read again. Then the columns are taken slice
by slice, over all rows: a slice of the head stays in the cache, each element of it is fetched once,
and what the slices of a row add up to is summed in their order by a second launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import ceil_div, power_of_2, rows_of
from .launch import launch

ENTRIES = 8  # words of a program,
TILE_BYTES = 512  # and bytes of a row in its tile
CACHE = 32 << 20  # bytes of a head beyond which it is sliced,
SLICE, SLICE_ENTRIES, SLICE_WARPS = 128, 16, 1  # columns; words of a tile, warps
SUM_TILE = 1024  # entries of a program
SCRATCH = 1 << 24  # float32 for the sums of slices


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
def _gather_slice(
    hidden,  # [N, H], rows `hidden_stride` apart
    weight,  # [V, H], rows `weight_stride` apart
    ids,  # [N, K] int32 or int64
    valid,  # [N] uint8
    parts,  # [slices, N, K] float32 out: of this slice; rows that are not valid are not written
    hidden_stride,
    weight_stride,
    n_rows,
    vocab,
    width,  # H
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(valid + row) != 0:
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        inside = column < width
        h = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
        out = parts + (tl.program_id(1).to(tl.int64) * n_rows + row) * K
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            word = tl.load(ids + row * K + k, mask=k < K, other=-1).to(tl.int64)
            known = (word >= 0) & (word < vocab)
            w = tl.load(
                weight + word[:, None] * weight_stride + column[None, :],
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            z = tl.sum(w.to(tl.float32) * h[None, :], 1)
            tl.store(out + k, z, mask=k < K)


@triton.jit
def _sum_slices(
    parts,  # [slices, N, K] float32
    bias,  # [V], or None
    ids,  # [N, K]
    valid,  # [N] uint8
    out,  # [N, K] float32 out
    entries,  # N K
    slices,
    vocab,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < entries
    live = tl.load(valid + at // K, mask=inside, other=0) != 0
    word = tl.load(ids + at, mask=live, other=-1).to(tl.int64)
    known = (word >= 0) & (word < vocab)
    z = tl.zeros([TILE], tl.float32)
    part = parts + at
    for _ in range(slices):
        z += tl.load(part, mask=inside, other=0.0)  # in vectors: nothing is kept of dead rows
        part += entries
    if bias is not None:
        z += tl.load(bias + word, mask=known, other=0.0).to(tl.float32)
    z = tl.where(known, z, float("nan"))
    tl.store(out + at, tl.where(live, z, 0.0), mask=inside)


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
    hidden, weight = rows_of(hidden), rows_of(weight)
    (n, k), (vocab, width) = ids.shape, weight.shape
    if n * k > vocab and vocab * width * weight.element_size() > CACHE:
        return sliced(hidden, weight, bias, ids, valid.view(torch.uint8))
    out = torch.empty(n, k, dtype=torch.float32, device=hidden.device)
    block = min(ENTRIES, power_of_2(k))  # for one warp, which needs no barrier
    tile = TILE_BYTES * (2 if block == 1 else 1) // weight.element_size()
    if n:
        launch(
            _gather,
            (n, ceil_div(k, block)),
            hidden,
            weight,
            bias,
            ids,
            valid.view(torch.uint8),
            out,
            hidden.stride(0),
            weight.stride(0),
            vocab,
            width,
            K=k,
            BLOCK_K=block,
            WIDTH=min(tile, power_of_2(width)),
            num_warps=1,
        )
    return out


def sliced(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, valid: Tensor
) -> Tensor:
    """`gather` slice by slice, of as many rows at a time as SCRATCH has room for."""
    (n, k), (vocab, width) = ids.shape, weight.shape
    tile = min(SLICE, power_of_2(width))
    slices = ceil_div(width, tile)
    step = max(1, min(n, SCRATCH // (slices * k)))
    out = torch.empty(n, k, dtype=torch.float32, device=hidden.device)
    parts = torch.empty(slices * step * k, dtype=torch.float32, device=hidden.device)
    for first in range(0, n, step):
        at = slice(first, first + step)
        some, mask, rows = ids[at], valid[at], min(step, n - first)
        launch(
            _gather_slice, (rows, slices), hidden[at], weight, some, mask, parts, hidden.stride(0),
            weight.stride(0), rows, vocab, width, K=k, BLOCK_K=min(SLICE_ENTRIES, power_of_2(k)),
            WIDTH=tile, num_warps=SLICE_WARPS,
        )  # fmt: skip
        launch(
            _sum_slices, (ceil_div(rows * k, SUM_TILE),), parts, bias, some, mask, out[at],
            rows * k, slices, vocab, K=k, TILE=SUM_TILE, num_warps=4,
        )  # fmt: skip
    return out
