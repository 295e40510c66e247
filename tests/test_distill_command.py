"""`drift-gate distill` from its options to its files, and how it refuses what it cannot do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("math_verify")

from drift_gate.bench.distill import command, cost, files, jobs, models, settings, study, training
from typer.testing import CliRunner

from drift_gate import cli

PROBLEMS = [("1 + 2", "3"), ("2 * 3", "6"), ("7 - 5", "2")]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["distill", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module", autouse=True)
def few_words():
    """The losses beside many words are timed with fewer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cost, "WORDS", 2_000)
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Seconds of work: a file of problems, short responses, untrained models of one layer."""
    folder = tmp_path_factory.mktemp("inputs")
    file = folder / "sums.jsonl"
    lines = [json.dumps({"problem": problem, "answer": answer}) for problem, answer in PROBLEMS]
    file.write_text("\n".join(lines) + "\n")
    for i, name in enumerate(("student", "teacher")):
        torch.manual_seed(i)
        model = models.small_model("student")
        model.save_pretrained(folder / name)
        models.character_tokenizer().save_pretrained(folder / name)
    pair = ["--student", folder / "student", "--teacher", folder / "teacher"]
    return [
        *pair, "--train", file, "--eval", file, "--max-tokens", 8, "--steps", 2, "--device", "cpu",
        "--learning-rate", 1e-3,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run's folder, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = run(*options, "--out", out, "--workers", 1)
    assert done.exit_code == 0, done.output
    return out, done.output


def comparable(report: Path) -> dict[str, Any]:
    """Of a report, what the seed decides."""
    found = json.loads(report.read_text())
    del found["machine"], found["loss_cost"]
    return found


def test_a_run_ends_with_a_table_a_report_and_a_picture(finished: tuple[Path, str]) -> None:
    out, printed = finished
    names = [variant.name for variant in settings.variants(settings.Settings())]
    assert len(names) == 6
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["student", "teacher", *names]
    for row in report["rows"]:
        low, high = row["figures"]["pass@8"]["interval"]
        assert 0 <= low <= row["figures"]["pass@8"]["mean"] <= high <= 1
        assert row["name"] in printed
        passed = row["figures"]["pass@8"]
        for value in (passed["mean"], *passed["benchmarks"].values()):
            assert f"{value:.3f}" in printed
    costs = [(row["loss"], row["words"]) for row in report["loss_cost"]]
    assert costs[:2] == [("opd", costs[0][1]), ("lsm", costs[0][1])]
    assert costs[2:] == [("opd", cost.WORDS), ("lsm", cost.WORDS)]
    assert all(min(row["bytes"].values()) > 0 for row in report["loss_cost"])
    moved, compared = report["in_words"]
    assert " ".join(printed.split()).endswith(f"{moved} {compared}")
    assert "one seed cannot say" in compared
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.rglob("*.pt")) and not list(out.rglob(".*"))


def test_a_study_shows_every_variant_and_its_gain(finished: tuple[Path, str]) -> None:
    found = study.collect(command.resume(finished[0]))
    lines = study.section(found)
    assert [run["variant"] for run in found["runs"]] == [row["name"] for row in found["rows"][2:]]
    gated = [line for line in lines if line.startswith("|") and " + " in line.split("|")[1]]
    assert len(gated) == 4 and not any(" to " in line.split("|")[4] for line in gated)  # one seed
    assert "Of 4 gains" in lines[-1]


def test_a_study_of_several_seeds_has_intervals_over_seeds_and_problems(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """Copies of a run stand for its second seed; the gains of both are the same."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "runs").glob("*_s0.json"):
        shutil.copy(file, file.with_name(file.name.replace("_s0", "_s1")))
    stored = json.loads((tmp_path / command.SETTINGS).read_text())
    (tmp_path / command.SETTINGS).write_text(json.dumps(stored | {"seeds": 2}))
    found = study.collect(command.resume(tmp_path))
    assert [run["seed"] for run in found["runs"]] == [0] * 6 + [1] * 6
    assert all("gain" not in row or row["gain"]["pass@8"]["interval"] for row in found["rows"])
    assert {len(counts) for run in found["runs"] for counts in run["right"].values()} == {3}
    steps = [step for run in found["runs"] for step in run["curve"]]
    assert len(steps) == 2 * len(found["runs"]) and all(0 <= step["passed"] <= 1 for step in steps)
    assert all(step["drift_abs"][1] > step["drift_abs"][0] for step in steps)  # epochs of a batch
    (tmp_path / "report.json").unlink()
    assert run("--resume", tmp_path, "--workers", 1).output.count("seeds and problems") == 1
    _, compared = json.loads((tmp_path / "report.json").read_text())["in_words"]
    assert compared.startswith(("None of 8 gains", "Of 8 gains"))


