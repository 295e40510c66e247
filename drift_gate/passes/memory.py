"""Memory for tensors of the size of the logits or of a head."""

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
MADV_HUGEPAGE = 14  # of Linux


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor for a gradient.

    On a CPU the system is asked for huge pages, where they are left to the program: to touch a new
    gradient in pages of 4 KiB takes half as long as to compute it.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.is_cpu and out.nbytes >= 2 * HUGE_PAGE:
        first = -(-out.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        size = (out.data_ptr() + out.nbytes - first) // HUGE_PAGE * HUGE_PAGE
        advise = _madvise()
        if advise is not None:
            advise(first, size, MADV_HUGEPAGE)  # an error means that there are none
    return out


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Linux's madvise(address, bytes, advice); None elsewhere."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
