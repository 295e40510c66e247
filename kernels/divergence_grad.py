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

from .common import LOG2_E
from .paired import (
    DIRECTIONS,
    access,
    both_log_probs,
    load_tiles,
    mixture,
    row_offset,
    row_pointers,
)

TILE_BYTES = 8192  # of the wider logits: two 16-byte loads of each in flight per thread
ODD_TILE_BYTES = 4096  # where the edges of a row need masks of their own, which take registers
TILES_PER_PROGRAM = 4
NUM_WARPS = 8


def divergence_grad_bytes(logits: Tensor, teacher: Tensor) -> int:
    """Bytes that `divergence_grad` must move through device memory."""
    rows = teacher.numel() // max(teacher.shape[-1], 1)
    read = teacher.numel() * (logits.element_size() + teacher.element_size())
    return read + logits.numel() * logits.element_size() + rows * (1 + 4 * 6)


@triton.jit
def _tile(
    x_pointers, y_pointers, out_pointers, inside, written, top, log_sum, teacher_top,
    teacher_log_sum, centre, coefficient, scale, teacher_scale, beta, DIRECTION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one tile: 0 where `written` but not `inside`, both None for all."""
    LOG2_E_: tl.constexpr = LOG2_E
    g = tl.zeros(x_pointers.shape, tl.float32)
    if coefficient != 0.0:
        x, y = load_tiles(x_pointers, y_pointers, inside)
        log_p, log_q = both_log_probs(
            x, y, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum
        )
        if DIRECTION == 0:
            g = coefficient * tl.exp2(log_p * LOG2_E_) * (log_p - log_q - centre)
        elif DIRECTION == 1:
            g = coefficient * (tl.exp2(log_p * LOG2_E_) - tl.exp2(log_q * LOG2_E_))
        else:
            p, _, log_m = mixture(log_p, log_q, beta)
            g = coefficient * (1.0 - beta) * p * (log_p - log_m - centre)
        if inside is not None:
            g = tl.where(inside, g, 0.0)
    tl.store(out_pointers, g.to(out_pointers.dtype.element_ty), mask=written)


@triton.jit
def _divergence_grad(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    teacher,  # [B, T, U] likewise, U <= V
    out,  # [B, T, V] dtype of the logits; may be the logits themselves
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
    TILE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    live = tl.load(valid + row) != 0
    coefficient = tl.where(live, tl.load(upstream + row), 0.0) * scale
    top = tl.load(statistics + row)
    log_sum = tl.load(statistics + n_rows + row)
    teacher_top = tl.load(statistics + 2 * n_rows + row)
    teacher_log_sum = tl.load(statistics + 3 * n_rows + row)
    centre = tl.load(statistics + 4 * n_rows + row)
    x_pointers, y_pointers, shift = row_pointers(
        logits, teacher, row, length, stride_batch, stride_row, teacher_stride_batch,
        teacher_stride_row, ALIGNED, CONGRUENT, VECTOR,
    )  # fmt: skip
    out_offset = row_offset(row, length, out_stride_batch, out_stride_row) - shift
    if ALIGNED or CONGRUENT:
        out_offset = tl.multiple_of(out_offset, VECTOR)
    lane = tl.arange(0, TILE)
    tiles = (words + shift + TILE - 1) // TILE
    share = (tiles + chunks - 1) // chunks
    begin = chunk * share
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        start = tile * TILE
        x = x_pointers + start + lane
        y = y_pointers + start + lane
        g = out + out_offset + start + lane
        if (start >= shift) & (start + TILE <= vocab + shift):
            _tile(
                x, y, g, None, None, top, log_sum, teacher_top, teacher_log_sum, centre,
                coefficient, scale, teacher_scale, beta, DIRECTION,
            )  # fmt: skip
        else:
            inside = (start + lane >= shift) & (start + lane < vocab + shift)
            written = (start + lane >= shift) & (start + lane < words + shift)
            _tile(
                x, y, g, inside, written, top, log_sum, teacher_top, teacher_log_sum, centre,
                coefficient, scale, teacher_scale, beta, DIRECTION,
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
    out: Tensor,  # [B, T, V] like logits, any outer strides; may be logits
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
    tile = min(tile_bytes // widest, triton.next_power_of_2(words))
    chunks = triton.cdiv(triton.cdiv(words + tiling["VECTOR"] - 1, tile), TILES_PER_PROGRAM)
    _divergence_grad[(rows * chunks,)](
        logits, teacher, out, statistics, valid.view(torch.uint8), upstream,
        *logits.stride()[:2], *teacher.stride()[:2], *out.stride()[:2],
        rows, length, words, teacher.shape[2], scale, teacher_scale, beta, chunks,
        DIRECTION=DIRECTIONS[direction], **tiling, TILE=tile, num_warps=NUM_WARPS,
    )  # fmt: skip
