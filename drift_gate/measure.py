"""Time and memory of a call, as `drift-gate check`, the benchmarks and the tests measure them."""

import gc
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each start and stop


@dataclass
class Memory:
    """Bytes of live tensor storage, relative to entry. Set when the block ends."""

    peak: int = 0
    end: int = 0


@contextmanager
def peak_bytes(device: torch.device | str = "cpu") -> Iterator[Memory]:
    """Measure the largest total of live tensor bytes, temporaries and results included.

    Exact on the CPU, from the allocator's own events, and on CUDA, where bytes count as requested
    (before the allocator rounds them up). Storage freed inside that was live at entry counts as
    negative. Not seen: memory outside torch's allocators (numpy, oneDNN scratch, checked kernels).
    """
    memory, device = Memory(), torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
        yield memory
        torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        memory.peak = stats["requested_bytes.all.peak"] - start
        memory.end = stats["requested_bytes.all.current"] - start
        return
    gc.collect()  # what an earlier run left in cycles is not to be freed inside
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield memory
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        memory.end += event.nbytes()
        memory.peak = max(memory.peak, memory.end)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one run, its result dropped after the clock has stopped."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile)."""
    q = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    low, median, high = q.tolist()
    return low, median, high


def device_name(device: torch.device) -> str:
    """What the vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()
