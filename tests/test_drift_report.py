"""`drift_report` and `drift_page`: what the study's folders hold, as JSON, tables and pictures."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from drift_gate.bench.distill import drift_page, drift_pictures, drift_report, files, plan
from drift_gate.bench.distill.jobs import Task
from matplotlib import pyplot

CHOSEN = plan.Setting(5e-4, 8, 1.0)
DROPPED = plan.Setting(1e-3, 16, 1.0)
GAINS = {"OPD + Block64": 4, "LSM + Block64": -4}  # of 16 responses, in every problem


def result(task: Task, rng: random.Random) -> dict[str, Any]:
    """Of a run: about half of its responses are right, 4 more or less with a gate of GAINS."""
    if isinstance(task.job, str):
        return dict(right={"easy": [4] * 32, "hard": [4] * 32})
    name, dropped = task.job.variant.name, DROPPED.name in task.work.out.name
    right = {
        part: [6 + rng.randrange(3) + GAINS.get(name, 0) for _ in range(32)]
        for part in ("easy", "hard")
    }
    epochs = [
        dict(loss=0.1, drift_abs=(0.9 if dropped else 0.15) * i / 8, effective_share=1 - i / 80)
        for i in range(1, task.job.epochs + 1)
    ]
    fallen = name == "LSM + Block64" and task.job.seed == 3
    curve = [
        dict(accuracy=0.1 if fallen and i > 2 else 0.5, passed=rng.random(), epochs=epochs)
        for i in range(5)
    ]
    heat = [[[1 + 0.01 * i] * 20 for i in range(task.job.epochs)]] * 5
    return dict(
        variant=name, epochs=task.job.epochs, seed=task.job.seed, right=right, curve=curve,
        heat_by_epoch=heat if task.job.variant.gate else [],
    )  # fmt: skip


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose runs are `result`s; nothing is trained."""
    rng = random.Random(0)

    def run_all(tasks: list[Task], workers: int, show: Callable[..., None]) -> None:
        for task in tasks:
            files.write_json(task.work.result(task.key), result(task, rng))

    monkeypatch.setattr(plan, "run_all", run_all)
    monkeypatch.setattr(plan, "GRID", [CHOSEN, DROPPED])
    yield tmp_path
    pyplot.close("all")


def test_nothing_is_shown_of_nothing(study: Path) -> None:
    with pytest.raises(ValueError, match="no finished run"):
        drift_report.collect(study)
    assert drift_page.section(None) == ["No run of it is finished."]


def test_trials_alone_choose_nothing_before_they_are_over(study: Path) -> None:
    plan.select(study, 1)
    next((study / f"select-{CHOSEN.name}" / "runs").glob("lsm*s102.json")).unlink()
    found = json.loads(files.as_json(drift_report.collect(study)))
    text = "\n".join(drift_page.section(found))
    assert "not over" in text
    assert "1 to go" in text
    assert not list(drift_pictures.drawn(found))


def test_a_finished_study_judges_its_main_comparisons(study: Path) -> None:
    for part in (plan.select, plan.compare, plan.others):
        part(study, 1)
    collected = drift_report.collect(study)
    found = json.loads(files.as_lines(collected))
    assert found == json.loads(files.as_json(collected))
    assert found["bands"] == {"large": CHOSEN.name}
    verdicts = {
        row["name"]: drift_page.judged(row, found["comparisons"])
        for row in found["comparisons"]
        if row["main"] and row["band"] == "large"
    }
    assert verdicts == {"OPD + Block64": "for the gate", "LSM + Block64": "against it"}
    rows = {(row["name"], row["against"]): row for row in found["comparisons"]}
    gain = rows["OPD + Block64", "OPD"]["gain"]["accuracy"]
    assert gain["mean"] == pytest.approx(0.25, abs=0.02)
    assert rows["OPD, clip 0.05", "OPD + Block64"]["gain"]["accuracy"]["mean"] < -0.2
    assert rows["OPD + Block64, tau 3", "OPD"]["seeds"] == plan.OTHER_SEEDS
    assert ("OPD + Token", "OPD + Block64") in rows
    assert found["collapse"]["seed"] == 3
    assert found["collapse"]["variant"] == "LSM + Block64"
    assert len(found["collapse"]["weights"]) == 5 * CHOSEN.epochs
    text = "\n".join(drift_page.section(found))
    assert "| dropped |" in text
    assert "chosen: large drift" in text
    several = re.findall(r"^\| large \| OPD, clip 0.05 \| ([^|]+)(?:\| ([^|]+)){6}\|$", text, re.M)
    assert len(several) == 1, "one line, for what it is compared with"
    assert f"{plan.OTHER_SEEDS} seeds" in text
    readme = " ".join(drift_page.in_readme(found))
    assert "1 is for the gate, 1 is against it: the study speaks neither" in readme
    less = [
        rows[f"OPD, {name}", "OPD"]
        for name in ("epochs 1", "epochs 2", "rate 0.0001", "rate 5e-05")
    ]
    means = [row["gain"]["pass@8"]["mean"] for row in less]
    assert f"a lower rate gained {min(means):+.3f} to {max(means):+.3f}" in readme
    for row in found["comparisons"]:
        if row["main"] and row["band"] == "large":
            assert f"{row['gain']['pass@8']['mean']:+.3f} (" in readme
    shown = {name: figure for name, _, figure in drift_pictures.drawn(found)}
    assert set(shown) == {"gain", "training", "weights", "others"}
    assert len(shown["others"].axes) == 1  # a band
    lines = [text.get_text() for text in shown["others"].axes[0].get_yticklabels()]
    assert len(lines) == 23 and lines[0] == "OPD + Token" and lines[-1] == "OPD, rate 5e-05"
    assert len(shown["training"].axes) == 4  # two losses, one band and the default setting


