"""`drift_report`: what the study's folders hold, as JSON, tables and pictures."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from drift_gate.bench.distill import drift_pictures, drift_report, files, plan
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
    assert drift_report.section(None) == ["No run of it is finished."]


def test_trials_alone_choose_nothing_before_they_are_over(study: Path) -> None:
    plan.select(study, 1)
    next((study / f"select-{CHOSEN.name}" / "runs").glob("lsm*s102.json")).unlink()
    found = json.loads(files.as_json(drift_report.collect(study)))
    text = "\n".join(drift_report.section(found))
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
        row["name"]: drift_report.judged(row, found["comparisons"])
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
    text = "\n".join(drift_report.section(found))
    assert "| dropped |" in text
    assert "chosen: large drift" in text
    shown = {name: figure for name, _, figure in drift_pictures.drawn(found)}
    assert set(shown) == {"gain", "training", "weights"}
    assert len(shown["training"].axes) == 4  # two losses, one band and the default setting


def test_the_page_and_its_pictures_come_from_the_results(study: Path) -> None:
    plan.select(study, 1)
    plan.compare(study, 1)
    page, results = study / "page.md", study / "results.json"
    page.write_text(f"before\n{drift_report.BEGIN}\nold\n{drift_report.END}\nafter\n")
    drift_report.write_page(page, results)
    assert "No run" in page.read_text()
    files.write_json(results, drift_report.collect(study))
    drift_report.write_page(page, results)
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
    assert drift_report.verdict(interval) == words


def test_no_verdict_before_all_seeds() -> None:
    def row(seeds: int, *interval: float) -> dict[str, Any]:
        gain = {"pass@8": dict(mean=0.1, interval=list(interval))}
        return dict(main=True, band="small", seeds=seeds, gain=gain)

    narrow, wide = row(8, 0.01, 0.03), row(8, 0.01, 0.06)
    assert drift_report.judged(narrow, [narrow]) == "for the gate"
    assert drift_report.judged(narrow, [narrow, wide]) == "wide: 8 more seeds to go"
    assert drift_report.judged(row(5, 0.01, 0.03), [narrow]) == "3 seeds to go"
    wide["seeds"] = narrow["seeds"] = 16
    assert drift_report.judged(wide, [narrow, wide]) == "for the gate"
    assert drift_report.judged({**narrow, "main": False}, [narrow]) == ""
    assert drift_report.judged({**narrow, "band": "default"}, [narrow]) == ""


def test_the_page_shows_the_committed_results() -> None:
    found = None
    if drift_report.RESULTS.exists():
        found = json.loads(drift_report.RESULTS.read_text())
    text = drift_report.PAGE.read_text()
    for line in drift_report.section(found):
        assert line in text
