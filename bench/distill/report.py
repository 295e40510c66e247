"""What a folder of runs shows: figures, intervals, and the table in the terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from drift_gate.outputs import is_mostly_rounding

from .evaluation import Floats, pass_at
from .intervals import Bootstrap
from .jobs import BASE, Work
from .settings import PASS_AT, Job

Result = dict[str, Any]
SAMPLED = "sampled_correlation"
DIFFERENCES = "sampled_difference", "sampled_largest_difference"
METRICS = (f"pass@{PASS_AT}", "accuracy")
ONE_SEED = (
    "without an interval, as one seed does not show how far runs of one variant differ (--seeds 5 "
    "does)"
)


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
        low, high = max(low, 0.0), min(high, 1.0)
        by_benchmark = {name: float(table.mean()) for name, table in values.items()}
        found[metric] = dict(benchmarks=by_benchmark, mean=mean, interval=[low, high])
    return found


def difference_of(ours: list[Result], theirs: list[Result], samples: int) -> dict[str, Any]:
    """Ours minus theirs, paired by seed and problem.

    Of one seed without an interval: two runs of one variant differ too, and by how much one pair
    of runs cannot tell.
    """
    found: dict[str, Any] = {}
    for metric in METRICS:
        a, b = (values_of(results, metric, samples) for results in (ours, theirs))
        mean, low, high = Bootstrap().interval({name: a[name] - b[name] for name in a})
        found[metric] = dict(mean=mean, interval=[low, high] if len(ours) > 1 else None)
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
        groups.setdefault((job.variant.name, job.epochs), []).append(result_of(work, job.key))
    variants = {job.variant.name: job.variant for job in jobs}
    rows: list[dict[str, Any]] = []
    for name in BASE:
        figures = figures_of([result_of(work, name)], samples)
        rows.append(dict(name=name, epochs=None, seeds=1, figures=figures))
    start, goal = (row["figures"][METRICS[0]]["mean"] for row in rows)
    for (name, epochs), results in groups.items():
        row: dict[str, Any] = dict(
            name=name, epochs=epochs, seeds=len(results), figures=figures_of(results, samples),
            movement=movement_of(results), gated=variants[name].gate is not None,
        )  # fmt: skip
        mean = row["figures"][METRICS[0]]["mean"]
        row["gap_closed"] = (mean - start) / (goal - start) if goal != start else None
        if against := groups.get((variants[name].baseline or "", epochs)):
            row["gain"] = difference_of(results, against, samples)
        rows.append(row)
    return dict(
        benchmarks={name: len(members) for name, members in work.benchmarks.items()}, rows=rows
    )


def result_of(work: Work, key: str) -> Result:
    """The result of a run that is finished."""
    result = work.done(key)
    assert result is not None, key
    return result


def tables(summary: dict[str, Any], settings: Any) -> list[Table]:
    """For the terminal, in 80 columns; nothing in them depends on the clock."""
    seeds = f"{settings.seeds} seeds" if settings.seeds > 1 else f"seed {settings.seed}"
    several = _several(summary["rows"])
    over, alone = "seeds and problems", ""
    if settings.seeds == 1:
        over, alone = "problems, of this one run", f"; {ONE_SEED}"
    compared = _table(
        f"mean pass@{PASS_AT} from {settings.evaluation_samples} responses to a held-out problem; "
        f"{settings.steps} steps, {seeds}",
        f"95%: interval over {over}. gap: share of the way from student to teacher. "
        f"gain: over the same loss without a gate, paired{alone}."
        + (" xN: every batch used for N epochs." if several else ""),
        f"pass@{PASS_AT}", "95%", "gap", "gain", *(["95%"] if settings.seeds > 1 else []),
    )  # fmt: skip
    detailed = _table(
        f"pass@{PASS_AT} by benchmark",
        "right: share of all responses. drift: mean |old - new| log-prob in the last epoch, "
        "nats. even: effective share of positions under the gate's weights.",
        *summary["benchmarks"], "right", "drift", "even",
    )  # fmt: skip
    for row in summary["rows"]:
        last = row["name"] == BASE[-1]
        compared.add_row(label(row, several), *_comparison(row), end_section=last)
        detailed.add_row(label(row, several), *_details(row), end_section=last)
    sampled = [row for row in summary["rows"] if SAMPLED in row.get("movement", {})]
    detailed.caption += remark(summary["rows"], several)
    return [compared, detailed, *([of_sampling(sampled, several)] if sampled else [])]


def of_sampling(rows: list[dict[str, Any]], several: bool) -> Table:
    """What gates that measure the drift at some positions make of the weights."""
    found = _table(
        "weights of gates that measure some positions, beside those of the drift at all",
        "in the last epoch, means over steps and seeds: correlation, mean and largest difference. "
        "Weights have mean 1.",
        "correlation", "mean", "largest",
    )  # fmt: skip
    for row in rows:
        values = [row["movement"][name][-1] for name in (SAMPLED, *DIFFERENCES)]
        found.add_row(label(row, several), *(f"{value:.4f}" for value in values))
    return found


def remark(rows: list[dict[str, Any]], several: bool) -> str:
    """Whose drift is the rounding of its logits for the most part, in words; "" for nobody's."""
    found = []
    for row in rows:
        moved = row.get("movement", {})  # of earlier versions: without the noise
        drift, noise = (moved.get(name, [0.0])[-1] for name in ("drift_abs", "drift_noise"))
        if is_mostly_rounding(drift, noise):
            found.append(f"{label(row, several)} ({noise:.4f} of {drift:.4f} nats)")
    if not found:
        return ""
    return (
        f" Over half of the drift of {', '.join(found)} is what rounding of the logits alone would "
        "show: the gate reads its own rounding. Head(logits_dtype=torch.float32) keeps it out."
    )