def test_a_study_without_counts_by_problem_takes_its_seeds_alone() -> None:
    committed = json.loads(study.RESULTS.read_text())
    assert "right" not in committed["runs"][0]
    row = next(row for row in study.over_seeds(committed) if row["name"] == "OPD + Block64")
    runs = {
        name: [
            run["pass@8"]
            for run in committed["runs"]
            if run["variant"] == name and run["epochs"] == 1
        ]
        for name in ("OPD", "OPD + Block64")
    }
    gains = np.subtract(runs["OPD + Block64"], runs["OPD"])
    off = 2.776 * gains.std(ddof=1) / 5**0.5  # 97.5% of Student's t with 4 degrees of freedom
    low, high = row["gain"]["pass@8"]["interval"]
    assert (low, high) == pytest.approx((gains.mean() - off, gains.mean() + off), abs=0.15 * off)


def test_the_page_shows_the_committed_study() -> None:
    shown = study.PAGE.read_text().split(study.BEGIN)[1].split(study.END)[0]
    committed = json.loads(study.RESULTS.read_text())
    assert shown.strip() == "\n".join(study.section(committed))
    assert {row["seeds"] for row in committed["rows"][2:]} == {5}


def test_a_log_has_a_line_for_each_run_that_is_finished(finished: tuple[Path, str]) -> None:
    lines = [line for line in finished[1].splitlines() if " of 8 runs" in line]
    assert [line.split(":")[0] for line in lines[:3]] == ["student", "teacher", "opd_e2_s0"]
    assert "8 of 8 runs, nothing to go" in lines[-1] and "1 of 8 runs" in lines[0]


def test_two_workers_make_the_table_of_one(
    options: list[object], finished: tuple[Path, str], tmp_path: Path
) -> None:
    assert run(*options, "--out", tmp_path, "--workers", 2).exit_code == 0
    assert comparable(tmp_path / "report.json") == comparable(finished[0] / "report.json")


