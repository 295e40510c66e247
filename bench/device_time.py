"""Time of the device alone, without the host that feeds it: a CUDA graph's replay, or kernels.

A call may take longer than its kernels, where Python is slower than they are. A run that does not
synchronise is captured in a CUDA graph, whose replay has no host in it. Of any other the kernels
are summed, as torch.profiler sees them; gaps between them do not count.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .timing import Run, larger_than_l2

Timer = Callable[[], float]  # seconds of one run; what restores its inputs is not timed
GRAPH, KERNELS = "graph", "kernels"
HEAD_START = 2_000_000  # cycles that the device waits, while the host launches a graph behind them


def timer(before: Run, run: Run, device: torch.device) -> tuple[Timer, str] | None:
    """What times the device in a warm run, and how: GRAPH or KERNELS.

    None where neither can be had: no figure of a call is lost for that.
    """
    for prepare, how in ((_replays, GRAPH), (_kernels, KERNELS)):
        try:
            found = prepare(before, run, device)
            if found() > 0:  # a profiler without rights on the device sees nothing
                return found, how
        except Exception:  # what cannot be captured may raise whatever it likes
            torch.cuda.synchronize(device)
    return None


def _replays(before: Run, run: Run, device: torch.device) -> Timer:
    graph = _captured(before, run, device)
    return lambda: _replayed(before, graph, device)


def _kernels(before: Run, run: Run, device: torch.device) -> Timer:
    return lambda: _profiled(before, run, device)


def _captured(before: Run, run: Run, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of the run.

    Raises:
        RuntimeError: the run synchronises, or does something else that a graph cannot.
    """
    side, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    before()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        torch.cuda.set_sync_debug_mode("error")  # found here, it breaks no capture
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    here.wait_stream(side)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()
    torch.cuda.synchronize(device)
    return graph


def _replayed(before: Run, graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        before()
        larger_than_l2(device).zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _profiled(before: Run, run: Run, device: torch.device) -> float:
    events = device_events(_profile(before, run, device))
    return 1e-6 * sum(event.self_device_time_total for event in events)


def _profile(before: Run, run: Run, device: torch.device) -> profile:
    """Of one run alone, whose inputs are in no cache."""
    with torch.cuda.device(device):
        before()
        larger_than_l2(device).zero_()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
    return profiler


def device_events(profiler: profile) -> list:
    """What ran on the device, by name: kernels, copies and fills."""
    return [
        event
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


SHOWN = 60  # characters of a kernel's name


def short_name(kernel: str) -> str:
    """A kernel's name without the namespaces, behind which those of PyTorch differ, cut short."""
    for same in (
        "void ",
        "at::native::",
        "(anonymous namespace)::",
        "at_cuda_detail::cub::detail::",
    ):
        kernel = kernel.replace(same, "")
    return kernel[:SHOWN]


def profiled_call(before: Run, run: Run, device: torch.device) -> dict[str, Any]:
    """What a warm call does, in seconds, for whoever asks where its time goes.

    kernels: by name how many and how long, the longest first; busy: all of them; span: from the
    start of the first to the end of the last, under a profiler, which slows the host down;
    returned: until the call returned to Python, its kernels under way (or waited for); allocated:
    how often memory was asked of the driver in that.
    """
    before()
    torch.cuda.synchronize(device)
    asked = torch.cuda.memory_stats(device).get("num_device_alloc", 0)
    start = time.perf_counter()
    result = run()
    returned = time.perf_counter() - start
    asked = torch.cuda.memory_stats(device).get("num_device_alloc", 0) - asked
    del result
    profiler = _profile(before, run, device)
    ours = [e for e in profiler.events() or [] if e.device_type == DeviceType.CUDA]
    kernels: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in ours:
        kernel = kernels[short_name(event.name)]
        kernel[0] += 1
        kernel[1] += 1e-6 * event.time_range.elapsed_us()
    ends = [(e.time_range.start, e.time_range.end) for e in ours] or [(0, 0)]
    return {
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][1])),
        "busy": sum(seconds for _, seconds in kernels.values()),
        "span": 1e-6 * (max(end for _, end in ends) - min(start for start, _ in ends)),
        "returned": returned,
        "allocated": asked,
    }
