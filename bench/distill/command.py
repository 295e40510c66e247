"""`drift-gate distill`: from settings to a table, a report and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import measure
from . import cost, files, findings, progress, report
from .evaluation import benchmarks_of, training_problems
from .jobs import Work
from .models import WEIGHTS, check_pair
from .settings import Settings, jobs
from .workers import all_tasks, one_thread, run_all

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
    """Do what is still to be done; write `report.json` and `report.png`, and print what they say.

    Raises:
        Interrupted, Failed, CannotWrite: see `run_all`.
    """
    everything = jobs(work.settings)
    pending = all_tasks(work, everything)
    with progress.bars(console) as bars:
        run_all(pending, workers, progress.Shown(bars, work, everything).take)
    summary = report.summarize(work, everything)
    words = findings.in_words(summary["rows"], report.labels(summary["rows"]))
    with console.status("time and memory of the losses"), one_thread(work):
        costs = cost.measure(work)
    found = dict(
        settings=work.settings.to_json(),
        machine=measure.environment(torch.device(work.settings.device)),
        in_words=words,
        **summary,
        loss_cost=costs,
    )
    from .picture import draw  # matplotlib takes a second to import

    image = draw(found, [(job, work.done(job.key)) for job in everything])
    report_file, picture = work.out / "report.json", work.out / "report.png"
    files.write({report_file: files.as_json(found), picture: image})
    console.print(*report.tables(summary, work.settings), sep="\n")
    console.print(f"{report_file} and {picture.name}", highlight=False)
    console.print(*words, sep="\n", highlight=False)
    return found
