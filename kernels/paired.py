"""What the passes over both vocabularies share: tiles of two tensors, side by side."""

import triton
import triton.language as tl
from torch import Tensor

from .common import ALIGNMENT, LOG2_E, TINY, is_aligned, vector_width

DIRECTIONS = {"reverse": 0, "forward": 1, "jsd": 2}
LOWEST = tl.constexpr(-1e30)  # stands for -inf where 0 * -inf would be NaN


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


@triton.jit
def both_log_probs(x, y, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum):
    """Log-probs of student and teacher; a word without mass is at LOWEST. NaN stays.

    The tops are those of x and y, before the scales: large products would round apart from those
    that the sums were taken of, and the masses would no longer sum to 1.
    """
    LOWEST_: tl.constexpr = LOWEST
    log_p = (x - top) * scale - log_sum
    log_q = (y - teacher_top) * teacher_scale - teacher_log_sum
    log_p = tl.where(log_p < LOWEST_, LOWEST_, log_p)
    return log_p, tl.where(log_q < LOWEST_, LOWEST_, log_q)


@triton.jit
def mixture(log_p, log_q, beta):
    """p, q and log m of the mixture m."""
    LOG2_E_: tl.constexpr = LOG2_E
    TINY_: tl.constexpr = TINY
    p = tl.exp2(log_p * LOG2_E_)
    q = tl.exp2(log_q * LOG2_E_)
    m = beta * q + (1.0 - beta) * p
    return p, q, tl.log(tl.where(m < TINY_, TINY_, m))


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


@triton.jit
def load_tiles(x_pointers, y_pointers, inside):
    """Both tiles in float32; beyond the row -inf, which no sum counts.

    Logits below LOWEST, as of words masked with the lowest finite number, become -inf: they have no
    mass, and a temperature under 1 would make them infinite where sums no longer expect it.
    """
    LOWEST_: tl.constexpr = LOWEST
    if inside is None:
        x = tl.load(x_pointers)
        y = tl.load(y_pointers)
    else:
        x = tl.load(x_pointers, mask=inside, other=-float("inf"))
        y = tl.load(y_pointers, mask=inside, other=-float("inf"))
    x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.where(x < LOWEST_, -float("inf"), x), tl.where(y < LOWEST_, -float("inf"), y)
