"""What a folder of runs shows: figures, intervals, and the table in the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from .evaluation import Bootstrap, Floats, pass_at
from .jobs import BASE, Work
from .settings import PASS_AT, Job

Result = dict[str, Any]
METRICS = (f"pass@{PASS_AT}", "accuracy")


def values_of(results: list[Result], metric: str, samples: int) -> dict[str, Floats]:
    """[seeds, problems] by benchmark."""
    found = {}
    for name in results[0]["right"]:
        right = np.array([result["right"][name] for result in results])
        found[name] = right / samples if metric == "accuracy" else pass_at(PASS_AT, right, samples)
    return found


def figures_of(results: list[Result], samples: int) -> dict[str, Any]:
    """Means by benchmark, their mean, and its interval, for both metrics."""
    found = {}
    for metric in METRICS:
        values = values_of(results, metric, samples)
        mean, low, high = Bootstrap().interval(values)
        by_benchmark = {name: float(table.mean()) for name, table in values.items()}
        found[metric] = dict(benchmarks=by_benchmark, mean=mean, interval=[low, high])
    return found


def difference_of(ours: list[Result], theirs: list[Result], samples: int) -> dict[str, Any]:
    """Ours minus theirs, paired by seed and problem."""
    found = {}
    for metric in METRICS:
        a, b = (values_of(results, metric, samples) for results in (ours, theirs))
        mean, low, high = Bootstrap().interval({name: a[name] - b[name] for name in a})
        found[metric] = dict(mean=mean, interval=[low, high])
    return found


def movement_of(results: list[Result]) -> dict[str, Any]:
    """Drift and gate weights over training: means over steps and seeds, epoch by epoch."""
    names = results[0]["curve"][0]["epochs"][0]
    return {
        name: np.mean(
            [
                [[epoch[name] for epoch in step["epochs"]] for step in result["curve"]]
                for result in results
            ],
            axis=(0, 1),
        ).tolist()
        for name in names
        if name != "loss"
    }


def summarize(work: Work, jobs: list[Job]) -> dict[str, Any]:
    """Figures of the starting student, the teacher and every variant at its reuse epochs."""
    samples = work.settings.evaluation_samples
    groups: dict[tuple[str, int], list[Result]] = {}
    for job in jobs:
        groups.setdefault((job.variant.name, job.epochs), []).append(_finished(work, job.key))
    baselines = {job.variant.name: job.variant.baseline for job in jobs}
    rows: list[dict[str, Any]] = []
    for name in BASE:
        figures = figures_of([_finished(work, name)], samples)
        rows.append(dict(name=name, epochs=None, seeds=1, figures=figures))
    start, goal = (row["figures"][METRICS[0]]["mean"] for row in rows)
    for (name, epochs), results in groups.items():
        row: dict[str, Any] = dict(
            name=name, epochs=epochs, seeds=len(results), figures=figures_of(results, samples),
            movement=movement_of(results),
        )  # fmt: skip
        mean = row["figures"][METRICS[0]]["mean"]
        row["gap_closed"] = (mean - start) / (goal - start) if goal != start else None
        if baselines[name] is not None:
            against = groups[baselines[name], epochs]
            row["gain"] = difference_of(results, against, samples)
        rows.append(row)
    return dict(
        benchmarks={name: len(members) for name, members in work.benchmarks.items()}, rows=rows
    )


def _finished(work: Work, key: str) -> Result:
    result = work.done(key)
    assert result is not None, key
    return result


def table(summary: dict[str, Any], settings: Any) -> Table:
    """For the terminal; nothing in it depends on the clock."""
    seeds = f"{settings.seeds} seeds" if settings.seeds > 1 else f"seed {settings.seed}"
    found = Table(
        title=f"pass@{PASS_AT} of {settings.evaluation_samples} responses to each held-out "
        f"problem; {settings.steps} rollout batches, {seeds}",
        caption=f"mean and gain: mean pass@{PASS_AT} with its 95% interval over problems and "
        "seeds; gain is over the same loss without a gate, paired. gap: share of the way from "
        "student to teacher. drift: mean |old - new| log-prob in the last epoch, nats. even: "
        "effective share of positions under the gate's weights.",
    )
    names = list(summary["benchmarks"])
    several = len({row["epochs"] for row in summary["rows"][len(BASE) :]}) > 1
    found.add_column("", no_wrap=True)
    for name in (*names, "mean", "accuracy", "gap", "gain", "drift", "even"):
        found.add_column(name, justify="right")
    for row in summary["rows"]:
        found.add_row(*cells(row, several), end_section=row["name"] == BASE[-1])
    return found


def label(row: dict[str, Any], several: bool) -> str:
    """Name of a row, with its reuse epochs where runs differ in them."""
    if not several or row["epochs"] is None:
        return row["name"]
    return f"{row['name']}, {row['epochs']} epoch{'s' if row['epochs'] > 1 else ''}"


def cells(row: dict[str, Any], several: bool) -> list[str]:
    """One line of the table, as text."""
    passed, accuracy = (row["figures"][metric] for metric in METRICS)
    low, high = passed["interval"]
    found = [label(row, several), *(f"{value:.3f}" for value in passed["benchmarks"].values())]
    found += [f"{passed['mean']:.3f} ({low:.3f} to {high:.3f})", f"{accuracy['mean']:.3f}"]
    found.append("" if row.get("gap_closed") is None else f"{row['gap_closed']:.0%}")
    if gain := row.get("gain"):
        low, high = gain[METRICS[0]]["interval"]
        found.append(f"{gain[METRICS[0]]['mean']:+.3f} ({low:+.3f} to {high:+.3f})")
    else:
        found.append("")
    moved = row.get("movement")
    shown = [moved["drift_abs"][-1], moved["effective_share"][-1]] if moved else []
    return [*found, *(f"{value:.3f}" for value in shown)]
