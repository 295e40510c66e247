"""Run the suites: `python -m pytest bench/suites/test_scan.py`, or `drift-gate bench scan`.

A test is one implementation on one case. The implementations of a case are measured together, when
the first of them is asked for; see harness.py.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from drift_gate.bench import record
from drift_gate.bench.cases import GRIDS, Case
from drift_gate.bench.harness import Implementation, Suite, measure
from drift_gate.bench.measure import device_name
from drift_gate.bench.record import Result
from drift_gate.bench.replay import CLOCK

Measured = tuple[Suite, Case, Implementation]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "microbenchmarks of drift_gate")
    group.addoption("--bench-grid", choices=GRIDS, default="star", help="sizes to measure")
    group.addoption("--bench-device", default=None, help="cpu, cuda or cuda:N")
    group.addoption("--bench-budget", type=float, default=600, help="seconds, shared by the suites")
    group.addoption("--bench-rounds", type=int, default=5, help="paired rounds")
    group.addoption("--bench-out", type=Path, default=None, help="file of the results (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Session(config)


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
        self.suite_end = self.end
        self.fixed = self.per_item = 0.0  # seconds of a case of this suite: at all; for a logit

    def cases(self, suite: Suite) -> list[Case]:
        return suite.cases(self.grid, self.device.type == "cuda")

    def of_case(self, suite: Suite, case: Case) -> dict[str, Result]:
        """Measured now, unless it was before. Skips what the budget does not reach."""
        if (suite.name, case) in self.results:
            return self.results[suite.name, case]
        if (suite.name, case) in self.failed:  # and would take as long again
            pytest.fail(self.failed[suite.name, case], pytrace=False)
        now, items = time.monotonic(), case.rows * max(case.vocab, case.k, 1)
        if not any(name == suite.name for name, _ in self.results):
            left = len(self.wanted) - len({name for name, _ in self.results})
            self.suite_end = now + max(self.end - now, 0) / max(left, 1)
            self.fixed = self.per_item = 0.0
        if now + self.fixed + self.per_item * items > self.suite_end and self.fixed:
            pytest.skip("the time budget does not reach so far (--bench-budget)")
        wanted = self.wanted[suite.name][case]
        try:
            found = measure(suite, case, self.device, self.rounds, wanted)
        except Exception as error:
            self.failed[suite.name, case] = f"{type(error).__name__}: {error}"
            raise
        self.results[suite.name, case] = found
        spent = time.monotonic() - now
        steady = sum(sum(r.samples) + 2 * r.median for r in found.values() if r.seconds)
        self.fixed, self.per_item = max(spent - steady, 1e-3), steady / items
        self.write()
        return found

    def write(self) -> None:
        """Everything so far: what is cut short keeps what it has."""
        if self.out is None:
            folder = record.results_folder()
            self.out = record.new_path(folder, device_name(self.device), self.wanted)
        record.write(self.out, [r for found in self.results.values() for r in found.values()])


KEY = pytest.StashKey[Session]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite: Suite = metafunc.module.SUITE
    cases = metafunc.config.stash[KEY].cases(suite)
    pairs = [(suite, case, each) for case in cases for each in suite.implementations]
    names = [f"{case}: {each.name}" for _, case, each in pairs]
    metafunc.parametrize("measured", pairs, indirect=True, ids=names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        suite, case, _ = item.callspec.params["measured"]
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, group=f"{suite.name}: {case}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only what is left after deselection is measured."""
    wanted = session.config.stash[KEY].wanted
    for item in session.items:
        suite, case, each = item.callspec.params["measured"]
        wanted.setdefault(suite.name, {}).setdefault(case, []).append(each.name)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Result:
    """The measurement of one implementation on one case."""
    suite, case, implementation = request.param
    found = request.config.stash[KEY].of_case(suite, case)
    if implementation.name not in found:
        pytest.skip(f"{implementation.name} has no part in this work")
    return found[implementation.name]
