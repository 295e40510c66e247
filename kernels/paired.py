"""What the passes over both vocabularies share: tiles of two tensors, side by side."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .common import ALIGNMENT, is_aligned, vector_width

DIRECTIONS = {"reverse": 0, "forward": 1, "jsd": 2}


def access(*tensors: Tensor) -> dict[str, int]:
    """How tiles of tensors [B, T, _] may be read: by VECTOR elements, from which boundaries.

    ALIGNED: every row of each starts on a boundary. CONGRUENT: each row starts equally far beyond
    one in all of them.
    """
    vector = min(vector_width(x) for x in tensors)  # one layout for both dtypes
    aligned = all(is_aligned(x, vector_width(x)) for x in tensors)
    first, *others = tensors
    congruent = all(x.data_ptr() % ALIGNMENT == 0 for x in tensors) and all(
        (a - b) % vector == 0
        for x in others
        for a, b, n in zip(first.stride()[:2], x.stride()[:2], x.shape[:2], strict=True)
        if n > 1
    )
    return dict(ALIGNED=aligned, CONGRUENT=congruent and not aligned, VECTOR=vector)


def has_fast_log2(x: Tensor) -> bool:
    """Whether a logarithm can be one instruction, off by 2^-22 at most around 1.

    Triton's own takes 26 on NVIDIA; on AMD it is near one already.
    """
    return x.is_cuda and torch.version.hip is None


@triton.jit
def both_log_probs(
    x, y, scale_log2, teacher_scale_log2, top, log_sum, teacher_top, teacher_log_sum
):
    """Logarithms of base 2 of the masses of student and teacher; those of the sums likewise.

    The tops are those of x and y, before the scales: large products would round apart from those
    that the sums were taken of, and the masses would no longer sum to 1.
    """
    log_p = (x - top) * scale_log2 - log_sum
    log_q = (y - teacher_top) * teacher_scale_log2 - teacher_log_sum
    return log_p, log_q


@triton.jit
def ratio_to_mixture(difference, beta, FAST_LOG2: tl.constexpr):
    """r = q / p and log2(m / p), for log2 r = `difference` and the mixture m."""
    ratio = tl.exp2(difference)
    mixture = (1.0 - beta) + beta * ratio
    if FAST_LOG2:
        return ratio, libdevice.fast_log2f(mixture)
    return ratio, tl.log2(mixture)


@triton.jit
def row_offset(row, length, stride_batch, stride_row):
    """Elements before row `row` [int32] of a tensor [B, T, _]; the division is one of 32 bits."""
    return (row // length).to(tl.int64) * stride_batch + (row % length).to(tl.int64) * stride_row


@triton.jit
def row_pointers(
    logits, teacher, row, length, stride_batch, stride_row, teacher_stride_batch,
    teacher_stride_row, ALIGNED: tl.constexpr, CONGRUENT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Where the tiles of a row start in both tensors, and how many elements before the row.

    Where all allows it, that is on a boundary of VECTOR elements; see `access`.
    """
    offset = row_offset(row, length, stride_batch, stride_row)
    teacher_offset = row_offset(row, length, teacher_stride_batch, teacher_stride_row)
    shift = 0
    if CONGRUENT:
        shift = (offset % VECTOR).to(tl.int32)
    if ALIGNED or CONGRUENT:
        x = logits + tl.multiple_of(offset - shift, VECTOR)
        y = teacher + tl.multiple_of(teacher_offset - shift, VECTOR)
    else:
        x = logits + offset
        y = teacher + teacher_offset
    return x, y, shift
