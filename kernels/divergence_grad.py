"""`divergence_grad`: the gradient of the student's logits from the statistics of `divergence`.

With log p, log q, m and L as there, and c = sum p (log p - log m):

    reverse  dL/dz = p (log p - log q - L)
    forward  dL/dz = p - q
    jsd      dL/dz = (1 - beta) p (log p - log m - c)

times the upstream gradient of the row and scale. The gradient may overwrite the logits: each thread
reads an element before it writes that element.

Bytes that must move: N * U * (itemsize of both) read, N * V * itemsize written. Rows whose upstream
is 0 are written alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, ceil_div, power_of_2, programs_wanted
from .expand import shares
from .lanes import LOWEST
from .launch import launch
from .paired import (
    DIRECTIONS,
    access,
    both_log_probs,
    has_fast_log2,
    ratio_to_mixture,
    row_offset,
    row_pointers,
)

MOST = tl.constexpr(120.0)  # log2 of the largest ratio of masses
TILE_BYTES = 8192  # of the wider logits: two 16-byte loads of each in flight per thread
ODD_TILE_BYTES = 4096  # where the edges of a row need masks of their own, which take registers
TILES_PER_PROGRAM = 4  # fewer where rows are few
NUM_WARPS = 8


@triton.jit
def _tile(
    x_pointers, y_pointers, out_pointers, inside, written, top, log_sum, teacher_top,
    teacher_log_sum, centre, coefficient, scale_log2, teacher_scale_log2, beta,
    DIRECTION: tl.constexpr, FAST_LOG2: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile: 0 where `written` but not `inside`, both None for all.

    Logarithms are of base 2, those of the sums and the centre, too. A word without mass in x gets 0
    from its p, which no other factor may turn into NaN.
    """
    LOWEST_: tl.constexpr = LOWEST
    MOST_: tl.constexpr = MOST
    g = tl.zeros(x_pointers.shape, tl.float32)
    if coefficient != 0.0:
        x = tl.load(x_pointers, mask=inside).to(tl.float32)
        y = tl.load(y_pointers, mask=inside).to(tl.float32)
        log_p, log_q = both_log_probs(
            x, y, scale_log2, teacher_scale_log2, top, log_sum, teacher_top, teacher_log_sum
        )
        p = tl.exp2(log_p)
        if DIRECTION == 0:
            log_p = tl.maximum(log_p, LOWEST_)
            log_q = tl.maximum(log_q, LOWEST_)
            g = coefficient * p * (log_p - log_q - centre)
        elif DIRECTION == 1:
            g = coefficient * (p - tl.exp2(log_q))
        else:
            difference = log_q - log_p
            difference = tl.where(difference < MOST_, difference, MOST_)  # NaN: neither has mass
            _, log_ratio = ratio_to_mixture(difference, beta, FAST_LOG2)
            g = coefficient * p * (-log_ratio - centre)
        if inside is not None:
            g = tl.where(inside, g, 0.0)
    tl.store(out_pointers, g.to(out_pointers.dtype.element_ty), mask=written)


