"""Run the suites: `python -m pytest bench/suites/test_scan.py`, or `drift-gate bench scan`.

A test is one implementation on one case. The implementations of a case are measured together, when
the first of them is asked for; see harness.py.
"""

from __future__ import annotations

import importlib
import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import pytest
import torch
from drift_gate.bench import harness, record, sweep, timing, train_step
from drift_gate.bench.bounds import Bounds
from drift_gate.bench.cases import GRIDS, Case
from drift_gate.bench.harness import UNREACHED, Implementation, Suite
from drift_gate.bench.host import Entry, HostSuite
from drift_gate.bench.measure import device_name
from drift_gate.bench.record import Result
from drift_gate.bench.replay import CLOCK

TUNED = "gather", "select", "sparse"  # whose tiles --bench-tiles may set: they are constants
WRITTEN = 2.0  # seconds between two writes; one more comes at the end, however it comes
AnySuite = Suite | HostSuite | train_step.StepSuite
Measured = tuple[AnySuite, Case, Implementation | Entry | train_step.Entry]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "microbenchmarks of drift_gate")
    group.addoption("--bench-grid", choices=GRIDS, default="star", help="sizes to measure")
    group.addoption("--bench-device", default=None, help="cpu, cuda or cuda:N")
    group.addoption("--bench-budget", type=float, default=600, help="seconds, shared by the suites")
    group.addoption("--bench-rounds", type=int, default=5, help="paired rounds")
    group.addoption("--bench-tiles", type=Path, default=None, help="a sweep's, whose best to use")
    group.addoption("--bench-out", type=Path, default=None, help="file of the results (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Session(config)
    if config.getoption("--bench-tiles") is not None:
        config.add_cleanup(_use_tiles(config.getoption("--bench-tiles")))
    before = signal.signal(signal.SIGTERM, _interrupt)
    config.add_cleanup(lambda: signal.signal(signal.SIGTERM, before))


def _use_tiles(path: Path) -> Callable[[], None]:
    """Set what a sweep found faster, and write it beside the figures; the way back."""
    stack = ExitStack()
    for name, settings in sweep.best(path, TUNED).items():
        module = importlib.import_module(f"drift_gate.kernels.{name}")
        stack.enter_context(sweep.configured(module, (), settings))
        harness.TILES[name] = str(settings)
        print(f"{name}: {settings}")
    return stack.close


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does: with what there is."""
    raise KeyboardInterrupt


class Session:
    """What has been measured so far, and the time that is left."""

    def __init__(self, config: pytest.Config) -> None:
        name = config.getoption("--bench-device")
        self.device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.grid = config.getoption("--bench-grid")
        self.rounds = config.getoption("--bench-rounds")
        self.end = time.monotonic() + config.getoption("--bench-budget")
        self.out = config.getoption("--bench-out")
        self.wanted: dict[str, dict[Case, list[str]]] = {}
        self.results: dict[tuple[str, Case], dict[str, Result]] = {}
        self.failed: dict[tuple[str, Case], str] = {}
        self.written = -math.inf
        self.suite_end = self.end
        self.fixed = self.per_item = 0.0  # seconds of a case of this suite: at all; for a logit

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def of_case(self, suite: AnySuite, case: Case) -> dict[str, Result]:
        """Measured now, unless it was before. Skips what the budget does not reach."""
        key = suite.name, case
        if key in self.failed:  # and would take as long again
            pytest.fail(self.failed[key], pytrace=False)
        if key in self.results:
            return self.results[key]
        timing.copy_bandwidth(self.device)  # measured once: no time of this case
        now, items = time.monotonic(), _items(case)
        bounds = Bounds(self.rounds, self.end_of(suite, case, now), hard=self.grid != "targets")
        if bounds.spent:
            pytest.skip(UNREACHED)

        def keep(results: dict[str, Result]) -> None:
            self.results[key] = results
            if time.monotonic() - self.written > WRITTEN:
                self.write()

        try:
            found = suite.measure(case, self.device, bounds, self.wanted[suite.name][case], keep)
        except Exception as error:
            self.failed[key] = f"{type(error).__name__}: {error}"
            raise
        self.write()
        spent = time.monotonic() - now
        steady = sum(sum(r.samples) + 2 * r.median for r in found.values() if r.seconds)
        self.fixed, self.per_item = max(spent - steady, 1e-3), steady / items
        return found

    def end_of(self, suite: AnySuite, case: Case, now: float) -> float:
        """Until when a case may take. Skips it where its suite has no time left.

        Of the README's rows none is skipped, and each has its share of the time that is left. In
        the grid quick, where the suites come by importance, what comes first takes what it needs;
        in the others so within each suite, of which all have the same.
        """
        if self.grid == "targets":
            weights = {
                (name, one): _items(one) * (2 if one.hidden else 1) * len(who)
                for name, wanted in self.wanted.items()
                for one, who in wanted.items()
                if (name, one) not in self.results
            }
            share = weights[suite.name, case] / sum(weights.values())
            return now + share * max(self.end - now, 0)
        if not any(name == suite.name for name, _ in self.results):
            left = len(self.wanted) - len({name for name, _ in self.results})
            share = 1 if self.grid == "quick" else max(left, 1)
            self.suite_end = now + max(self.end - now, 0) / share
            self.fixed = self.per_item = 0.0
        if now + self.fixed + self.per_item * _items(case) > self.suite_end and self.fixed:
            pytest.skip(UNREACHED)
        return self.suite_end

    def write(self) -> None:
        """Everything so far: what is cut short keeps what it has."""
        if self.out is None:
            folder = record.results_folder()
            self.out = record.new_path(folder, device_name(self.device), [self.grid, *self.wanted])
        record.write(self.out, [r for found in self.results.values() for r in found.values()])
        self.written = time.monotonic()


def _items(case: Case) -> int:
    return case.rows * max(case.vocab, case.k, 1)


KEY = pytest.StashKey[Session]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite: AnySuite = metafunc.module.SUITE
    session = metafunc.config.stash[KEY]
    cases = suite.cases(session.grid, session.on_gpu)
    pairs = [
        (suite, case, each) for case in cases for each in suite.chosen(session.grid, session.on_gpu)
    ]
    names = [f"{case}: {each.name}" for _, case, each in pairs]
    metafunc.parametrize("measured", pairs, indirect=True, ids=names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A suite without a size in this grid has one item, without parameters: it goes."""
    items[:] = [i for i in items if isinstance(i.callspec.params["measured"], tuple)]
    for item in items:
        suite, case, _ = item.callspec.params["measured"]
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=f"{suite.name}: {case}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only what is left after deselection is measured."""
    wanted = session.config.stash[KEY].wanted
    for item in session.items:
        suite, case, each = item.callspec.params["measured"]
        wanted.setdefault(suite.name, {}).setdefault(case, []).append(each.name)


def pytest_sessionfinish(session: pytest.Session) -> None:
    bench = session.config.stash[KEY]
    if bench.results:
        bench.write()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Result:
    """The measurement of one implementation on one case."""
    suite, case, implementation = request.param
    found = request.config.stash[KEY].of_case(suite, case)
    if implementation.name not in found:
        pytest.skip(f"{implementation.name} has no part in this work")
    return found[implementation.name]
