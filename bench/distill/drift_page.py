"""Pages and pictures of the study of gates where the policy drifts, from its results.

The tables of docs/when_to_gate.md, the pictures beside it, and two sentences of the README. What is
not finished is said.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from .. import pages
from ..plots import save
from . import drift_pictures, files, plan, report
from .drift_pictures import GAIN, shown
from .findings import by_chance
from .report import METRICS

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "drift_study.json"
PAGE, README = ROOT / "docs" / "when_to_gate.md", ROOT / "README.md"
BEGIN, END = "<!-- drift study: make readme-table -->", "<!-- end of drift study -->"
NONE = 0.02  # an interval within it, with 0 in it, is no gain to speak of
VERDICTS = ("for the gate", "against it", "no gain to speak of", "undecided")

Row = dict[str, Any]  # a comparison of the results


def verdict(interval: list[float]) -> str:
    """What the plan makes of an interval of the main comparison."""
    low, high = interval
    if low > 0:
        return "for the gate"
    if high < 0:
        return "against it"
    return "no gain to speak of" if low >= -NONE and high <= NONE else "undecided"


def judged(row: Row, rows: list[Row]) -> str:
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


def outcome(verdicts: list[str]) -> str:
    """What the plan calls the study, by the verdicts on its main comparisons."""
    up, down = (words in verdicts for words in VERDICTS[:2])
    if up == down:
        return "the study speaks neither for the gate nor against it"
    return f"the study speaks {'for the gate' if up else 'against the gate'}"


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
    return lines + _main_table(found) + _other_table(found)


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


def _main_table(found: dict[str, Any]) -> list[str]:
    """Part 2: the six variants in the settings chosen, and in the default one."""
    rows = shown(found, 2)
    if not rows:
        return ["", "No comparison has two seeds yet, and one has no interval: none is shown."]
    lines = [
        "",
        "| drift | | against | seeds | pass@8 | gain, pass@8 | gain, accuracy "
        "| drift, nats | weights even to | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: not row["main"]):
        cells = [row["band"], row["name"], row["against"], str(row["seeds"])]
        cells += [f"{row['means'][0][METRICS[0]]:.3f}", *_gains(row)]
        cells += [f"{row['drift']:.3f}", f"{row['even']:.1%}", judged(row, rows)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _missing_zero(rows)]


def _other_table(found: dict[str, Any]) -> list[str]:
    """Part 3: each beside no gate and beside Block64."""
    rows = shown(found, 3)
    if not rows:
        return ["", "Other gates, and what people use in their place: no runs yet."]
    seeds = sorted({row["seeds"] for row in rows})
    lines = [
        "",
        f"Other gates, and what people use in their place; {' to '.join(map(str, seeds))} seeds. "
        "Drift is each one's own.",
        "",
        "| drift | | pass@8 | over no gate, pass@8 | accuracy | over Block64, pass@8 | accuracy "
        "| drift, nats | weights even to |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_name: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: "Block64" in row["against"]):
        by_name.setdefault((row["band"], row["name"]), []).append(row)
    for (band, name), (plain, gated) in by_name.items():
        cells = [band, name, f"{plain['means'][0][METRICS[0]]:.3f}"]
        cells += [*_gains(plain), *_gains(gated), f"{plain['own_drift']:.3f}"]
        cells.append(f"{plain['even']:.1%}" if " + " in name else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", _missing_zero(rows)]


def _missing_zero(rows: list[Row]) -> str:
    known = [row["gain"][m]["interval"] for row in rows for m in METRICS]
    above = sum(low > 0 for low, _ in known)
    below = sum(high < 0 for _, high in known)
    return (
        f"Of {len(known)} intervals {above} lie above 0 and {below} below; of so many without any "
        f"effect {by_chance(len(known))}."
    )


def _gains(row: Row) -> list[str]:
    return [report.with_interval(row["gain"][metric], "+.3f") for metric in METRICS]


def in_readme(found: dict[str, Any] | None) -> list[str]:
    """Two sentences and a picture, once every main comparison has its verdict."""
    rows = shown(found, 2) if found and found["finished"] else []
    mains = [row for row in rows if row["main"] and row["band"] in plan.BANDS]
    verdicts = [judged(row, rows) for row in mains]
    if not mains or any(words not in VERDICTS for words in verdicts):
        return ["[A study of it](docs/when_to_gate.md#the-study) is under way."]
    assert found is not None
    problems = sum(map(len, found["runs"][0]["right"].values()))
    seeds = " to ".join(map(str, sorted({row["seeds"] for row in mains})))
    bands = [[row for row in mains if row["band"] == band] for band in found["bands"]]
    counts = ", ".join(
        f"{count} {'is' if count == 1 else 'are'} {words}"
        for words in VERDICTS
        if (count := verdicts.count(words))
    )
    sentences = (
        f"With models of 93,000 parameters and {seeds} seeds Block64 gained, in pass@8 over no "
        f"gate, {'; '.join(map(_of_band, bands))} (95% intervals over seeds and {problems} "
        "problems). Of these gains, by [the plan](docs/study_plan.md) written before the runs, "
        f"{counts}: {outcome(verdicts)}{_less_drift(found)} ([every "
        "comparison](docs/when_to_gate.md#the-study))."
    )
    return [
        *textwrap.wrap(sentences, 110, break_on_hyphens=False),
        "",
        f"![{GAIN}](docs/drift_study_gain.svg)",
    ]


def _less_drift(found: dict[str, Any]) -> str:
    """What fewer epochs and lower rates gained over the settings that drift, if they have run."""
    means = [
        row["gain"][METRICS[0]]["mean"]
        for row in shown(found, 3)
        if row["against"] == "OPD" and row["name"].startswith(("OPD, epochs", "OPD, rate"))
    ]
    if not means:
        return ""
    return (
        f", where fewer epochs or a lower rate gained {min(means):+.3f} to {max(means):+.3f} "
        "without one"
    )


def _of_band(rows: list[Row]) -> str:
    """The main gains of a band, and its drift."""
    gains = (f"{_gains(row)[0]} with {row['against']}" for row in rows)
    drifts = sorted(row["drift"] for row in rows)
    return f"{' and '.join(gains)} at {drifts[0]:.2f} to {drifts[-1]:.2f} nats of drift"


def write_page(page: Path, found: dict[str, Any] | None) -> None:
    """Replace what lies between the page's marks, and draw what its pictures can show."""
    lines = section(found)
    if found is not None:
        for name, alt, figure in drift_pictures.drawn(found):
            save(figure, page.with_name(f"drift_study_{name}.svg"))
            lines += ["", f"![{alt}](drift_study_{name}.svg)"]
    _replace(page, lines)


def _replace(page: Path, lines: list[str]) -> None:
    files.write({page: pages.between(page, BEGIN, END, "\n".join([*lines, ""])).encode()})


def write() -> None:
    """The page, its pictures and the README, from the committed results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
    write_page(PAGE, found)
    _replace(README, in_readme(found))