def _table(title: str, caption: str, *columns: str) -> Table:
    found = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1),
    )  # fmt: skip
    found.add_column("", no_wrap=True)
    for name in columns:
        found.add_column(name, justify="right")
    return found


def labels(rows: list[dict[str, Any]]) -> list[str]:
    """Of all rows."""
    return [label(row, _several(rows)) for row in rows]


def _several(rows: list[dict[str, Any]]) -> bool:
    """Whether runs differ in their reuse epochs."""
    return len({row["epochs"] for row in rows[len(BASE) :]}) > 1


def label(row: dict[str, Any], several: bool) -> str:
    """Name of a row, with its reuse epochs where runs differ in them."""
    if not several or row["epochs"] is None:
        return row["name"]
    return f"{row['name']} x{row['epochs']}"


def _comparison(row: dict[str, Any]) -> list[str]:
    passed, gain = row["figures"][METRICS[0]], row.get("gain")
    gap = row.get("gap_closed")
    found = [f"{passed['mean']:.3f}", interval(passed, ".3f")]
    found.append("" if gap is None else f"{gap:.0%}")
    if gain:
        found.append(f"{gain[METRICS[0]]['mean']:+.3f}")
        if gain[METRICS[0]]["interval"]:
            found.append(interval(gain[METRICS[0]], "+.3f"))
    return found


def interval(figure: dict[str, Any], form: str) -> str:
    """Both ends, as text."""
    low, high = figure["interval"]
    return f"{low:{form}} to {high:{form}}"


def with_interval(figure: dict[str, Any], form: str) -> str:
    """A mean and its interval, as text."""
    return f"{figure['mean']:{form}} ({interval(figure, form)})"


def _details(row: dict[str, Any]) -> list[str]:
    passed, accuracy = (row["figures"][metric] for metric in METRICS)
    found = [*passed["benchmarks"].values(), accuracy["mean"]]
    if moved := row.get("movement"):
        found += [moved["drift_abs"][-1], moved["effective_share"][-1]]
    return [f"{value:.3f}" for value in found]
