"""Measure the memory that code uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Memory:
    """Bytes of live tensor storage, relative to entry. Set when the block ends."""

    peak: int = 0
    end: int = 0


@contextmanager
def peak_bytes(device: torch.device | str = "cpu") -> Iterator[Memory]:
    """Measure the largest total of live tensor bytes inside the block, ATen's temporaries included.

    Exact on the CPU, from the allocator's own events, and on CUDA, where bytes count as requested
    (before the allocator rounds them up). Storage freed inside that was live at entry counts as
    negative. Not seen: memory outside torch's allocators (numpy, oneDNN scratch, checked kernels).
    """
    memory = Memory()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_stats()["requested_bytes.all.current"]
        yield memory
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        memory.peak = stats["requested_bytes.all.peak"] - start
        memory.end = stats["requested_bytes.all.current"] - start
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield memory
    events = profiler.profiler.kineto_results.events()
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        memory.end += event.nbytes()
        memory.peak = max(memory.peak, memory.end)
