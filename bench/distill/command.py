"""`drift-gate distill`: from settings to a table, a report and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import measure
from . import cost, files, report
from .evaluation import benchmarks_of, training_problems
from .jobs import BASE, Work
from .models import WEIGHTS, check_pair
from .settings import Job, Settings, jobs
from .workers import all_jobs, one_thread, run_all

SETTINGS = "settings.json"


def start(settings: Settings, out: Path) -> Work:
    """Check everything that can be checked, then make the folder.

    Raises:
        BadFile, BadModel, CannotWrite: the user's files, models or disk do not do.
    """
    benchmarks = benchmarks_of(settings) if settings.eval else {}
    training = training_problems(settings) if settings.train else []
    check_pair(*settings.model_paths())
    files.check_space(out, _bytes_needed(settings))
    work = Work(settings, out, training or training_problems(settings), benchmarks or
                benchmarks_of(settings))  # fmt: skip
    files.write_json(out / SETTINGS, settings.to_json())
    return work


def resume(out: Path) -> Work:
    """The work of a folder that an earlier run has left.

    Raises:
        BadFile, BadModel, CannotWrite: as `start`.
        ValueError: it is no such folder.
    """
    try:
        settings = Settings.from_json(json.loads((out / SETTINGS).read_text()))
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{out} is no folder of an earlier run") from None
    return start(settings, out)


def _bytes_needed(settings: Settings) -> int:
    """For two students with their optimisers' states, and for results."""
    folder = Path(settings.student) if settings.student else WEIGHTS / "student"
    stored = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return 2 * 2 * 3 * stored + (16 << 20)  # stored in half precision: twice that in float32


def run(work: Work, workers: int, console: Console) -> dict[str, Any]:
    """Do what is still to be done; write `report.json` and `report.png`, and print the table.

    Raises:
        Interrupted, Failed, CannotWrite: see `run_all`.
    """
    everything = jobs(work.settings)
    pending = all_jobs(work, everything)
    with _bars(console) as progress:
        run_all(pending, work, workers, Bars(progress, work, everything).show)
    summary = report.summarize(work, everything)
    with console.status("time and memory of the losses"), one_thread(work):
        costs = cost.measure(work)
    found = dict(
        settings=work.settings.to_json(),
        machine=measure.environment(torch.device(work.settings.device)),
        **summary,
        loss_cost=costs,
    )
    from .picture import draw  # matplotlib takes a second to import

    image = draw(found, [(job, work.done(job.key)) for job in everything])
    report_file, picture = work.out / "report.json", work.out / "report.png"
    files.write({report_file: files.as_json(found), picture: image})
    console.print(*report.tables(summary, work.settings), sep="\n")
    console.print(f"{report_file} and {picture.name}", highlight=False)
    return found


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"), TimeElapsedColumn(), console=console,
    )  # fmt: skip


class Bars:
    """A bar a variant, over its seeds and reuse epochs; one for the models before training."""

    def __init__(self, progress: Progress, work: Work, everything: list[Job]) -> None:
        self.progress = progress
        self.names = {job.key: job.variant.name for job in everything}
        self.names |= dict.fromkeys(BASE, "before training")
        steps = work.settings.steps
        self.done = {
            key: (1 if key in BASE else steps) if work.done(key) is not None else 0
            for key in self.names
        }
        self.bars: dict[str, Any] = {}
        self.shown: dict[str, str] = {}
        for name in dict.fromkeys(["before training", *self.names.values()]):
            keys = [key for key in self.names if self.names[key] == name]
            total = sum(1 if key in BASE else steps for key in keys)
            self.bars[name] = progress.add_task(name, total=total, state="", start=False)
            self._advance(name)

    def show(self, key: str, state: dict[str, Any]) -> None:
        """Take a job's news."""
        name = self.names[key]
        bar = self.bars[name]
        self.progress.start_task(bar)
        if key in BASE:
            self.done[key] = 1
        elif "completed" in state:
            self.done[key] = state["completed"]
        if "loss" in state:
            self.shown[name] = "loss {loss:+.4f}  drift {drift:.3f}  gate {gate:.3f}".format(
                **state
            )
        shown = "evaluating" if "evaluating" in state else self.shown.get(name, "")
        self.progress.update(bar, state=shown)
        self._advance(name)
        if self.progress.tasks[bar].finished and "done" in state:
            self.progress.stop_task(bar)

    def _advance(self, name: str) -> None:
        keys = [key for key in self.names if self.names[key] == name]
        self.progress.update(self.bars[name], completed=sum(self.done[key] for key in keys))