@triton.jit
def _divergence_grad(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    teacher,  # [B, T, U] likewise, U <= V
    out,  # [B, T, V] any float dtype; may be the logits themselves
    statistics,  # [5, N] float32
    valid,  # [N] uint8
    upstream,  # [N] float32
    stride_batch,
    stride_row,
    teacher_stride_batch,
    teacher_stride_row,
    out_stride_batch,
    out_stride_row,
    n_rows,
    length,  # T
    words,  # V
    vocab,  # U
    scale,  # 1 / temperature
    teacher_scale,
    beta,
    chunks,  # programs per row
    DIRECTION: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of all three tensors start on 16-byte boundaries,
    CONGRUENT: tl.constexpr,  # or lie equally far beyond one
    FAST_LOG2: tl.constexpr,
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    tl.static_assert((DIRECTION >= 0) & (DIRECTION <= 2))
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    live = tl.load(valid + row) != 0
    LOG2_E_: tl.constexpr = LOG2_E
    coefficient = tl.where(live, tl.load(upstream + row), 0.0) * scale
    if DIRECTION != 1:
        coefficient /= LOG2_E_  # what it multiplies is in units of log 2
    if DIRECTION == 2:
        coefficient *= 1.0 - beta
    top = tl.load(statistics + row)
    log_sum = tl.load(statistics + n_rows + row) * LOG2_E_
    teacher_top = tl.load(statistics + 2 * n_rows + row)
    teacher_log_sum = tl.load(statistics + 3 * n_rows + row) * LOG2_E_
    centre = tl.load(statistics + 4 * n_rows + row) * LOG2_E_
    scale *= LOG2_E_
    teacher_scale *= LOG2_E_
    x_pointers, y_pointers, shift = row_pointers(
        logits, teacher, row, length, stride_batch, stride_row, teacher_stride_batch,
        teacher_stride_row, ALIGNED, CONGRUENT, VECTOR,
    )  # fmt: skip
    out_offset = row_offset(row, length, out_stride_batch, out_stride_row) - shift
    if ALIGNED or CONGRUENT:
        out_offset = tl.multiple_of(out_offset, VECTOR)
    lane = tl.arange(0, TILE)
    tiles = (words + shift + TILE - 1) // TILE
    for tile in range(chunk * tiles // chunks, (chunk + 1) * tiles // chunks):
        start = tile * TILE
        x = x_pointers + start + lane
        y = y_pointers + start + lane
        g = out + out_offset + start + lane
        if (start >= shift) & (start + TILE <= vocab + shift):
            _tile(
                x, y, g, None, None, top, log_sum, teacher_top, teacher_log_sum, centre,
                coefficient, scale, teacher_scale, beta, DIRECTION, FAST_LOG2,
            )  # fmt: skip
        else:
            inside = (start + lane >= shift) & (start + lane < vocab + shift)
            written = (start + lane >= shift) & (start + lane < words + shift)
            _tile(
                x, y, g, inside, written, top, log_sum, teacher_top, teacher_log_sum, centre,
                coefficient, scale, teacher_scale, beta, DIRECTION, FAST_LOG2,
            )  # fmt: skip


def divergence_grad(
    logits: Tensor,  # [B, T, V], as given to divergence
    teacher: Tensor,  # [B, T, U]
    statistics: Tensor,  # [5, N] float32, from divergence
    valid: Tensor,  # [N] bool
    upstream: Tensor,  # [N] float32
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    out: Tensor,  # [B, T, V] any float dtype, any outer strides; may be logits
) -> None:
    """Write upstream * d loss / d logits into `out`.

    Rows that are not valid, or whose upstream is 0, become 0 and are not read.
    """
    length, words = logits.shape[1:]
    rows = valid.shape[0]
    if rows == 0:
        return
    tiling = access(logits, teacher, out)
    tile_bytes = TILE_BYTES if tiling["ALIGNED"] else ODD_TILE_BYTES
    widest = max(logits.element_size(), teacher.element_size())
    tile = min(tile_bytes // widest, power_of_2(words))
    tiles = ceil_div(words + tiling["VECTOR"] - 1, tile)
    chunks = shares(rows, tiles, TILES_PER_PROGRAM, programs_wanted(logits.device))
    launch(
        _divergence_grad,
        (rows * chunks,),
        logits,
        teacher,
        out,
        statistics,
        valid.view(torch.uint8),
        upstream,
        *logits.stride()[:2],
        *teacher.stride()[:2],
        *out.stride()[:2],
        rows,
        length,
        words,
        teacher.shape[2],
        scale,
        teacher_scale,
        beta,
        chunks,
        DIRECTION=DIRECTIONS[direction],
        FAST_LOG2=has_fast_log2(logits),
        **tiling,
        TILE=tile,
        num_warps=NUM_WARPS,
    )
