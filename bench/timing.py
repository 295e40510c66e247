"""Seconds of runs that are compared: interleaved, so that what disturbs one disturbs all.

CPU: each round runs every implementation once, in turn. GPU: each round queues several launches of
each, between CUDA events; before every launch a buffer larger than the L2 cache is overwritten,
which also keeps the device busy while the host queues the launch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from .measure import quartiles

Run = Callable[[], object]
Seconds = dict[str, list[list[float]]]  # name -> rounds x launches

SHARE = 0.03  # seconds of launches a round and implementation
MOST_LAUNCHES = 20
COPIED = 1 << 28  # bytes of the buffer whose copy gives the bandwidth
GEMM = {"cpu": (256, 8192), "cuda": (4096, 16384)}  # rows and words of the product timed


def interleaved(
    runs: dict[str, tuple[Run, Run]],  # name -> (what is run before and not timed, the run)
    device: torch.device,
    rounds: int,
    end: float = math.inf,
    pause: float = 0.0,
) -> Iterator[Seconds]:
    """Time at most `rounds` rounds of all runs; yields what there is after each of them.

    No round but the first is begun that would last beyond `end`, of time.monotonic(). `pause` are
    seconds of rest before each run of a round: products heat a GPU until it slows down, and what
    comes after them would pay for it.
    """
    found: Seconds = {name: [] for name in runs}
    counts = {name: _count(*pair, device) for name, pair in runs.items()}
    longest = 0.0
    for i in range(rounds):
        start = time.monotonic()
        if i and start + longest > end:
            return
        for name, (before, run) in runs.items():
            time.sleep(pause)
            found[name].append(_time(before, run, device, counts[name]))
        longest = max(longest, time.monotonic() - start)
        yield found


def _count(before: Run, run: Run, device: torch.device) -> int:
    """How many launches fill a share of a round."""
    if device.type != "cuda":
        return 1
    _time(before, run, device, 2)
    estimate = min(_time(before, run, device, 3))
    return max(1, min(MOST_LAUNCHES, round(SHARE / max(estimate, 1e-6))))


def _time(before: Run, run: Run, device: torch.device, count: int) -> list[float]:
    """Seconds of each launch."""
    if device.type != "cuda":
        times = []
        for _ in range(count):
            before()
            start = time.perf_counter()
            result = run()
            times.append(time.perf_counter() - start)
            del result  # freed after the clock has stopped
        return times
    flushed = larger_than_l2(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    with torch.cuda.device(device):
        for start, end in events:
            before()
            flushed.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


@cache
def larger_than_l2(device: torch.device) -> torch.Tensor:
    """A buffer to overwrite: what the L2 cache held is gone."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    return torch.empty(2 * size, dtype=torch.int8, device=device)


def launches(run: Run, device: torch.device, count: int) -> list[float]:
    """Seconds of each of `count` launches of one run."""
    return _time(lambda: None, run, device, count)


def _median(run: Run, device: torch.device, rounds: int = 7) -> float:
    for _ in range(2):
        run()
    return quartiles(launches(run, device, rounds))[1]


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy on the device moves, read and written together."""
    source = torch.ones(COPIED * (4 if device.type == "cuda" else 1), dtype=torch.uint8)
    source = source.to(device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


@cache
def gemm_rate(device: torch.device, dtype: torch.dtype, hidden: int) -> float:
    """Operations a second of a product of that width, hidden states by a slice of a head."""
    rows, words = GEMM[device.type]
    states = torch.randn(rows, hidden, device=device).to(dtype)
    head = torch.randn(words, hidden, device=device).to(dtype)
    return 2 * rows * words * hidden / _median(lambda: states @ head.T, device)
