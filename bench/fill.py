"""A kernel that writes and does nothing else, with the cache hint of its stores."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _fill(out, n, value, HINT: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.zeros([TILE], out.dtype.element_ty) + value
    tl.store(out + at, x, mask=at < n, cache_modifier=HINT)


def fill(out: Tensor, value: int, hint: str, tile: int) -> None:
    """out [n] = value."""
    n = out.numel()
    _fill[(triton.cdiv(n, tile),)](out, n, value, HINT=hint, TILE=tile, num_warps=8)
