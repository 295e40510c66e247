"""`drift-gate bench`, its suites, the search over tiles, and the script for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from drift_gate.bench import cases, command, floors, profile_loss, record, sweep
from drift_gate.bench.harness import load_suite
from drift_gate.bench.internals import HAS_TRITON
from typer.testing import CliRunner

from drift_gate import cli

ROOT = Path(__file__).resolve().parent.parent


def test_every_suite_has_the_baseline_first_and_no_name_twice():
    assert len(command.suite_names()) >= 16
    for name in command.suite_names():
        suite = load_suite(name)
        names = [i.name for i in suite.implementations]
        assert suite.name == name and len(names) == len(set(names))
        if name not in ("host", "train_step"):  # whose units are others
            assert names[0] == "eager" and "drift_gate" in names


def test_a_grid_is_named_as_a_suite_is(monkeypatch):
    """`bench quick` is `bench --grid quick`, in a minute; no suite has a grid's name."""
    known = command.suite_names()
    assert not set(known) & set(cases.GRIDS)
    asked = {}

    def run(suites: list[str], *, grid: str, end: float, **options: Any) -> bool:
        asked.update(suites=suites, grid=grid, seconds=end - time.monotonic())
        return True

    monkeypatch.setattr(command, "run", run)
    for arguments, suites, grid, seconds in (
        (["quick"], known, "quick", 60),
        (["--grid", "quick"], known, "quick", 60),
        (["quick", "--grid", "quick", "--budget", "90"], known, "quick", 90),
        (["scan", "full", "rows"], ["scan", "rows"], "full", 600),
        ([], known, "star", 600),
    ):
        done = CliRunner().invoke(cli.app, ["bench", *arguments])
        assert done.exit_code == 0, done.output
        assert (asked["suites"], asked["grid"]) == (suites, grid)
        spent = cli.IMPORTS + 30  # of the budget, before the run: imports count
        assert seconds - spent < asked["seconds"] <= seconds


def test_what_matters_comes_first():
    names = command.suite_names()
    assert command.by_importance(["rows", "opd_loss", "expand"]) == ["opd_loss", "rows", "expand"]
    assert sorted(command.by_importance(names)) == names
    assert set(command.FIRST) <= set(names)


@pytest.mark.slow
def test_the_command_and_its_results(tmp_path):
    """Row functions alone: a suite without logits. Nothing is compiled."""
    out = tmp_path / "out.json"
    options = ["--grid", "dry", "--rounds", "2", "--device", "cpu", "--out", str(out), "--no-plots"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", "drift_gate", "bench", "rows", *options]
    done = subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drift_gate" in done.stdout
    found = {r.implementation: r for r in record.read(out)}
    assert set(found) == {"eager", "torch.compile of eager", "drift_gate"}
    ours = found["drift_gate"]
    assert len(ours.seconds) == 2 and ours.errors["grad"]["max"] < 1e-7
    assert ours.bytes_must_move == floors.rows(ours.size).bytes


@pytest.mark.slow
def test_a_suite_without_a_size_in_the_grid_has_nothing_to_run():
    """No row of the README is about the suite rows."""
    files = [str(command.SUITES / f"test_{name}.py") for name in ("rows", "full_loss")]
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--bench-grid", "targets"]
    command_line = [sys.executable, "-m", "pytest", *options, "--bench-device", "cpu", *files]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_full_loss[jsd, 1024 x 151936, bfloat16, peaked: drift_gate]" in done.stdout
    assert "test_rows" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_run_that_is_ended_keeps_what_it_has(tmp_path):
    """SIGTERM, as a time limit sends; Ctrl-C takes the same way."""
    out = tmp_path / "out.json"
    options = ["--rounds", "100000", "--device", "cpu", "--out", str(out), "--budget", "300"]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, "-m", "drift_gate", "bench", "rows", *options]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command_line, cwd=ROOT, env=environment, **pipe) as running:
        try:
            end = time.monotonic() + 120
            while time.monotonic() < end and not (
                out.exists() and '"ratio_quartiles": [' in out.read_text()
            ):
                time.sleep(0.2)
            running.terminate()
            said, _ = running.communicate(timeout=120)
        finally:
            running.kill()
    assert running.returncode == 1 and "interrupted" in said, said
    found = {r.implementation: r for r in record.read(out)}
    assert found["drift_gate"].seconds and found["drift_gate"].ratio_quartiles
    assert list(tmp_path.glob("out_rows_time.png"))


