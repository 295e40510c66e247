"""Hand a measurement to pytest-benchmark.

Implementations are timed in turn, round by round, and on a GPU by the device's clock; a benchmark
fixture times one function on the host. So the suites measure first, and the fixture's timer, which
is this clock, gives back the durations that were measured.
"""

from __future__ import annotations

from typing import Any

import pytest

from .record import Result


class Clock:
    """A timer that reads a list of durations, two readings each."""

    def __init__(self) -> None:
        self.readings: list[float] = []

    def play(self, durations: list[float]) -> None:
        self.readings = [reading for d in reversed(durations) for reading in (d, 0.0)]

    def __call__(self) -> float:
        return self.readings.pop()


CLOCK = Clock()


def replay(result: Result, benchmark: Any) -> None:
    """Report a result through the fixture: its samples as rounds, the rest as extra_info."""
    benchmark.extra_info.update(result.as_dict())
    if result.left_out is not None:
        pytest.skip(result.left_out)
    samples = result.samples
    CLOCK.play(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))
