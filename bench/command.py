"""`drift-gate bench`: run suites under pytest with a progress bar, then tables, JSON, pictures."""

from __future__ import annotations

import contextlib
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import compare, growth, record, recorded, report
from .cases import GRIDS
from .harness import UNREACHED
from .measure import device_name
from .names import STEP
from .record import Result

SUITES = Path(__file__).with_name("suites")
DRAWING = 2.0  # seconds that the pictures of a suite may take
ENDING = 3.5  # those of a call that still runs then, of the tables, and of the end of the process
BUDGET, BUDGETS = 600.0, {"quick": 60.0}  # seconds; and of grids that have another


def suite_names() -> list[str]:
    """Files of bench/suites."""
    return sorted(file.stem.removeprefix("test_") for file in SUITES.glob("test_*.py"))


def asked(names: list[str], grid: str | None) -> tuple[list[str], str]:
    """Suites and grid of the command's words, of which one may be the grid: `bench quick`.

    Raises ValueError where a word is neither, or more than one grid is named.
    """
    known = suite_names()
    grids = [name for name in names if name in GRIDS and name not in known]
    suites = [name for name in names if name not in grids]
    if unknown := sorted(set(suites) - set(known)):
        raise ValueError(
            f"no suite or grid {', '.join(unknown)}; suites: {', '.join(known)}; "
            f"grids: {', '.join(GRIDS)}"
        )
    if grid is not None and grid not in GRIDS:
        raise ValueError(f"--grid must be one of {', '.join(GRIDS)}; got {grid!r}")
    if len(chosen := {*grids, *([grid] if grid else [])}) > 1:
        raise ValueError(f"one grid at a time; got {', '.join(sorted(chosen))}")
    return suites or known, (chosen or {"star"}).pop()


FIRST = "opd_loss", "linear_opd_loss", "topk_loss", "linear_topk_loss", "full_loss", "host"


def by_importance(suites: list[str]) -> list[str]:
    """What a budget cuts off comes last."""
    return [name for name in FIRST if name in suites] + [s for s in suites if s not in FIRST]


class Bar:
    """A pytest plugin that moves a progress bar, and keeps what failed."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task = progress, progress.add_task("collecting", total=None)
        self.failures: list[str] = []
        self.unreached = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.progress.update(self.task, description=nodeid.split("[", 1)[-1].rstrip("]")[:70])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.progress.advance(self.task)
        if report.skipped and UNREACHED in report.longreprtext:
            self.unreached += 1
        if report.failed:
            self.failures.append(f"{report.nodeid}: {report.longreprtext.splitlines()[-1]}")


def run(
    suites: list[str], *, device: Any, grid: str, end: float, rounds: int, out: Path | None,
    plots: bool,
) -> bool:  # fmt: skip
    """Measure, print, write and draw until `end`, of time.monotonic().

    Whether everything that must run did.
    """
    left = end - time.monotonic()
    budget = left - min(left / 15, ENDING) - min(left / 5, DRAWING * len(suites)) * plots
    console = Console(file=sys.stdout)
    name = [grid] if suites == suite_names() else [grid, *suites]
    path = out or record.new_path(record.results_folder(), device_name(device), name)
    files = [str(SUITES / f"test_{name}.py") for name in by_importance(suites)]
    options = [
        "-s", "-q", "-p", "no:cacheprovider", f"--rootdir={SUITES}", "-c", "/dev/null",
        "--benchmark-quiet", f"--bench-device={device}", f"--bench-grid={grid}",
        f"--bench-budget={budget}", f"--bench-rounds={rounds}", f"--bench-out={path}",
    ]  # fmt: skip
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    said = io.StringIO()
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = Bar(progress)
        with contextlib.redirect_stdout(said):
            code = pytest.main([*options, *files], plugins=[bar])
    for failure in bar.failures:
        console.print(f"failed: {failure}", style="red", markup=False)
    if code not in (0, 1, pytest.ExitCode.INTERRUPTED) and not bar.failures:
        console.print(said.getvalue(), markup=False)
    if not path.exists():
        return False
    show(console, path, plots, end)
    if bar.unreached:
        console.print(f"{bar.unreached} measurements left out: {UNREACHED}")
    if code == pytest.ExitCode.INTERRUPTED:
        console.print("interrupted: this is what was measured until then", style="red")
    return code == 0


def show(console: Console, path: Path, plots: bool, end: float = math.inf) -> None:
    """Tables and pictures of a file; no picture is begun after the end."""
    results = record.read(path)
    machine = results[0].machine
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for table in report.tables(results, console.width):
        console.print(table, "")
    if any(r.suite != STEP for r in results):
        console.print(report.LEGEND, style="dim")
    for one in growth.found_in(results):
        console.print(report.grown(one))
    console.print(f"written to {path}", soft_wrap=True)
    if plots:
        from .plots import draw

        for picture in draw(results, path, end):
            console.print(f"written to {picture}", soft_wrap=True)


def replay_calls(path: Path, device: Any, rounds: int) -> None:
    """Print what each kind of recorded call costs here, beside an eager loss."""
    console = Console()
    recording = recorded.read(path)
    costs = []
    with console.status("") as status:
        for calls in recording.groups:
            status.update(f"{calls.function}, {recorded.size(calls)}")
            costs.append(recorded.measure(calls, device, rounds))
    where = ", ".join(f"{name} {value}" for name, value in recording.machine.items())
    console.print(where, highlight=False)
    console.print(report.calls_table(recording, costs))
    console.print(recorded.summary(recording, costs, device_name(device)), highlight=False)


def compare_files(first: Path, second: Path) -> None:
    """Print how B differs from A."""
    before, after = record.read(first), record.read(second)
    console = Console()
    for name, results in (("A", before), ("B", after)):
        console.print(f"{name}: {describe(results)}")
    console.print(report.comparison(compare.changes(before, after)))
    only = compare.unmatched(before, after)
    if any(only):
        console.print(f"only in A: {only[0]} measurements; only in B: {only[1]}")


def describe(results: list[Result]) -> str:
    """Where and when results were measured."""
    keys = ("device", "torch", "date", "commit")
    machines = [", ".join(str(r.machine.get(key)) for key in keys) for r in results]
    return "; ".join(dict.fromkeys(machines))
