"""Small kernels with one planted fault each, and their sound versions, to test the tools on."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_sum(
    x,  # [N, V], last dimension contiguous
    out,  # [N]
    V,
    row_stride,
    BLOCK: tl.constexpr,
    LOAD_LIMIT_OFFSET: tl.constexpr = 0,  # 1 reads one element past the row
):
    """Sound with one reduction after the loop, where the barriers belong."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = column < V + LOAD_LIMIT_OFFSET
        sums += tl.load(x + row * row_stride + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(sums))


@triton.jit
def row_sum_in_32_bits(x, out, V, row_stride, BLOCK: tl.constexpr):
    """Forgets that row * row_stride may exceed 2^31."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * row_stride + column, mask=column < V, other=0.0)
    tl.store(out + row, tl.sum(values.to(tl.float32)))


@triton.jit
def row_sum_with_barriers(x, out, V, row_stride, BLOCK: tl.constexpr):
    """Reduces across warps in every turn of the loop."""
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(x + row * row_stride + column, mask=column < V, other=0.0)
        total += tl.sum(values.to(tl.float32))
    tl.store(out + row, total)


@triton.jit
def copy(
    x,  # [N]
    out,  # [N], any dtype
    N,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # BLOCK is sound; less makes neighbouring programs store to shared elements
    STORE_LIMIT_OFFSET: tl.constexpr = 0,  # 1 writes one element past the end
):
    index = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    values = tl.load(x + index, mask=index < N, other=0.0)
    values = values + tl.program_id(0) * (BLOCK - STEP)  # racing programs store different values
    live = index < N + STORE_LIMIT_OFFSET
    tl.store(out + index, values.to(out.dtype.element_ty), mask=live)


@triton.jit
def accumulate(x, out, N, BLOCK: tl.constexpr):
    """Adds to `out`, which the launcher forgot to clear: an uninitialised read."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = index < N
    total = tl.load(out + index, mask=live) + tl.load(x + index, mask=live)
    tl.store(out + index, total, mask=live)


@triton.jit
def add_everything(x, out, N, BLOCK: tl.constexpr):
    """Every program adds to one element, atomically: not a race."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out, tl.sum(tl.load(x + index, mask=index < N, other=0.0)))