def test_the_page_and_its_pictures_come_from_the_results(study: Path) -> None:
    plan.select(study, 1)
    plan.compare(study, 1)
    page = study / "page.md"
    page.write_text(f"before\n{drift_page.BEGIN}\nold\n{drift_page.END}\nafter\n")
    drift_page.write_page(page, None)
    assert "No run" in page.read_text()
    drift_page.write_page(page, json.loads(files.as_json(drift_report.collect(study))))
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for name in ("gain", "training", "weights"):
        assert f"](drift_study_{name}.svg)" in text
        assert (study / f"drift_study_{name}.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([0.001, 0.2], "for the gate"),
        ([-0.2, -0.001], "against it"),
        ([-0.019, 0.02], "no gain to speak of"),
        ([-0.03, 0.02], "undecided"),
    ],
)
def test_verdicts_are_the_plans(interval: list[float], words: str) -> None:
    assert drift_page.verdict(interval) == words


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["for the gate", "undecided"], "the study speaks for the gate"),
        (["no gain to speak of", "against it"], "the study speaks against the gate"),
        (["for the gate", "against it"], "the study speaks neither for the gate nor against it"),
        (["undecided"] * 4, "the study speaks neither for the gate nor against it"),
    ],
)
def test_the_outcome_is_the_plans(verdicts: list[str], words: str) -> None:
    assert drift_page.outcome(verdicts) == words


def test_the_readme_waits_for_the_verdicts(study: Path) -> None:
    assert "under way" in drift_page.in_readme(None)[0]
    plan.select(study, 1)
    plan.compare(study, 1)
    for path in (study / "large-main" / "runs").glob("*_s7.json"):
        path.unlink()
    assert "under way" in drift_page.in_readme(drift_report.collect(study))[0]


def test_no_verdict_before_all_seeds() -> None:
    def row(seeds: int, *interval: float) -> dict[str, Any]:
        gain = {"pass@8": dict(mean=0.1, interval=list(interval))}
        return dict(main=True, band="small", seeds=seeds, gain=gain)

    narrow, wide = row(8, 0.01, 0.03), row(8, 0.01, 0.06)
    assert drift_page.judged(narrow, [narrow]) == "for the gate"
    assert drift_page.judged(narrow, [narrow, wide]) == "wide: 8 more seeds to go"
    assert drift_page.judged(row(5, 0.01, 0.03), [narrow]) == "3 seeds to go"
    wide["seeds"] = narrow["seeds"] = 16
    assert drift_page.judged(wide, [narrow, wide]) == "for the gate"
    assert drift_page.judged({**narrow, "main": False}, [narrow]) == ""
    assert drift_page.judged({**narrow, "band": "default"}, [narrow]) == ""


def test_the_page_shows_the_committed_results() -> None:
    found = None
    if drift_page.RESULTS.exists():
        found = json.loads(drift_page.RESULTS.read_text())
    text, readme = drift_page.PAGE.read_text(), drift_page.README.read_text()
    for line in drift_page.section(found):
        assert line in text
    assert "\n".join(drift_page.in_readme(found)) in readme
