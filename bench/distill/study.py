"""The docs' comparison of gated and ungated runs: `make distill-study`, then `readme-table`.

python -m drift_gate.bench.distill.study FOLDER takes the finished runs of a folder of
`drift-gate distill` into bench/results/distill_study.json, and the table of docs/distillation.md
from there. Without a folder it writes the table alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import measure, pages
from . import command, files, report
from .intervals import Bootstrap
from .jobs import BASE, Work
from .report import METRICS
from .settings import Job, jobs

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "distill_study.json"
PAGE = ROOT / "docs" / "distillation.md"
SEEDS_ALONE = (
    " The gains' intervals are over seeds alone, on these problems: the counts by problem were not "
    "kept. Those of pass@8 are percentiles of plain draws."
)
BEGIN, END = "<!-- distillation: make readme-table -->", "<!-- end of distillation -->"


def finished(work: Work) -> list[Job]:
    """The runs of those seeds of which all runs are finished."""
    everything = jobs(work.settings)
    missing = {job.seed for job in everything if work.done(job.key) is None}
    return [job for job in everything if job.seed not in missing]


def collect(work: Work) -> dict[str, Any]:
    """Settings, machine, figures of every variant, and those of each run.

    Raises:
        ValueError: no seed is finished, or the models before training were not evaluated.
    """
    done = finished(work)
    if not done or any(work.done(name) is None for name in BASE):
        raise ValueError(f"{work.out} has no seed of which all runs are finished")
    samples, runs = work.settings.evaluation_samples, []
    for job in done:
        result = report.result_of(work, job.key)
        figures = report.figures_of([result], samples)
        means = {metric: round(figures[metric]["mean"], 5) for metric in METRICS}
        about = dict(variant=job.variant.name, epochs=job.epochs, seed=job.seed)
        runs.append(about | means | dict(right=result["right"], curve=curve_of(result)))
    return dict(
        settings=work.settings.to_json(),
        machine=measure.environment(torch.device(work.settings.device)),
        **report.summarize(work, done),
        runs=runs,
    )


def curve_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each rollout batch: how many responses and prompts were right, and by epoch how far
    positions drifted and which share of them the weights leave."""
    return [
        {name: step[name] for name in ("accuracy", "passed") if name in step}
        | {
            name: [round(epoch[name], 5) for epoch in step["epochs"]]
            for name in ("drift_abs", "effective_share")
        }
        for step in result["curve"]
    ]


def over_seeds(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, their gains' intervals made from the means of each seed's runs.

    Results of earlier versions hold no counts by problem: what is left is whether other seeds would
    show the gain on the same problems.
    """
    means: dict[tuple[str, int], list[dict[str, float]]] = {}
    for run in found["runs"]:
        means.setdefault((run["variant"], run["epochs"]), []).append(run)
    rows = []
    for row in found["rows"]:
        if "gain" in row:
            ours = means[row["name"], row["epochs"]]
            theirs = means[row["name"].split(" + ")[0], row["epochs"]]
            row = {**row, "gain": {metric: _gain_of(ours, theirs, metric) for metric in METRICS}}
        rows.append(row)
    return rows


def _gain_of(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], metric: str
) -> dict[str, Any]:
    pairs = zip(ours, theirs, strict=True)
    differences = np.array([[a[metric] - b[metric]] for a, b in pairs])
    mean, low, high = Bootstrap().interval({"": differences})
    return dict(mean=mean, interval=[low, high] if len(differences) > 1 else None)


def section(found: dict[str, Any] | None) -> list[str]:
    """The page's lines: the table, or that there is none yet."""
    if found is None:
        return ["Gated against ungated runs: not measured."]
    chosen, machine = found["settings"], found["machine"]
    rows = found["rows"]
    seeds = max(row["seeds"] for row in rows)
    kept = all("right" in run for run in found["runs"])
    if not kept:
        rows = over_seeds(found)
    gains = [row["gain"][METRICS[0]]["interval"] for row in rows if "gain" in row]
    up = sum(gain is not None and gain[0] > 0 for gain in gains)
    down = sum(gain is not None and gain[1] < 0 for gain in gains)
    even = [row["movement"]["effective_share"][-1] for row in rows if "gain" in row]
    problems = sum(found["benchmarks"].values())
    lines = [
        f"{seeds} seed{'s' if seeds > 1 else ''}, {chosen['steps']} rollout batches of "
        f"{chosen['prompts']} prompts x {chosen['samples']} samples, mini-batches of "
        f"{chosen['minibatch']}, AdamW at {chosen['learning_rate']:g}; pass@8 from "
        f"{chosen['evaluation_samples']} responses to each of {problems} held-out problems in "
        f"{len(found['benchmarks'])} benchmarks. {machine['device']}, torch {machine['torch']}, "
        f"{machine['date']}, commit {machine['commit']}. In parentheses: 95% intervals, "
        "bootstrapped over problems and seeds; gain: over the same loss without a gate, paired."
        + ("" if kept else SEEDS_ALONE),
        "",
        "| | epochs | mean pass@8 | gain of the gate | accuracy | gap closed | drift, nats |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows),
        "",
        f"Of {len(gains)} gains, {up} lie above 0 by their interval, and {down} below. The "
        f"effective share of positions under the gates' weights was {min(even):.1%} to "
        f"{max(even):.1%}; at 100% a gate weighs all alike.",
    ]
    return lines


def _line(row: dict[str, Any]) -> str:
    figures, accuracy = (row["figures"][metric] for metric in METRICS)
    name = {"student": "student before", "teacher": "teacher"}.get(row["name"], row["name"])
    gain = row.get("gain")
    moved = row.get("movement")
    cells = [
        name,
        str(row["epochs"] or ""),
        report.with_interval(figures, ".3f"),
        _gain(gain[METRICS[0]]) if gain else "",
        f"{accuracy['mean']:.3f}",
        f"{row['gap_closed']:.0%}" if row.get("gap_closed") is not None else "",
        f"{moved['drift_abs'][-1]:.3f}" if moved else "",
    ]
    return f"| {' | '.join(cells)} |"


def _gain(figure: dict[str, Any]) -> str:
    """One seed's has no interval."""
    return report.with_interval(figure, "+.3f") if figure["interval"] else f"{figure['mean']:+.3f}"


def write_page(path: Path, results: Path) -> None:
    """Replace what lies between the page's marks."""
    found = json.loads(results.read_text()) if results.exists() else None
    body = "\n".join([*section(found), ""])
    files.write({path: pages.between(path, BEGIN, END, body).encode()})


def main() -> None:
    """Collect, if there is a folder; then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    if folder is not None:
        files.write_json(RESULTS, collect(command.resume(folder)))
    write_page(PAGE, RESULTS)


if __name__ == "__main__":
    main()
