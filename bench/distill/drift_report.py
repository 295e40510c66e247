"""What the runs of docs/study_plan.md showed: results, tables, pictures.

python -m drift_gate.bench.distill.drift_report FOLDER takes what `make drift-study` has finished
into bench/results/drift_study.json; then, as without a folder, the tables of docs/when_to_gate.md
and the pictures beside it are made from there. What is not finished is said.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import measure, pages
from ..plots import save
from . import drift_pictures, files, plan, report
from .drift_pictures import TOGETHER
from .findings import by_chance
from .jobs import Task, Work
from .report import METRICS
from .settings import Job, Settings, jobs, variants
from .study import curve_of
from .workers import unfinished

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "drift_study.json"
PAGE = ROOT / "docs" / "when_to_gate.md"
BEGIN, END = "<!-- drift study: make readme-table -->", "<!-- end of drift study -->"
NONE = 0.02  # an interval within it, with 0 in it, is no gain to speak of


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
    """Of all the band's folders; what stands in a folder of its own has the folder in its name."""
    found: Runs = {}
    for out in sorted(root.glob(f"{band}-*")):
        work = plan.command.resume(out)
        name = out.name.removeprefix(f"{band}-")
        for job in jobs(work.settings):
            if (result := work.done(job.key)) is not None:
                found.setdefault(_name(job, name), []).append(result)
    return found


def _name(job: Job, folder: str) -> str:
    common = folder in ("main", "more", "gates", "192")
    return job.variant.name if common else f"{job.variant.name}, {folder.replace('-', ' ')}"


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
            moved = report.movement_of(ours)
            found.append(
                dict(
                    band=band, name=name, against=other, seeds=len(ours),
                    gain=report.difference_of(ours, theirs, samples),
                    means=[_means(side, samples) for side in (ours, theirs)],
                    drift=report.movement_of(theirs)["drift_abs"][-1],
                    even=moved["effective_share"][-1], main=name == f"{other} + Block64",
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


def verdict(interval: list[float]) -> str:
    """What the plan makes of an interval of the main comparison."""
    low, high = interval
    if low > 0:
        return "for the gate"
    if high < 0:
        return "against it"
    return "no gain to speak of" if low >= -NONE and high <= NONE else "undecided"


def judged(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The verdict on a main comparison of a band once it has all its seeds; "" on others."""
    if not row["main"] or row["band"] not in plan.BANDS:
        return ""
    if row["seeds"] < plan.SEEDS:
        return f"{plan.SEEDS - row['seeds']} seeds to go"
    same = [other for other in rows if other["main"] and other["band"] == row["band"]]
    intervals = [other["gain"][METRICS[0]]["interval"] for other in same]
    if any(high - low > plan.WIDE for low, high in intervals) and row["seeds"] < 2 * plan.SEEDS:
        return f"wide: {2 * plan.SEEDS - row['seeds']} more seeds to go"
    return verdict(row["gain"][METRICS[0]]["interval"])


def section(found: dict[str, Any] | None) -> list[str]:
    """The page's lines."""
    if found is None:
        return ["No run of it is finished."]
    machine = found["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit "
        f"{machine['commit']}. Accuracy of the student before training: {found['before']:.3f}.",
        "",
        *_trials_table(found),
    ]
    if not found["finished"]:
        return [
            *lines,
            "",
            "These trials are not over; no setting is chosen, and no gated run was made.",
        ]
    if not found["bands"]:
        return [*lines, "", "No setting qualifies: the study ends here, as its plan says."]
    chosen = ", ".join(f"{band} drift {name}" for band, name in found["bands"].items())
    lines += ["", f"Chosen: {chosen}."]
    return lines + _comparison_lines(found)


def _trials_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| rate | epochs | norm | mini-batch | warm-up "
        "| accuracy, OPD | LSM | drift, OPD | LSM | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    taken = {name: band for band, name in found["bands"].items()}
    for trial in found["trials"]:
        cells = [f"{trial['learning_rate']:g}", str(trial["epochs"])]
        cells += [f"{trial['gradient_norm']:g}", str(trial["minibatch"]), str(trial["warmup"])]
        for figure in ("accuracy", "drift"):
            for loss in plan.LOSSES:
                values = [run[figure] for run in trial["runs"] if run["variant"] == loss]
                form = ".2f" if figure == "accuracy" else ".3f"
                cells.append(", ".join(f"{value:{form}}" for value in values))
        band = taken.get(trial["name"])
        cells.append(f"chosen: {band} drift" if band else trial["outcome"])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _comparison_lines(found: dict[str, Any]) -> list[str]:
    rows = [row for row in found["comparisons"] if row["gain"][METRICS[0]]["interval"]]
    if not rows:
        return ["", "No comparison has two seeds yet, and one has no interval: none is shown."]
    lines = [
        "",
        "| drift | | against | seeds | pass@8 | gain, pass@8 | gain, accuracy "
        "| drift, nats | weights even to | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: not row["main"]):
        gain = row["gain"]
        cells = [row["band"], row["name"], row["against"], str(row["seeds"])]
        cells += [f"{row['means'][0][METRICS[0]]:.3f}", *(_gain(gain[m]) for m in METRICS)]
        cells += [f"{row['drift']:.3f}", f"{row['even']:.1%}"]
        cells.append(judged(row, rows))
        lines.append(f"| {' | '.join(cells)} |")
    known = [row["gain"][m]["interval"] for row in rows for m in METRICS]
    above = sum(low > 0 for low, _ in known)
    below = sum(high < 0 for _, high in known)
    lines += [
        "",
        f"Of {len(known)} intervals {above} lie above 0 and {below} below; of so many without any "
        f"effect {by_chance(len(known))}.",
    ]
    return lines


def _gain(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:+.3f} ({report.interval(figure, '+.3f')})"


def write_page(page: Path, results: Path) -> None:
    """Replace what lies between the page's marks, and draw what its pictures can show."""
    found = json.loads(results.read_text()) if results.exists() else None
    lines = section(found)
    if found is not None:
        for name, alt, figure in drift_pictures.drawn(found):
            save(figure, page.with_name(f"drift_study_{name}.svg"))
            lines += ["", f"![{alt}](drift_study_{name}.svg)"]
    files.write({page: pages.between(page, BEGIN, END, "\n".join([*lines, ""])).encode()})


def main() -> None:
    """Collect, if there is a folder; then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    folder = parser.parse_args().folder
    if folder is not None:
        files.write({RESULTS: files.as_lines(collect(folder))})
    write_page(PAGE, RESULTS)


if __name__ == "__main__":
    main()
