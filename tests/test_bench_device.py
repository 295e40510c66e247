"""Time of the device alone: by a graph where a run can be captured, else by its kernels."""

from __future__ import annotations

import pytest
import torch
from drift_gate.bench import device_time, timing

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def nothing() -> None:
    """There is nothing to prepare."""


def test_a_run_is_replayed_and_one_that_synchronises_is_summed():
    x = torch.randn(1 << 26, device=DEVICE)

    def run() -> object:
        return x * 2

    def waits() -> object:
        return x * 2, float(x[0])

    replayed, how = device_time.timer(nothing, run, DEVICE)
    summed, other = device_time.timer(nothing, waits, DEVICE)
    assert (how, other) == (device_time.GRAPH, device_time.KERNELS)
    seconds = min(replayed() for _ in range(5))
    assert 0.5 < min(summed() for _ in range(5)) / seconds < 2
    events = min(timing.launches(run, DEVICE, 5))
    assert 0.5 < events / seconds < 2
    assert torch.equal(run(), x * 2)  # a failed capture leaves no trace


def test_what_restores_the_inputs_is_not_timed():
    x = torch.randn(1 << 24, device=DEVICE)
    large = torch.randn(1 << 28, device=DEVICE)
    copies = []

    def before() -> None:
        copies.append(large * 2)
        copies.clear()

    timer, _ = device_time.timer(before, lambda: x.mul_(1.0), DEVICE)
    alone, _ = device_time.timer(nothing, lambda: x.mul_(1.0), DEVICE)
    assert min(timer() for _ in range(5)) < 3 * min(alone() for _ in range(5))


def test_a_call_tells_its_kernels():
    x = torch.randn(1 << 22, device=DEVICE)

    def run() -> object:
        return (x * 2).sin().sin()

    run()
    found = device_time.profiled_call(nothing, run, DEVICE)
    assert sorted(count for count, _ in found["kernels"].values()) == [1, 2]
    assert 0 < found["busy"] <= 1.05 * found["span"] and found["returned"] > 0
    assert found["allocated"] == 0
