"""What the runs of docs/study_plan.md showed, as JSON.

python -m drift_gate.bench.distill.drift_report FOLDER takes what `make drift-study` has finished
into bench/results/drift_study.json; then, as without a folder, pages and pictures are made from
there (`drift_page`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import measure
from . import drift_page, files, plan, report
from .drift_pictures import TOGETHER
from .jobs import Task, Work
from .report import METRICS
from .settings import Job, Settings, jobs, variants
from .study import curve_of
from .workers import unfinished


def collect(root: Path) -> dict[str, Any]:
    """Everything that is finished in the study's folder, plain data.

    Raises:
        ValueError: not even the student before training was evaluated.
    """
    trials = plan.selection(root)
    first = next(iter(trials.values()))
    if first.done("student") is None:
        raise ValueError(f"{root} has no finished run")
    before = plan.accuracy(first, "student")
    found = dict(
        machine=measure.environment(torch.device("cpu")),
        before=before,
        trials=[_trial(setting, work, before) for setting, work in trials.items()],
        bands={},
        comparisons=[],
        runs=[],
    )
    try:
        chosen = plan.chosen(root)
    except ValueError:  # part 1 goes on
        return found | dict(finished=False)
    found["bands"] = {band: setting.name for band, setting in chosen.items()}
    folders = plan.main_folders(root)
    gated = []
    for band, work in folders.items():
        runs = _runs_of_band(root, band)
        found["comparisons"] += _comparisons(band, runs, work.settings)
        for name, results in runs.items():
            found["runs"] += [_run(band, name, result) for result in results]
            if name.endswith("Block64"):
                gated += [(band, name, result) for result in results]
    if gated:
        found["collapse"] = _collapse(gated)
    return found | dict(finished=True)


def _trial(setting: plan.Setting, work: Work, before: float) -> dict[str, Any]:
    done = [job for job in jobs(work.settings) if work.done(job.key) is not None]
    left = len(unfinished([Task(job, work) for job in jobs(work.settings)]))
    if not plan.stands(work, before):
        outcome = "dropped"
    elif left:
        outcome = f"{left} to go"
    else:
        outcome = "qualifies" if plan.in_bands(plan.drifts(work)) else "its drift is in no band"
    return dict(
        name=setting.name, **setting._asdict(), outcome=outcome,
        runs=[
            dict(
                variant=job.variant.name, seed=job.seed,
                accuracy=round(plan.accuracy(work, job.key), 4),
                drift=round(plan.drift(work, job.key), 4),
            )
            for job in done
        ],
    )  # fmt: skip


Runs = dict[str, list[dict[str, Any]]]  # results of a variant by seed


def _runs_of_band(root: Path, band: str) -> Runs:
    """Of all the band's folders, in the plan's order.

    What stands in a folder of its own has the folder in its name.
    """
    found: Runs = {}
    for name in ("main", "more", *plan.other_settings(plan.GRID[0])):
        if not (out := root / f"{band}-{name}").exists():
            continue
        work = plan.command.resume(out)
        for job in jobs(work.settings):
            if (result := work.done(job.key)) is not None:
                found.setdefault(_name(job, name), []).append(result)
    return found


def _name(job: Job, folder: str) -> str:
    if folder in ("main", "more", "gates", "192"):
        return job.variant.name
    words = "renewed advantage" if folder == "current" else folder.replace("-", " ", 1)
    return f"{job.variant.name}, {words}"


def _comparisons(band: str, runs: Runs, settings: Settings) -> list[dict[str, Any]]:
    """Each against its loss without a gate; what part 3 adds, against Block64 too."""
    samples, found = settings.evaluation_samples, []
    six = {variant.name for variant in variants(settings)}
    for name, results in runs.items():
        loss = name[:3]
        for other in (loss,) if name in six else (loss, f"{loss} + Block64"):
            ours, theirs = _paired(results, runs.get(other, []))
            if not ours or name == other:
                continue
            moved, beside = (report.movement_of(side) for side in (ours, theirs))
            found.append(
                dict(
                    band=band, name=name, against=other, part=2 if name in six else 3,
                    main=name == f"{other} + Block64", seeds=len(ours),
                    gain=report.difference_of(ours, theirs, samples),
                    means=[_means(side, samples) for side in (ours, theirs)],
                    drift=beside["drift_abs"][-1], own_drift=moved["drift_abs"][-1],
                    even=moved["effective_share"][-1],
                )
            )  # fmt: skip
    return found


def _paired(
    ours: Iterable[dict[str, Any]], theirs: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Those of seeds that both have, in the seeds' order."""
    by_seed = [{result["seed"]: result for result in results} for results in (ours, theirs)]
    common = sorted(by_seed[0].keys() & by_seed[1].keys())
    return [by_seed[0][seed] for seed in common], [by_seed[1][seed] for seed in common]


def _means(results: list[dict[str, Any]], samples: int) -> dict[str, float]:
    figures = report.figures_of(results, samples)
    return {metric: round(figures[metric]["mean"], 4) for metric in METRICS}


def _run(band: str, name: str, result: dict[str, Any]) -> dict[str, Any]:
    return dict(
        band=band, variant=name, seed=result["seed"], right=result["right"],
        curve=curve_of(result),
    )  # fmt: skip


def _collapse(runs: list[tuple[str, str, dict[str, Any]]]) -> dict[str, Any]:
    """Weights by position in every epoch of the run whose accuracy fell furthest from its best.

    runs: band, variant and result. The weights are [epochs over batches, positions / TOGETHER], a
    row as long as the longest response of its batch.
    """
    band, variant, result = max(runs, key=lambda run: _fall(run[2]))
    columns = [weights for step in result["heat_by_epoch"] for weights in step]
    return dict(
        band=band, variant=variant, seed=result["seed"], fall=round(_fall(result), 3),
        epochs=result["epochs"], accuracy=[step["accuracy"] for step in result["curve"]],
        weights=[
            [
                round(float(np.mean(column[i : i + TOGETHER])), 3)
                for i in range(0, len(column), TOGETHER)
            ]
            for column in columns
        ],
    )  # fmt: skip


def _fall(result: dict[str, Any]) -> float:
    """From the highest share of right responses of a batch to a lower one after it."""
    shares = [step["accuracy"] for step in result["curve"]]
    return max(max(shares[:i]) - shares[i] for i in range(1, len(shares)))


def main() -> None:
    """Collect, if there is a folder; then write the pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    if folder is not None:
        files.write({drift_page.RESULTS: files.as_lines(collect(folder))})
    drift_page.write()


if __name__ == "__main__":
    main()
