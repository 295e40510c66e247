"""The loop of `drift-gate fuzz`: draw, judge, count, shrink, save; and replay of what was saved."""

import contextlib
import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Flaky

from ..passes.backends import triton_on_cpu
from .bias import Bias
from .choices import recorded
from .evaluate import Problem, build
from .functions import FUNCTIONS
from .memory import nan_filled_memory
from .strategies import problems
from .verdict import faults

BATCH = 200  # problems that hypothesis draws before it starts afresh: what it remembers grows
VERSION = 3  # of saved cases: another where choices have other names
CHANCE = "This problem does not fail in every run: threads, memory or time decide."


class Mismatch(AssertionError):
    """A problem's results are not the reference's."""


@dataclasses.dataclass
class Tally:
    """What has been run so far."""

    cases: int = 0
    seconds: float = 0.0
    functions: Counter[str] = dataclasses.field(default_factory=Counter)
    options: dict[str, Counter[Any]] = dataclasses.field(default_factory=dict)
    bias: Bias = dataclasses.field(default_factory=Bias)
    failure: dict[str, Any] | None = None
    """The shrunk problem, as a file holds it, with what was wrong."""

    def count(self, problem: Problem) -> None:
        self.cases += 1
        self.functions[problem.name] += 1
        for name, (options, value) in problem.choices.offered.items():
            counter = self.options.setdefault(name, Counter())
            for option in options:
                counter.setdefault(option, 0)
            counter[value] += 1

    def coverage(self) -> tuple[int, int]:
        """Options that were taken, and that were offered."""
        counts = [n for counter in self.options.values() for n in counter.values()]
        return sum(n > 0 for n in counts), len(counts)

    def rate(self) -> float:
        return self.cases / max(self.seconds, 1e-9)


@contextlib.contextmanager
def prepared(backends: Sequence[str], device: torch.device) -> Iterator[None]:
    """Uninitialised memory is NaN; kernels on the CPU are interpreted, with exact bounds."""
    with contextlib.ExitStack() as stack:
        if "triton" in backends and device.type == "cpu":
            from . import interpreter

            for context in (interpreter.corrected(), interpreter.sanitize(), triton_on_cpu()):
                stack.enter_context(context)
        else:
            stack.enter_context(nan_filled_memory())
        yield


def judge(problem: Problem, bias: Bias | None = None) -> None:
    """Raise Mismatch with every fault of the problem, exceptions of the backend included."""
    try:
        found, *results = faults(problem)
    except Exception as error:  # what a backend may raise is not known
        where = traceback.format_exc(limit=-4)
        raise Mismatch(f"{type(error).__name__}: {error}\n{where}") from error
    if found:
        raise Mismatch("\n".join(found))
    if bias is not None:
        bias.add(problem.name, *results)


def fuzz(
    backends: tuple[str, ...],
    device: torch.device,
    *,
    seed: int,
    cases: int,
    seconds: float = float("inf"),
    functions: tuple[str, ...] = tuple(FUNCTIONS),
    progress: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Run that many cases, each on one of the backends, or for so long; stop at the first
    failure, shrunk."""
    tally, begin = Tally(), time.perf_counter()
    batch = 0
    while tally.cases < cases and tally.failure is None:
        if time.perf_counter() - begin > seconds:
            break
        count = min(BATCH, cases - tally.cases)
        _batch(tally, backends, device, functions, count, f"{seed}:{batch}", begin, progress)
        batch += 1
    tally.seconds = time.perf_counter() - begin
    return tally


def _batch(
    tally: Tally,
    backends: tuple[str, ...],
    device: torch.device,
    functions: tuple[str, ...],
    count: int,
    seed: str,
    begin: float,
    progress: Callable[[Tally], None],
) -> None:
    failed: list[tuple[Problem, str]] = []

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        backend="hypothesis",
    )
    @given(problems(functions, backends, device))
    def run(problem: Problem) -> None:
        if not failed:
            tally.count(problem)
        tally.seconds = time.perf_counter() - begin
        progress(tally)
        try:
            judge(problem, tally.bias)
        except Mismatch as mismatch:
            failed.append((problem, str(mismatch)))
            raise

    with prepared(backends, device):
        try:
            run()
        except (Mismatch, Flaky) as error:
            if not failed:
                raise
            problem, wrong = failed[-1]  # hypothesis runs the smallest one last
            if isinstance(error, Flaky):  # what failed has passed when it ran again
                wrong = f"{wrong}\n{CHANCE}"
            tally.failure = save(problem, wrong)


def save(problem: Problem, wrong: str) -> dict[str, Any]:
    """A problem as a file holds it."""
    return {
        "version": VERSION,
        "torch": str(torch.__version__),
        "backend": problem.backend,
        "wrong": wrong.splitlines(),
        "problem": problem.saved(),
    }


def replay(case: dict[str, Any], backend: str, device: torch.device) -> str | None:
    """Run one saved problem: what is wrong, or None."""
    choices = dict(case)
    with prepared((backend,), device):
        try:
            judge(build(choices.pop("function"), recorded(choices), (backend,), device))
        except Mismatch as mismatch:
            return str(mismatch)
    return None