def test_a_profile_by_operation_adds_up():
    case, events = profile_loss.profiled(load_suite("topk_loss"), "LSM", rows=4)
    assert (case.rows, case.vocab) == (4, 151_936)
    *lines, total = profile_loss.table(events)
    shares = [float(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=1)
    assert any("drift_gate" in line for line in lines) and total.startswith("100.0%")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nonsense"], "no suite or grid nonsense"),
        (["--grid", "huge"], "--grid"),
        (["quick", "--grid", "star"], "one grid at a time; got quick, star"),
        (["quick", "full"], "one grid at a time; got full, quick"),
        (["--compare", "a", "b"], "a"),
    ],
)
def test_a_bad_option_of_bench_is_refused(arguments, named):
    done = CliRunner().invoke(cli.app, ["bench", *arguments])
    assert done.exit_code == 2 and named in done.output


def test_a_configuration_is_set_and_put_back():
    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **options: (grid, arguments, options)

    kernel = Kernel()
    module = types.SimpleNamespace(TILE=1024, _kernel=kernel)
    settings = {"TILE": 64, "num_warps": 2}
    with sweep.configured(module, ("_kernel",), settings):
        assert module.TILE == 64
        launched = module._kernel[(3,)]("x", num_warps=8, K=1)
        assert launched == ((3,), ("x",), {"num_warps": 2, "K": 1})
    assert module.TILE == 1024 and module._kernel is kernel
    with pytest.raises(AttributeError), sweep.configured(module, (), {"NO_SUCH_TILE": 1}):
        pass


def test_a_search_follows_the_best_of_each_axis():
    seen = []

    def cost(settings: dict[str, int]) -> float:
        seen.append(tuple(settings.values()))
        return abs(settings["a"] - 3) + abs(settings["b"] - 20)

    sweep.search({"a": (1, 2, 3), "b": (10, 20)}, cost, end=float("inf"))
    assert seen[:4] == [(1, 10), (2, 10), (3, 10), (3, 20)]
    assert len(seen) == len(set(seen)) == 6


def test_what_a_sweep_found_faster(tmp_path):
    """Of the passes that are asked for, and by more than noise."""
    times = {"gather": (1.0, 0.5, 0.8), "sparse": (1.0, 0.99), "scan": (1.0, 0.1)}
    results = [
        {"pass": name, "settings": {f"{name} tile": i}, "seconds": seconds}
        for name, found in times.items()
        for i, seconds in enumerate(found)
    ]
    results.append({"pass": "sparse", "settings": {"warps": 0}, "seconds": 2.0})
    results.append({"pass": "sparse", "settings": {"warps": 1}, "left_out": "too large"})
    results.append({"pass": "sparse", "settings": {"warps": 2}, "seconds": 1.0})
    path = tmp_path / "sweep.json"
    assert sweep.best(path, ("gather",)) == {}
    path.write_text(json.dumps({"machine": {}, "results": results}))
    found = sweep.best(path, ("gather", "sparse"))
    assert found == {"gather": {"gather tile": 1}, "sparse": {"warps": 2}}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a bash script")
def test_the_gpu_script(tmp_path):
    """Its syntax; and some parts, dry: rows of a loss, host times, every pass once, a profile."""
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    parts = {"PARTS": "head targets host sweep profile chunks", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script), "--dry", str(tmp_path)], env=os.environ | parts,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "gpu.txt").read_text()
    assert torch.__version__ in said and "targets: done" in said and "host: done" in said
    suites = {
        r.suite for name in ("targets", "host") for r in record.read(tmp_path / f"{name}.json")
    }
    assert suites == {"rows", "topk_loss", "host"}
    if HAS_TRITON:
        assert "sweep: done" in said and "profile: done" in said
        passes = json.loads((tmp_path / "sweep.json").read_text())["results"]
        measured = "blocks divergence divergence_grad expand gather rows scan select sparse topk"
        assert {r["pass"] for r in passes if r["seconds"] > 0} == set(measured.split())
        assert "launches" in said and "over_products" in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.parent == tmp_path for path in files)
