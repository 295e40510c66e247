"""Tiles of the passes that sum over a row: one lane a thread.

A tile is a tuple of LOADS tensors `[LANES, VECTOR]`, LANES * VECTOR words apart, so that every
thread has LOADS vectors of 16 bytes in flight. Maxima and sums over a lane stay inside its thread,
so a loop over a row has no barrier, and what a thread keeps is rescaled once for LOADS * VECTOR
words.
"""

import torch
import triton
import triton.language as tl

from .common import ceil_div, power_of_2

LOWEST = tl.constexpr(-1e30)  # stands for -inf where 0 * -inf would be NaN
WARP = 64 if torch.version.hip else 32  # threads


def lanes(vocab: int, vector: int, warps: int, loads: int) -> dict[str, int]:
    """The tile of a program of so many warps, less where a row of `vocab` words is shorter."""
    count = min(WARP * warps, power_of_2(ceil_div(vocab, vector)))
    loads = min(loads, power_of_2(ceil_div(vocab, count * vector)))
    return dict(LOADS=loads, LANES=count, VECTOR=vector)


@triton.jit
def words(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The words of a row that the first vector of each lane holds in the first tile."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_lanes(pointers, word, low, high, LOADS: tl.constexpr, MASKED: tl.constexpr):
    """A tile in float32; where MASKED, -inf outside the words [low, high)."""
    STEP: tl.constexpr = pointers.shape[0] * pointers.shape[1]
    xs = ()
    for i in tl.static_range(LOADS):
        if MASKED:
            inside = (word + i * STEP >= low) & (word + i * STEP < high)
            x = tl.load(pointers + i * STEP, mask=inside, other=-float("inf"))
        else:
            x = tl.load(pointers + i * STEP)
        xs += (x.to(tl.float32),)
    return xs


@triton.jit
def top_of(xs, maximum, LOADS: tl.constexpr):
    """The lanes' maxima, and those of a tile."""
    for i in tl.static_range(LOADS):
        maximum = tl.maximum(maximum, tl.max(xs[i], 1))
    return maximum


@triton.jit
def move(maximum, new):
    """(shift, how far the maximum moved): a lane that has seen only -inf so far is at LOWEST."""
    LOWEST_: tl.constexpr = LOWEST
    shift = tl.where(new == -float("inf"), 0.0, new)
    return shift, tl.maximum(maximum - shift, LOWEST_)
