"""`expand`: from a few numbers a row to the whole gradient.

Every loss here depends on the logits through logsumexp and K gathered entries, so

    grad_v = scale * (alpha * softmax(z)_v + sum_k beta_k [v = i_k])

and where the entropy has a part in the loss, alpha + gamma * log softmax(z)_v stands for alpha.

One write of the gradient; one read of the logits, and none in rows where alpha is 0. The gradient
may overwrite the logits: each thread reads an element before it writes that element, and the listed
entries come from `gathered`, which `scan` kept. One listed entry is written with its tile; several
are written by a second, small launch.

At a listed entry with p > 1/2, alpha * p + b is formed as alpha * expm1(log p) + (alpha + b): a
sampled token has b = -alpha, and 1 - p would lose its digits as p approaches 1.

Bytes that must move: N * V * itemsize written, the same read in rows where alpha is not 0.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    ALIGNMENT,
    LOG2_E,
    ceil_div,
    expm1_negative,
    power_of_2,
    programs_wanted,
    rows_aligned,
)
from .launch import launch

TILE_BYTES = 8192  # of logits: two 16-byte loads in flight per thread
TILES_PER_PROGRAM = 8  # fewer where rows are few: see `shares`
NUM_WARPS = 8
WAVES = 4  # programs wanted, as multiples of those that run at once: the last wave is rarely full


@triton.jit
def _slope(log_p, alpha, gamma):
    """alpha + gamma log p; where p is 0 the product with it is to be 0."""
    return alpha + gamma * tl.where(log_p < -1e4, -1e4, log_p)


@triton.jit
def _entry(z, b, top, log_sum, alpha, gamma, scale):
    """Gradient at a listed entry whose betas sum to b; gamma may be None."""
    log_p = (z - top) - log_sum
    if gamma is not None:
        alpha = _slope(log_p, alpha, gamma)
    near_one = alpha * expm1_negative(log_p) + (alpha + b)
    g = tl.where(log_p > -0.69, near_one, alpha * tl.exp(log_p) + b)
    return tl.where(alpha == 0.0, b, g) * scale


@triton.jit
def _tile(x_pointers, out_pointers, mask, is_target, target, top, log_sum, alpha, gamma, scale):
    """Write alpha * softmax over one tile, and `target` where `is_target`; each may be None."""
    LOG2_E_: tl.constexpr = LOG2_E
    g = tl.zeros(x_pointers.shape, tl.float32)
    live = alpha != 0.0
    if gamma is not None:
        live = live | (gamma != 0.0)
    if live:
        x = tl.load(x_pointers, mask=mask).to(tl.float32)
        log_p = (x * scale - top) - log_sum
        if gamma is not None:
            g = (_slope(log_p, alpha, gamma) * scale) * tl.exp2(log_p * LOG2_E_)
        else:
            g = (alpha * scale) * tl.exp2(log_p * LOG2_E_)
    if is_target is not None:
        g = tl.where(is_target, target, g)
    tl.store(out_pointers, g.to(out_pointers.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    out,  # [B, T, V] any float dtype; may be the logits themselves
    ids,  # [N, 1] int32 or int64, or None: `_entries` follows
    gathered,  # [N, 1] float32
    maximum,  # [N] float32
    log_sum,  # [N] float32
    valid,  # [N] uint8, or None
    alpha,  # [N] float32, or None: 0, and neither logits nor statistics are read; or -beta
    beta,  # [N, 1] float32, rows `beta_stride` apart
    gamma,  # [N] float32, or None
    stride_batch,
    stride_row,
    out_stride_batch,
    out_stride_row,
    length,  # T
    vocab,  # V
    scale,  # 1 / temperature
    chunks,  # programs per row
    beta_stride,  # of a row
    OF_LABELS: tl.constexpr,  # alpha is minus beta
    ALIGNED: tl.constexpr,  # rows of both tensors start on 16-byte boundaries,
    CONGRUENT: tl.constexpr,  # or lie equally far beyond one
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    offset = (row // length) * stride_batch + (row % length) * stride_row
    out_offset = (row // length) * out_stride_batch + (row % length) * out_stride_row
    lane = tl.arange(0, TILE)
    # Tiles start on 16-byte boundaries; in the first one, `shift` elements lie before the row.
    shift = 0
    if CONGRUENT:
        shift = (offset % VECTOR).to(tl.int32)
    if ALIGNED or CONGRUENT:
        x_pointers = logits + tl.multiple_of(offset - shift, VECTOR) + lane
        out_pointers = out + tl.multiple_of(out_offset - shift, VECTOR) + lane
    else:
        x_pointers = logits + offset + lane
        out_pointers = out + out_offset + lane

    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    weight, top, log_s, z, lean = 0.0, 0.0, 0.0, 0.0, None
    if ids is not None:
        b = tl.where(live, tl.load(beta + row * beta_stride), 0.0)
    if OF_LABELS:
        weight = -b
    elif alpha is not None:
        weight = tl.where(live, tl.load(alpha + row), 0.0)
    if maximum is not None:
        top = tl.load(maximum + row)
        log_s = tl.load(log_sum + row)
    if gamma is not None:
        lean = tl.where(live, tl.load(gamma + row), 0.0)
    target = 0.0
    target_column = -1
    if ids is not None:
        if gathered is not None:
            z = tl.load(gathered + row)
        target = _entry(z, b, top, log_s, weight, lean, scale)
        column = tl.load(ids + row)
        known = (column >= 0) & (column < vocab)
        target_column = tl.where(known, column, -1).to(tl.int32) + shift

    tiles = (vocab + shift + TILE - 1) // TILE
    for tile in range(chunk * tiles // chunks, (chunk + 1) * tiles // chunks):
        start = tile * TILE
        is_target = None
        if ids is not None:
            is_target = start + lane == target_column
        if (start >= shift) & (start + TILE <= vocab + shift):
            _tile(
                x_pointers + start, out_pointers + start, None,
                is_target, target, top, log_s, weight, lean, scale,
            )  # fmt: skip
        else:
            mask = (start + lane >= shift) & (start + lane < vocab + shift)
            _tile(
                x_pointers + start, out_pointers + start, mask,
                is_target, target, top, log_s, weight, lean, scale,
            )  # fmt: skip


@triton.jit
def _entries(
    out,  # [B, T, V]
    ids,  # [N, K] int32 or int64
    gathered,  # [N, K] float32
    maximum,  # [N] float32
    log_sum,  # [N] float32
    valid,  # [N] uint8, or None
    alpha,  # [N] float32, or None: 0, and of the others beta alone is read
    beta,  # [N, K] float32
    gamma,  # [N] float32, or None
    stride_batch,
    stride_row,
    length,
    vocab,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PEERS: tl.constexpr,
):
    """Overwrite the listed entries of a row.

    A launch of its own: Triton's barrier does not order the global stores of two threads on every
    device.
    """
    row = tl.program_id(0).to(tl.int64)
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    offset = (row // length) * stride_batch + (row % length) * stride_row
    weight, top, log_s, lean = 0.0, 0.0, 0.0, None
    if alpha is not None:
        weight = tl.load(alpha + row)
        top = tl.load(maximum + row)
        log_s = tl.load(log_sum + row)
    if gamma is not None:
        lean = tl.load(gamma + row)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        column = tl.load(ids + row * K + k, mask=k < K, other=-1)
        z = tl.zeros([BLOCK_K], tl.float32)
        if alpha is not None:
            z = tl.load(gathered + row * K + k, mask=k < K, other=0.0)
        b = tl.zeros([BLOCK_K], tl.float32)
        for other in range(0, K, PEERS):  # an id listed twice receives both betas
            j = other + tl.arange(0, PEERS)
            peer = tl.load(ids + row * K + j, mask=j < K, other=-1)
            peer_beta = tl.load(beta + row * K + j, mask=j < K, other=0.0)
            same = column[:, None] == peer[None, :]
            b += tl.sum(tl.where(same, peer_beta[None, :], 0.0), 1)
        g = _entry(z, b, top, log_s, weight, lean, scale)
        writable = (column >= 0) & (column < vocab) & live
        tl.store(out + offset + column, g.to(out.dtype.element_ty), mask=writable)


@functools.lru_cache(maxsize=256)
def _plan(
    shape: torch.Size,
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    on_boundary: bool,
    itemsizes: tuple[int, int],
    k: int,
    at_once: int,
    tile_bytes: int,
    most: int,
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Programs a row, and what `_expand` and `_entries` are compiled with."""
    batch, length, vocab = shape
    vector = ALIGNMENT // min(itemsizes)
    aligned = on_boundary and all(rows_aligned(shape, x, vector) for x in (strides, out_strides))
    gaps = [x - y for x, y in zip(strides, out_strides, strict=True)]
    tile = min(tile_bytes // itemsizes[0], power_of_2(vocab))
    chunks = shares(batch * length, ceil_div(vocab + vector - 1, tile), most, at_once)
    return (
        chunks,
        dict(
            ALIGNED=aligned,
            CONGRUENT=on_boundary and not aligned and rows_aligned(shape, gaps, vector),
            TILE=tile,
            VECTOR=vector,
        ),
        dict(K=k, BLOCK_K=min(power_of_2(k), 64), PEERS=16, num_warps=2),
    )


def expand(
    logits: Tensor,  # [B, T, V] bfloat16, float16 or float32; last dimension contiguous
    ids: Tensor,  # [N, K] int32 or int64, contiguous
    maximum: Tensor | None,  # [N] float32, from scan, as the next two; None where alpha is
    log_sum: Tensor | None,  # [N] float32
    gathered: Tensor | None,  # [N, K] float32
    valid: Tensor | None,  # [N] bool
    alpha: Tensor | None,  # [N] float32: d loss / d logsumexp; None: 0, and so is gamma
    beta: Tensor,  # [N, K] float32: d loss / d z[ids]
    scale: float,  # 1 / temperature
    out: Tensor,  # [B, T, V] any float dtype, any outer strides; may be logits
    gamma: Tensor | None = None,  # [N] float32: d loss / d (minus the entropy); None: 0
) -> None:
    """Write d loss / d logits into `out`. Rows that are not valid become 0 and are not read.

    An id outside the vocabulary writes nothing. Ids listed twice in a row receive both betas.
    """
    _write(
        logits, ids, maximum, log_sum, gathered, valid, alpha, beta, scale, out, gamma, False
    )  # fmt: skip


def expand_labels(
    logits: Tensor,
    labels: Tensor,  # [N] int32 or int64, contiguous
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,  # [N, 1]
    valid: Tensor | None,
    slope: Tensor,  # [N] float32: d loss / d log p[label]; any stride
    scale: float,
    out: Tensor,
) -> None:
    """`expand` of a loss that is a function of the labels' log-probs: alpha = -beta."""
    _write(
        logits, labels[:, None], maximum, log_sum, gathered, valid, None, slope, scale, out, None,
        True,
    )  # fmt: skip


def _write(
    logits: Tensor,
    ids: Tensor,
    maximum: Tensor | None,
    log_sum: Tensor | None,
    gathered: Tensor | None,
    valid: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor,
    scale: float,
    out: Tensor,
    gamma: Tensor | None,
    of_labels: bool,
) -> None:
    shape, strides, out_strides = logits.shape, logits.stride(), out.stride()
    rows, k = ids.shape
    if rows == 0:
        return
    on_boundary = (logits.data_ptr() | out.data_ptr()) % ALIGNMENT == 0
    chunks, options, of_entries = _plan(
        shape, strides, out_strides, on_boundary, (logits.itemsize, out.itemsize), k,
        programs_wanted(logits.device), TILE_BYTES, TILES_PER_PROGRAM,
    )  # fmt: skip
    row_data = gathered, maximum, log_sum, None if valid is None else valid.view(torch.uint8)
    coefficients = alpha, beta, gamma
    launch(
        _expand, (rows * chunks,), logits, out, ids if k == 1 else None, *row_data, *coefficients,
        *strides[:2], *out_strides[:2], *shape[1:], scale, chunks, beta.stride(0),
        OF_LABELS=of_labels, **options, num_warps=NUM_WARPS,
    )  # fmt: skip
    if k > 1:
        launch(
            _entries, (rows,), out, ids, *row_data, *coefficients, *out_strides[:2], *shape[1:],
            scale, **of_entries,
        )  # fmt: skip


def shares(rows: int, tiles: int, most: int, at_once: int) -> int:
    """Programs of a row: with `most` tiles each, or as few as fill the device WAVES times."""
    return ceil_div(tiles, min(most, max(rows * tiles // (WAVES * at_once), 1)))
