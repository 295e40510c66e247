"""The runs of docs/study_plan.md, in its order and with its choices: `make drift-study`.

python -m drift_gate.bench.distill.plan FOLDER [--part settings|main|others] [--workers N] goes on
with whatever is not finished; Ctrl-C stops it. Every setting has a folder of `drift-gate distill`
in FOLDER.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import command, report
from .jobs import Interrupted, Task, Work
from .progress import whole_cost
from .settings import Settings, jobs
from .workers import Failed, all_tasks, run_all, unfinished

LOSSES = ("OPD", "LSM")
SELECTION_SEED, SELECTION_SEEDS = 100, 3
GAIN = 0.1  # of accuracy over the student's before training, that every run of a setting must have
BANDS = {"small": (0.03, 0.1), "large": (0.1, 0.3)}  # of the mean drift, nats
EARLY = (0.02, 0.45)  # a first seed whose drift lies outside ends a setting's trial
SEEDS = 8
OTHER_SEEDS = 4  # of part 3
WIDE = 0.04  # an interval of the main comparison wider than this gets as many seeds again
PARTS = ("settings", "main", "others")


class Setting(NamedTuple):
    """What decides how far a policy drifts."""

    learning_rate: float
    epochs: int
    gradient_norm: float
    minibatch: int = 32
    warmup: int = 5

    @property
    def name(self) -> str:
        """Of its folders."""
        words = [f"{self.learning_rate:g}", str(self.epochs), f"{self.gradient_norm:g}"]
        for name in ("minibatch", "warmup"):
            if getattr(self, name) != self._field_defaults[name]:
                words.append(f"{name}-{getattr(self, name)}")
        return "-".join(words)

    def settings(self, **own: Any) -> Settings:
        """Of a folder's runs; `own` overrides."""
        return Settings(**{**self._asdict(), "epochs": (self.epochs,), "compile": True, **own})


GRID = [
    Setting(*values)
    for values in itertools.product((2e-4, 5e-4, 1e-3), (4, 8, 16), (0.1, 1.0))
] + [
    Setting(rate, 8, norm, **other)
    for rate in (2e-4, 5e-4)
    for norm in (0.1, 1.0)
    for other in (dict(minibatch=16), dict(warmup=16))
]  # fmt: skip


def folder(root: Path, name: str, settings: Settings) -> Work:
    """One of the study's folders, made if it is not there. What was not compiled goes on so.

    Raises:
        ValueError: it was made with other settings.
    """
    out = root / name
    if not (out / command.SETTINGS).exists():
        return command.start(settings, out)
    work = command.resume(out)
    if dataclasses.replace(work.settings, compile=settings.compile) != settings:
        raise ValueError(f"{out} holds runs with other settings than the plan's")
    return work


def selection(root: Path) -> dict[Setting, Work]:
    """The folders of part 1."""
    chosen = dict(seed=SELECTION_SEED, seeds=SELECTION_SEEDS, variant=LOSSES)
    return {
        setting: folder(root, f"select-{setting.name}", setting.settings(**chosen))
        for setting in GRID
    }


def accuracy(work: Work, key: str) -> float:
    """Share of right responses, the mean over the benchmarks."""
    values = report.values_of(
        [report.result_of(work, key)], "accuracy", work.settings.evaluation_samples
    )
    return float(np.mean([table.mean() for table in values.values()]))


def drift(work: Work, key: str) -> float:
    """Mean |old - new| log-prob in the last epoch over a batch, mean over batches; nats."""
    return _last_drift([report.result_of(work, key)])


def _last_drift(results: list[report.Result]) -> float:
    return float(report.movement_of(results)["drift_abs"][-1])


def stands(work: Work, before: float) -> bool:
    """Whether a setting may still qualify, by the runs that its folder has.

    before: the student's accuracy before training.
    """
    done = [job for job in jobs(work.settings) if work.done(job.key) is not None]
    first = [drift(work, job.key) for job in done if job.seed == SELECTION_SEED]
    return all(accuracy(work, job.key) >= before + GAIN for job in done) and all(
        EARLY[0] <= value <= EARLY[1] for value in first
    )


def drifts(work: Work) -> dict[str, float]:
    """The mean drift of each loss, over the seeds that are finished; nats."""
    found: dict[str, list[report.Result]] = {}
    for job in jobs(work.settings):
        if (result := work.done(job.key)) is not None:
            found.setdefault(job.variant.name, []).append(result)
    return {loss: _last_drift(results) for loss, results in found.items()}


def in_bands(found: dict[str, float]) -> bool:
    """Whether the drift of every loss, from `drifts`, lies in one of the bands."""
    low, high = BANDS["small"][0], BANDS["large"][1]
    return all(low <= value <= high for value in found.values())


def select(root: Path, workers: int) -> None:
    """Part 1: seeds and losses one after the other, in those settings that may still qualify."""
    trials = selection(root)
    first = next(iter(trials.values()))
    run([Task("student", first)], workers, "the student before training")
    before = accuracy(first, "student")
    for number in range(SELECTION_SEEDS * len(LOSSES)):
        left = [work for work in trials.values() if stands(work, before)]
        tasks = [Task(jobs(work.settings)[number], work) for work in left]
        named = tasks[0].key if tasks else "none left"
        run(tasks, workers, f"settings, {named}, {len(left)} of {len(GRID)} left")


