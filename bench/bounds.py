"""How long a call may take, and until when a case may be measured."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple


class TooLong(BaseException):
    """A call was stopped by its limit. No Exception: what is measured may catch those."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop the block after so long, by TooLong, once the call that is running returns to Python.

    Without a limit where it is infinite, outside the main thread, and where there are no alarms.
    """
    here = threading.current_thread() is threading.main_thread()
    if math.isinf(seconds) or not here or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, before)
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Bounds(NamedTuple):
    """Of one case. The baseline and this package run whatever they take, unless the end is hard."""

    rounds: int
    end: float = math.inf  # of time.monotonic(): no round is begun that would pass it
    slow: float = 1.5  # times the baseline: a peer that takes longer is called once
    slowest: float = 5.0  # times the baseline: a call is stopped there
    slack: float = 5.0  # seconds beside that, and what nobody minds
    compiling: float = 90.0  # seconds more for a first call that compiles
    hard: bool = False  # nothing goes on beyond the end, nor what is set up

    def limit(self, baseline: float, compiles: bool) -> float:
        """Seconds that a peer's call may take, by those of the baseline's.

        compiles: whether this call may compile.
        """
        return self.slowest * baseline + self.slack + self.compiling * compiles

    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def most(self) -> float:
        """Seconds that whoever must run may take."""
        return self.left() if self.hard else math.inf

    @property
    def spent(self) -> bool:
        """Whether a hard end has come."""
        return self.most() <= 0

    def is_slow(self, seconds: float, baseline: float) -> bool:
        """Whether a peer's call takes so long that its time need be known no better."""
        return seconds > self.slack and seconds > self.slow * baseline
