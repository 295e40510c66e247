"""`drift-gate distill`: the time to go, and what a run showed in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from drift_gate.bench.distill import findings, jobs, progress, settings
from drift_gate.bench.distill.problems import Problem


class Time:
    """Seconds that stand still."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def some_work(out: Path, steps: int) -> tuple[jobs.Work, list[settings.Job]]:
    """Two runs of 2 and 6 epochs a step; an evaluation costs what two epochs do."""
    chosen = settings.Settings(steps=steps, prompts=4, samples=4, evaluation_samples=16)
    problems = [Problem("1 + 1", "2", "products"), Problem("1 + 2", "3", "products")]
    plain = settings.variants(chosen)[0]
    runs = [settings.Job(plain, epochs, 0) for epochs in (2, 6)]
    return jobs.Work(chosen, out, [], {"sums": problems}), runs


def test_time_to_go_counts_epochs_and_evaluations(tmp_path: Path) -> None:
    work, (short, long) = some_work(tmp_path, 10)
    now = Time()
    clock = progress.Clock(work, [short, long], now)
    assert clock.seconds_left() is None and str(clock) == ""
    whole = 2 * 2 + 10 * (2 + 2) + 2 + 10 * (2 + 6) + 2
    clock.take("student", {"done": True})
    now.seconds += 20  # of 2 units
    assert clock.seconds_left() == pytest.approx(10 * (whole - 2))
    assert str(clock) == "about 21 min to go"
    clock.take("teacher", {"done": True})
    clock.take(short.key, {"completed": 0})
    clock.take(short.key, {"completed": 5, "loss": 0.0})
    now.seconds += 28
    assert clock.seconds_left() == pytest.approx(48 / 24 * (whole - 24))
    assert clock.finished() == 2
    for key in (short.key, long.key):
        clock.take(key, {"done": True})
    assert clock.finished() == 4 and str(clock) == "nothing to go"


def test_what_an_earlier_process_did_is_no_part_of_the_pace(tmp_path: Path) -> None:
    """The first models are evaluated, and a checkpoint has nine of ten steps."""
    work, (short, long) = some_work(tmp_path, 10)
    for name in jobs.BASE:
        work.result(name).parent.mkdir(exist_ok=True)
        work.result(name).write_text(json.dumps({"right": {}}))
    now = Time()
    clock = progress.Clock(work, [short, long], now)
    clock.take(short.key, {"completed": 9})
    now.seconds += 8
    assert clock.finished() == 2 and clock.seconds_left() is None
    clock.take(short.key, {"completed": 10, "loss": 0.0})  # 4 units in 8 seconds
    assert clock.seconds_left() == pytest.approx(2 * (2 + 10 * 8 + 2))


def row(drift: float, share: float, gain: object = None, **more: float) -> dict[str, Any]:
    movement = {"drift_abs": [0.0, drift], "effective_share": [1.0, share]}
    movement |= {name: [0.0, value] for name, value in more.items()}
    found: dict[str, Any] = {"movement": movement, "gated": gain is not None}
    if gain is not None:
        found["gain"] = {"pass@8": {"mean": 0.1, "interval": gain or None}}
    return found


BASE = {"name": "student", "figures": {}}


def test_the_last_lines_say_drift_evenness_and_what_lies_beyond_its_interval() -> None:
    rows = [BASE, row(0.05, 1.0), row(0.0612, 0.991, [0.01, 0.2]), row(0.07, 0.97, [-0.1, 0.1])]
    moved, compared = findings.in_words(rows, ["student", "OPD", "OPD + A", "OPD + B"])
    assert "by 0.0500 to 0.0700 nats" in moved and "even to 97.0% to 99.1%" in moved
    assert "rounding" not in moved
    assert compared == (
        "Of 2 gains of a gate 1 (OPD + A in pass@8) lies above 0 by the 95% interval, none lies "
        "below; of 2 without any, 0.1 would lie above or below 0 by chance."
    )
    rows[2] = row(0.06, 0.99, [-0.2, -0.01])
    assert "none lies above" in findings.compared(rows, ["", "", "OPD + A", "OPD + B"])
    assert "1 (OPD + A in pass@8) lies below" in findings.compared(rows, ["", "", "OPD + A", ""])
    rows[2] = row(0.06, 0.99, [-0.2, 0.01])
    assert "None of 2 gains" in findings.compared(rows, [""] * 4)


def test_one_seed_and_runs_without_gates_claim_nothing() -> None:
    noisy = row(0.05, 0.98, [], drift_noise=0.01)
    assert "one seed cannot say" in findings.compared([BASE, noisy], [""] * 2)
    assert "of which rounding of the logits would show 0.0100" in findings.moved([BASE, noisy])
    moved, compared = findings.in_words([BASE, row(0.05, 1.0)], [""] * 2)
    assert moved == "The policy drifted by 0.0500 nats in the last epoch over a batch."
    assert "no gain to judge" in compared
