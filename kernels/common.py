"""What the passes share: tile widths, alignment, and arithmetic that Triton lacks."""

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))
TINY = tl.constexpr(1.1754944e-38)  # the smallest normal float32
LARGEST_DRIFT = tl.constexpr(2.0**126)  # stands for infinity where a call is a part of its batch

ALIGNMENT = 16  # bytes of the widest load


def ceil_div(n: int, size: int) -> int:
    """Parts of at most `size` in n. Triton's own, made for kernels too, takes microseconds."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n; see `ceil_div`."""
    return 1 << max(n - 1, 0).bit_length()


def vector_width(x: Tensor) -> int:
    """Elements of `x` in one 16-byte access."""
    return ALIGNMENT // x.element_size()


def is_aligned(x: Tensor, vector: int) -> bool:
    """Whether every row of `x [B, T, V]` starts on a 16-byte boundary."""
    return x.data_ptr() % ALIGNMENT == 0 and rows_aligned(x.shape, x.stride(), vector)


def rows_aligned(shape: Sequence[int], strides: Sequence[int], vector: int) -> bool:
    """Whether every row starts as the first one of [B, T, V] does, to 16 bytes."""
    of_rows = zip(strides[:2], shape[:2], strict=True)
    return all(stride % vector == 0 for stride, n in of_rows if n > 1)


def rows_of(x: Tensor) -> Tensor:
    """x [N, H] with its last dimension contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def programs_wanted(device: torch.device) -> int:
    """Programs of 256 threads that fill the device once (a multiprocessor holds 2048 threads)."""
    if device.type != "cuda":
        return 1
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def expm1_negative(x):
    """exp(x) - 1 for x in [-0.7, 0], to float32 rounding: Taylor, remainder below 1e-9."""
    y = 1.0 + x * (1.0 / 10.0)
    y = 1.0 + x * y * (1.0 / 9.0)
    y = 1.0 + x * y * (1.0 / 8.0)
    y = 1.0 + x * y * (1.0 / 7.0)
    y = 1.0 + x * y * (1.0 / 6.0)
    y = 1.0 + x * y * (1.0 / 5.0)
    y = 1.0 + x * y * (1.0 / 4.0)
    y = 1.0 + x * y * (1.0 / 3.0)
    y = 1.0 + x * y * (1.0 / 2.0)
    return x * y
