"""`make drift-study`: which runs it makes, in which order, and which settings it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from drift_gate.bench.distill import files, plan, settings
from drift_gate.bench.distill.jobs import Task

# Of the settings tried here: mean accuracy, drift. The student before training has 0.25.
SLOW = plan.Setting(1e-4, 2, 1.0)
SMALL = plan.Setting(2e-4, 8, 1.0)
SMALL_TOO = plan.Setting(2e-4, 8, 0.1)
LARGE = plan.Setting(5e-4, 8, 1.0)
WILD = plan.Setting(1e-3, 16, 1.0)
HOLDS = {
    SLOW: (0.75, 0.001),
    SMALL: (0.5, 0.05),
    SMALL_TOO: (0.625, 0.06),
    LARGE: (0.5, 0.2),
    WILD: (0.25, 0.6),
}


def result(right: float, drift: float) -> dict[str, Any]:
    """Of a run with that share of right responses."""
    epochs = [dict(drift_abs=drift / 2), dict(drift_abs=drift)]
    counts = {name: [round(16 * right)] * 32 for name in ("easy", "hard")}
    return dict(right=counts, curve=[dict(epochs=epochs)] * 2)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folder and key of what would have run; its result is made from HOLDS."""
    seen: list[str] = []

    def run_all(tasks: list[Task], workers: int, show: Callable[..., None]) -> None:
        for task in tasks:
            seen.append(f"{task.work.out.name} {task.key}")
            found = {setting.name: shown for setting, shown in HOLDS.items()}
            shown = found.get(task.work.out.name.removeprefix("select-"), (0.5, 0.05))
            files.write_json(
                task.work.result(task.key),
                result(*(shown if task.key != "student" else (0.25, 0.0))),
            )
            show(task.key, dict(done=True))

    monkeypatch.setattr(plan, "run_all", run_all)
    monkeypatch.setattr(plan, "GRID", list(HOLDS))
    return seen


def test_a_trial_ends_with_the_first_run_that_cannot_qualify(
    ran: list[str], tmp_path: Path
) -> None:
    plan.select(tmp_path, 1)
    by_setting = {
        setting: [name for name in ran if name.startswith(f"select-{setting.name} opd")]
        for setting in HOLDS
    }
    assert [len(by_setting[setting]) for setting in HOLDS] == [1, 3, 3, 3, 1]
    assert len(ran) == 1 + 2 + 3 * 6  # the student, and six runs of each that stands
    assert ran[:2] == [
        f"select-{SLOW.name} student",
        f"select-{SLOW.name} opd_e2_s100",
    ]
    assert [name.split("_")[-1] for name in ran[1:]] == sorted(
        name.split("_")[-1] for name in ran[1:]
    ), "seed by seed"
    again = list(ran)
    plan.select(tmp_path, 1)
    assert ran == again, "what is finished was run again"


def test_a_band_takes_its_most_accurate_setting(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.select(tmp_path, 1)
    assert plan.chosen(tmp_path) == {"small": SMALL_TOO, "large": LARGE}
    monkeypatch.setitem(HOLDS, LARGE, (0.5, 0.35))  # in none of the bands, and no early end
    plan.select(tmp_path / "other", 1)
    assert plan.chosen(tmp_path / "other") == {"small": SMALL_TOO}


def test_nothing_is_chosen_before_all_trials_are_over(ran: list[str], tmp_path: Path) -> None:
    plan.select(tmp_path, 1)
    (tmp_path / f"select-{SMALL.name}" / "runs" / "lsm_e8_s102.json").unlink()
    with pytest.raises(ValueError, match=f"not finished.*{SMALL.name}"):
        plan.chosen(tmp_path)


def test_seeds_are_added_where_an_interval_is_wide(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan.select(tmp_path, 1)
    ran.clear()
    monkeypatch.setattr(plan, "widest", lambda work: 0.05 if "large" in work.out.name else 0.03)
    plan.compare(tmp_path, 1)
    folders = [name.split()[0] for name in ran]
    counts = {name: folders.count(name) for name in dict.fromkeys(folders)}
    assert counts == {
        "small-main": 50,
        "large-main": 50,
        "default-main": 50,
        "large-more": 50,
    }
    assert {name.split("_s")[-1] for name in ran if name.startswith("large-more opd")} == set(
        map(str, range(8, 16))
    )


def test_the_width_is_of_the_gates_gains(tmp_path: Path) -> None:
    work = plan.folder(tmp_path, "small-main", settings.Settings(seeds=2))
    for job in [Task(name, work) for name in ("student", "teacher")] + [
        Task(job, work) for job in settings.jobs(work.settings)
    ]:
        job_is_gated = "block64" in job.key and job.key.endswith("s1")
        shown = dict(result(0.0, 0.1))
        if job_is_gated:  # all problems are solved with the gate, by one of two seeds
            shown["right"] = result(1.0, 0.1)["right"]
        movement = dict(drift_abs=0.1, effective_share=1.0)
        shown["curve"] = [dict(epochs=[movement, movement])]
        files.write_json(work.result(job.key), shown)
    assert plan.widest(work) > 1.0


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    plan.folder(tmp_path, "a", settings.Settings(seeds=2))
    assert plan.folder(tmp_path, "a", settings.Settings(seeds=2)).settings.seeds == 2
    with pytest.raises(ValueError, match="other settings"):
        plan.folder(tmp_path, "a", settings.Settings(seeds=3))


def test_a_folder_that_was_not_compiled_goes_on_so(tmp_path: Path) -> None:
    plan.folder(tmp_path, "a", settings.Settings(seeds=2))
    asked = settings.Settings(seeds=2, compile=True)
    assert not plan.folder(tmp_path, "a", asked).settings.compile
    assert plan.folder(tmp_path, "b", asked).settings.compile


def test_settings_have_names_of_their_own() -> None:
    assert len({setting.name for setting in plan.GRID}) == len(plan.GRID) == 26


def test_other_gates_run_seed_by_seed_in_both_bands(ran: list[str], tmp_path: Path) -> None:
    plan.select(tmp_path, 1)
    ran.clear()
    plan.others(tmp_path, 1)
    seeds = [int(name.rsplit("_s", 1)[1]) for name in ran]
    assert len(seeds) == 2 * 23 * plan.OTHER_SEEDS
    assert seeds == sorted(seeds)
    first = {name.split("-")[0] for name in ran[: len(ran) // plan.OTHER_SEEDS]}
    assert first == {"small", "large"}