def test_an_interrupted_run_goes_on_where_it_was(
    options: list[object],
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, steps = training.Trainer.step, []

    def interrupted(self: training.Trainer) -> Any:
        steps.append(self.job.key)
        if len(steps) == 3:  # the first of the second variant
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(training.Trainer, "step", interrupted)
    done = run(*options, "--out", tmp_path, "--workers", 1)
    assert done.exit_code == 130 and f"--resume {tmp_path}" in done.output.replace("\n", " ")
    assert [path.stem for path in tmp_path.rglob("*.pt")] == [steps[-1]]
    assert not (tmp_path / "report.json").exists()
    assert run("--resume", tmp_path, "--workers", 1).exit_code == 0
    assert len(steps) == 6 * 2  # none was done twice
    assert comparable(tmp_path / "report.json") == comparable(finished[0] / "report.json")


def test_a_finished_run_is_reported_again_without_work(
    finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    monkeypatch.setattr(training.Trainer, "step", None)
    assert run("--resume", tmp_path / "copy").exit_code == 0
    assert comparable(tmp_path / "copy" / "report.json") == comparable(finished[0] / "report.json")


@pytest.mark.parametrize("name", ["report.png", "opd_e2_s0.pt"])
def test_a_full_disk_is_one_line_and_leaves_no_piece(
    name: str,
    options: list[object],
    finished: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if name.startswith("report"):
        shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("report.*"))
    sync = os.fsync

    def full(file: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{file}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    arguments = ["--resume", out] if out.exists() else [*options, "--out", out, "--workers", 1]
    done = run(*arguments)
    assert done.exit_code == 1
    last = done.output.strip().splitlines()[-1]
    assert "No space left on device" in last and name in last
    assert not list(out.rglob(f"*{name}*")) and not list(out.glob("report.*"))


def test_a_disk_that_will_be_full_is_refused_before_the_work(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1 << 20

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage)
    done = run(*options, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "1.0 MB free" in done.output
    assert not (tmp_path / "out").exists()


def refused(tmp_path: Path, *arguments: object) -> str:
    """The one line that a run without work says; it leaves no folder."""
    done = run(*arguments, "--out", tmp_path / "never")
    assert done.exit_code == 2
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "never").exists()
    return done.output


def test_different_tokenizers_are_refused(options: list[object], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(options[1], other)
    words = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(words.replace('"~": ', '"\u00e9": '))
    said = refused(tmp_path, "--teacher", other)
    assert "share a tokenizer" in said and "word 98" in said


@pytest.mark.parametrize("flag", ["--student", "--teacher"])
def test_a_folder_without_a_model_is_refused(flag: str, tmp_path: Path) -> None:
    assert f"{flag} {tmp_path} must be a folder" in refused(tmp_path, flag, tmp_path)


def test_a_broken_model_is_refused(options: list[object], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(options[1], broken)
    (broken / "config.json").write_text("{")
    assert f"--student {broken} cannot be loaded" in refused(tmp_path, "--student", broken)


def test_a_head_that_the_losses_cannot_form_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = models.Qwen3ForCausalLM.forward

    def scaled(self: Any, *arguments: Any, **keywords: Any) -> Any:
        output = forward(self, *arguments, **keywords)
        output.logits = output.logits * 3
        return output

    monkeypatch.setattr(models.Qwen3ForCausalLM, "forward", scaled)
    with pytest.raises(models.BadModel, match="more to its logits"):
        models.load_pair(None, None, torch.device("cpu"))


@pytest.mark.parametrize("flag", ["--train", "--eval"])
def test_a_malformed_file_is_refused(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"problem": "1 + 1", "answer": "2"}\n{"problem": \n')
    assert "bad.jsonl, line 2 is not JSON" in refused(tmp_path, flag, file)
    assert "missing.jsonl" in refused(tmp_path, flag, tmp_path / "missing.jsonl")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--steps", 0),
        ("--seeds", 0),
        ("--epochs", 0),
        ("--workers", 0),
        ("--block-size", 0),
        ("--max-tokens", 0),
        ("--learning-rate", 0),
        ("--learning-rate", "nan"),
        ("--minibatch", 0),
        ("--warmup", 0),
        ("--sample-every", 0),
        ("--gradient-norm", 0),
        ("--gradient-norm", "nan"),
        ("--clip", 0),
        ("--clip", "inf"),
        ("--tau", -1),
        ("--advantage", "new"),
        ("--aggregate", "median"),
        ("--variant", "OPD + Token"),  # which is one of --extra
    ],
)
def test_an_option_out_of_range_is_refused(flag: str, value: object, tmp_path: Path) -> None:
    assert flag in refused(tmp_path, flag, value)


def test_no_gpu_is_said(tmp_path: Path) -> None:
    assert "--device cuda:99" in refused(tmp_path, "--device", "cuda:99")


def test_an_old_folder_is_not_overwritten(finished: tuple[Path, str], tmp_path: Path) -> None:
    before = comparable(finished[0] / "report.json")
    done = run("--out", finished[0])
    assert done.exit_code == 2 and "--resume" in done.output
    assert comparable(finished[0] / "report.json") == before
    done = run("--resume", tmp_path)
    assert done.exit_code == 2 and "no folder of an earlier run" in done.output
    done = run("--resume", finished[0], "--steps", 3)
    assert done.exit_code == 2 and "leave out --steps" in done.output


def test_extra_adds_gates_sizes_and_reuse_and_keeps_the_six() -> None:
    chosen = settings.Settings(extra=True, seeds=2, epochs=(1, 2))
    names = {variant.name for variant in settings.variants(chosen)}
    assert {v.name for v in settings.variants(settings.Settings())} < names
    assert {"OPD + Token", "OPD + Sequence", "OPD + Block64 rms", "OPD + Block32"} < names
    assert "OPD + Block64 every 8th" in names
    keys = [job.key for job in settings.jobs(chosen)]
    assert len(keys) == len(set(keys))
    assert "opd-4-epochs_e4_s1" in keys and "lsm_newlinespan_e1_s0" in keys


def test_variants_run_alone_and_have_a_gain_beside_their_ungated_one(
    options: list[object], tmp_path: Path
) -> None:
    alone = ["--variant", "OPD", "--variant", "LSM"]
    assert run(*options, *alone, "--out", tmp_path / "a", "--workers", 1).exit_code == 0
    rows = json.loads((tmp_path / "a" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows[2:]] == ["OPD", "LSM"]
    assert not any("gain" in row for row in rows)
    gated = ["--variant", "LSM + Block64", "--variant", "OPD", "--variant", "OPD + NewlineSpan"]
    assert run(*options, *gated, "--out", tmp_path / "b", "--workers", 1).exit_code == 0
    rows = json.loads((tmp_path / "b" / "report.json").read_text())["rows"]
    assert ["gain" in row for row in rows[2:]] == [False, True, False]


def test_every_knob_of_the_plan_comes_from_the_command_line(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = dict(
        learning_rate=5e-4, epochs=(8,), minibatch=16, gradient_norm=0.3, warmup=12, clip=0.1,
        tau=3.0, aggregate="rms", sample_every=8, advantage="current", block_size=16,
        variant=("OPD", "OPD + Block16"),
    )  # fmt: skip
    started = []
    monkeypatch.setattr(command, "run", lambda work, *rest: started.append(work.settings))
    flags = [
        word
        for name, value in knobs.items()
        for one in (value if isinstance(value, tuple) else [value])
        for word in (f"--{name.replace('_', '-')}", one)
    ]
    assert run(*options[:-2], *flags, "--compile", "--out", tmp_path / "out").exit_code == 0
    assert {name: getattr(started[0], name) for name in knobs} == knobs
    assert started[0].compile
    gates = [variant.gate for variant in settings.variants(started[0]) if variant.gate]
    assert {(gate.tau, gate.aggregate, gate.sample_every) for gate in gates} == {(3.0, "rms", 8)}
    kept = json.loads((tmp_path / "out" / command.SETTINGS).read_text())
    assert settings.Settings.from_json(kept) == started[0]


def test_settings_survive_their_file() -> None:
    chosen = settings.Settings(epochs=(1, 4), eval=("a", "b"), student="here")
    assert settings.Settings.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen


def test_a_run_that_breaks_says_how_to_go_on(
    options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(jobs.Trainer, "step", broken)
    done = run(*options, "--out", tmp_path, "--workers", 1)
    assert done.exit_code == 1
    assert "out of luck" in done.output and "--resume" in done.output
    assert (tmp_path / command.SETTINGS).exists()