def chosen(root: Path) -> dict[str, Setting]:
    """By band, of the settings that qualify the one with the highest accuracy.

    Raises:
        ValueError: part 1 is not finished.
    """
    trials, best = selection(root), {}
    before = accuracy(next(iter(trials.values())), "student")
    for setting, work in trials.items():
        if not stands(work, before):
            continue
        everything = jobs(work.settings)
        if unfinished([Task(job, work) for job in everything]):
            raise ValueError(f"part 1 is not finished: {work.out}")
        drifted = drifts(work)
        if not in_bands(drifted):
            continue
        value = np.mean([accuracy(work, job.key) for job in everything])
        mean = np.mean(list(drifted.values()))
        band = next(name for name, (_, top) in BANDS.items() if mean < top or name == "large")
        if band not in best or value > best[band][0]:
            best[band] = value, setting
    return {band: best[band][1] for band in BANDS if band in best}


def main_folders(root: Path) -> dict[str, Work]:
    """The folders of part 2: of each band, and of the default setting."""
    found = {
        band: folder(root, f"{band}-main", setting.settings(seeds=SEEDS))
        for band, setting in chosen(root).items()
    }
    return {**found, "default": folder(root, "default-main", Settings(seeds=SEEDS))}


def compare(root: Path, workers: int) -> None:
    """Part 2: a seed of every band, then the next; more seeds where an interval is wide."""
    found = main_folders(root)
    bands = {name: work for name, work in found.items() if name in BANDS}
    base = [task for work in bands.values() for task in all_tasks(work, [])]
    run(base, workers, "before training")
    seed_by_seed(list(bands.values()), workers, "main")
    run(all_tasks(found["default"], jobs(found["default"].settings)), workers, "main, default")
    for band, work in bands.items():
        if widest(work) > WIDE:
            settings = dataclasses.replace(work.settings, seed=SEEDS, compile=True)
            more = folder(root, f"{band}-more", settings)
            run(all_tasks(more, jobs(settings)), workers, f"main, {band}, more seeds")


def widest(work: Work) -> float:
    """The widest interval of the main comparisons of a band."""
    rows = report.summarize(work, jobs(work.settings))["rows"]
    intervals = [
        row["gain"][report.METRICS[0]]["interval"] for row in rows if "Block64" in row["name"]
    ]
    return max(high - low for low, high in intervals)


def others(root: Path, workers: int) -> None:
    """Part 3: a seed of every folder of both bands, then the next."""
    works = [
        folder(root, f"{band}-{name}", settings)
        for band, setting in chosen(root).items()
        for name, settings in other_settings(setting).items()
    ]
    seed_by_seed(works, workers, "others")


def other_settings(setting: Setting) -> dict[str, Settings]:
    """Other gates, and what people use instead, by the folder's name."""
    gates = ["Token", "Sequence", "Block64 mean_abs", "Block64 rms", "Block64 max_abs"]
    gates += ["Block64 every 8th", "Block16", "Block32", "Block128"]

    def at(*variants: str, **own: Any) -> Settings:
        return setting.settings(**dict(seeds=OTHER_SEEDS, variant=variants) | own)

    found = {
        "gates": at(*(f"OPD + {gate}" for gate in gates), extra=True),
        "192": at("OPD + Block192", block_size=192),
        "current": at("OPD", advantage="current"),
    }
    found |= {
        f"tau-{tau:g}": at("OPD + Block64", "LSM + Block64", tau=tau) for tau in (0.3, 3.0, 10.0)
    }
    found |= {f"clip-{clip:g}": at("OPD", clip=clip) for clip in (0.1, 0.05)}
    found |= {f"epochs-{epochs}": at("OPD", epochs=(epochs,)) for epochs in (1, 2)}
    found |= {f"rate-{rate:g}": at("OPD", learning_rate=rate) for rate in (1e-4, 5e-5)}
    return found


def seed_by_seed(works: list[Work], workers: int, title: str) -> None:
    """The runs of a seed in every folder, then those of the next."""
    found = [(job, work) for work in works for job in jobs(work.settings)]
    run([Task(*one) for one in sorted(found, key=lambda one: one[0].seed)], workers, title)


def run(tasks: list[Task], workers: int, title: str) -> None:
    """Those that are not finished, a line for each that is."""
    tasks = unfinished(tasks)
    costs = [whole_cost(task.work, task.job) for task in tasks]
    begun, count = time.monotonic(), 0
    if tasks:
        print(f"{title}: {len(tasks)} runs", flush=True)

    def show(key: str, state: dict[str, Any]) -> None:
        nonlocal count
        if "done" in state:
            count += 1
            pace = (time.monotonic() - begun) / sum(costs[:count])
            left = pace * sum(costs[count:]) / 60
            print(f"  {key}: {count} of {len(tasks)}, {left:.0f} min to go", flush=True)

    run_all(tasks, workers, show)


def main() -> None:
    """Run the parts asked for, each after the one before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append", help="all, if left out")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    parts = dict(zip(PARTS, (select, compare, others), strict=True))
    try:
        for name, part in parts.items():
            if given.part is None or name in given.part:
                part(given.folder, given.workers)
    except Interrupted:
        raise SystemExit("interrupted; the same command goes on") from None
    except Failed as error:
        raise SystemExit(f"{error}; the same command goes on") from None


if __name__ == "__main__":
    main()
