"""The benchmarks: what they divide by, what they hold to be true, and what they write."""

from __future__ import annotations

import dataclasses
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
from drift_gate.bench import (
    cases,
    command,
    compare,
    floors,
    growth,
    harness,
    inputs,
    record,
    runs,
    sweep,
    targets,
)
from drift_gate.bench.bounds import Bounds, TooLong, within
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.peers import guard, plain
from drift_gate.bench.record import Result
from drift_gate.bench.truth import Expected, sampled_or_listed
from torch import Tensor
from typer.testing import CliRunner

import drift_gate
from drift_gate import cli
from drift_gate.backends import has_triton

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = Case("work", 70, 259, "float32", k=8)  # a block of rows and a part; an odd vocabulary


# Bytes that must move.


def test_floors_by_hand():
    case = Case("", 3, 10, "bfloat16", k=2)
    assert floors.scan(case, 2).bytes == 3 * 10 * 2 + 3 * (2 * 16 + 8)
    assert floors.scan(case, 1, with_entropy=True).bytes == 60 + 3 * (16 + 12)
    assert floors.expand(case, 1).bytes == 2 * 60 + 3 * (12 + 16)
    assert floors.expand(case, 2, read=False).bytes == 60 + 3 * (12 + 32)
    assert floors.divergence(case).bytes == 2 * 60 + 3 * 37
    assert floors.divergence_grad(case).bytes == 3 * 60 + 3 * 25
    assert floors.rows(case).bytes == 3 * (21 + 37)
    assert floors.topk_rows(case).bytes == 3 * 2 * 13 + 3 * 17
    head = case._replace(hidden=5)  # [3, 5] and [10, 5] read, their gradients written
    assert floors.linear(head, 3) == floors.Floor(2 * 13 * 5 * 2, 3 * 2 * 3 * 10 * 5)


def test_opd_loss_at_work_s_moves_what_the_design_says():
    """2.49 GB of logits, two reads and a write; row data are below a thousandth."""
    suite = load_suite("opd_loss")
    floor = suite.floor(suite.anchor(True)).bytes
    logits = 8192 * 151_936 * 2
    assert 3 * logits < floor < 3.003 * logits
    lsm = load_suite("topk_loss")
    floor = lsm.floor(lsm.anchor(True)).bytes
    assert 2 * logits < floor < 2.01 * logits


@pytest.mark.skipif(not has_triton(), reason="the kernels declare their bytes beside Triton code")
def test_floors_are_what_the_kernels_declare():
    from drift_gate.kernels.divergence import divergence_bytes
    from drift_gate.kernels.divergence_grad import divergence_grad_bytes
    from drift_gate.kernels.expand import expand_bytes
    from drift_gate.kernels.scan import scan_bytes

    logits, case = torch.empty(1, 7, 33, dtype=torch.bfloat16), Case("", 7, 33, "bfloat16")
    assert floors.scan(case, 3, with_entropy=True).bytes == scan_bytes(logits, 3, with_entropy=True)
    assert floors.expand(case, 3).bytes == expand_bytes(logits, 3)
    assert floors.expand(case, 3, read=False).bytes == expand_bytes(logits, 3, read=False)
    assert floors.divergence(case).bytes == divergence_bytes(logits, logits, "reverse")
    assert floors.divergence_grad(case).bytes == divergence_grad_bytes(logits, logits)


# Sizes.


def test_grids():
    anchor = Case("a", 8192, 151_936, "bfloat16", k=64)
    star = cases.cases(anchor, ("a", "b"), "star", True)
    assert star[:2] == [anchor, anchor._replace(what="b")]  # what the README quotes comes first
    assert len(star) == len(set(star))
    assert {c.rows for c in star} >= {256, 65_536} and {c.k for c in star} >= {8, 256}
    assert {c.kind for c in star} == {"peaked", "normal"}
    full = cases.cases(anchor, ("a",), "full", True)
    assert len(full) == 9 * 2 * 3 * 5 * 5
    for on_gpu in (False, True):
        rows = [c.rows for c in cases.cases(anchor, ("a",), "growth", on_gpu)]
        assert max(rows) == 64 * min(rows)


def test_sizes_of_the_readme_s_rows():
    """Every row is measured by a suite that has its implementation, and before all else."""
    for on_gpu, rows in ((False, targets.CPU), (True, targets.GPU)):
        for row in rows:
            suite = load_suite(row.suite)
            cases_ = suite.cases("targets", on_gpu)
            assert row.case in cases_ and suite.cases("quick", on_gpu)[: len(cases_)] == cases_
            assert suite.floor(row.case).bytes > 0 and row.what in suite.works
            names = {i.name for i in suite.chosen("targets", on_gpu)}
            assert {"eager", row.implementation, row.beside} <= names
            assert (targets.GEMMS in names) == (on_gpu and row.hidden > 0)
        assert load_suite("rows").cases("targets", on_gpu) == []
    assert {i.name for i in load_suite("linear_opd_loss").chosen("growth", False)} == {
        "eager", targets.COMPILED, "drift_gate",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["peaked", "normal"])
@pytest.mark.parametrize("hidden", [0, 16])
def test_inputs_are_drawn_as_named(kind: str, hidden: int):
    work = inputs.draw(SMALL._replace(kind=kind, hidden=hidden), CPU)
    top = work.logits64(slice(None)).softmax(-1).amax(-1)
    if kind == "peaked":
        assert top.median() > 0.1 and top.min() < 0.1
    else:
        assert top.max() < 0.3
    lse = work.logits64(slice(None)).logsumexp(-1)
    torch.testing.assert_close(work.lse64, lse)
    assert (work.now64 < 0).all() and (work.log_q < 1e-5).all()  # float32: 0 may round up


# What is held to be true: against the package's own reference, written for reading.


def test_truth_of_sampled_tokens_is_the_reference():
    work = inputs.draw(SMALL, CPU)
    rows = plain.Rows(work, torch.float64)
    truth = sampled_or_listed(work, lambda now, lse, listed: rows.sampled(now))
    leaf = work.logits.double().requires_grad_()
    row_data = work.labels, work.old.double(), work.teacher.double()
    loss = drift_gate.opd_loss(leaf, *row_data, backend="reference").loss
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(truth["loss"].value, loss.detach())
    torch.testing.assert_close(truth["grad"].value, grad[work.checked])


def test_truth_of_lists_through_the_head_is_the_reference():
    work = inputs.draw(SMALL._replace(hidden=16), CPU)
    rows = plain.Rows(work, torch.float64)
    truth = sampled_or_listed(
        work, lambda now, lse, z: rows.gated(now.detach(), plain.lsm(z, work.log_q))
    )
    hidden, weight = (x.double().requires_grad_() for x in (work.hidden, work.weight))
    row_data = work.labels, work.old.double(), work.ids, work.log_q.double()
    loss = drift_gate.topk_loss(hidden @ weight.T, *row_data, backend="reference").loss
    grads = torch.autograd.grad(loss, (hidden, weight))
    for name, grad in zip(("grad_hidden", "grad_weight"), grads, strict=True):
        value, where = truth[name]
        torch.testing.assert_close(value, grad[where])


# Peers.


@pytest.mark.parametrize(
    "module, name, reason",
    [
        ("no_such_package.loss", "f", "no_such_package is not installed"),
        ("torch.nn", "NoSuchModule", "this version of torch has no NoSuchModule"),
        ("needy_peer", "f", "needy_peer needs no_such_package, which is not installed"),
        ("broken_peer", "f", "broken_peer fails to import: OSError: no driver"),
    ],
)
def test_a_missing_peer_is_left_out_with_the_reason(tmp_path, monkeypatch, module, name, reason):
    (tmp_path / "needy_peer.py").write_text("import no_such_package")
    (tmp_path / "broken_peer.py").write_text("raise OSError('no driver')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(guard.LeftOut, match=reason):
        guard.load(module, name)


def square(work: Any) -> Any:
    return runs.train(lambda logits: (logits**2).mean())


def overwriting(work: Any) -> Any:
    def run(logits: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"grad": logits.mul_(2 / logits.numel())}

    return run


def absent(work: Any) -> Any:
    raise guard.LeftOut("nobody is here")


def broken(work: Any) -> Any:
    def run(logits: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("no such kernel")

    return run


def toy(*implementations: Implementation) -> Suite:
    """A mean of squares, whose gradient is 2 z / n."""

    def truths(work: inputs.Work) -> dict[str, Any]:
        grad = 2 * work.logits64(work.checked) / work.logits.numel()
        return {"same": {"grad": Expected(grad, work.checked)}}

    eager = Implementation("eager", square)
    return Suite(
        "toy", ("work",), lambda gpu: SMALL, inputs.draw, lambda case: floors.Floor(10**6, 10**6),
        truths, (eager, *implementations),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, Result]:
    suite = toy(
        Implementation("in place", overwriting, overwrites=True),
        Implementation("after it", square, "note"),
        Implementation("absent", absent),
        Implementation("broken", broken),
        Implementation("large", square, temporaries=1e15),
    )
    return harness.measure(suite, SMALL, CPU, Bounds(rounds=3))


def test_every_implementation_is_measured_on_the_same_inputs(measured):
    """One that overwrites the logits leaves nothing of it to the next."""
    for name in ("eager", "in place", "after it"):
        found = measured[name]
        assert found.errors["grad"]["max"] <= 1e-6 * found.errors["grad"]["scale"]
        assert len(found.seconds) == 3 and found.ratio_quartiles is not None
    assert measured["eager"].ratio_quartiles == (1, 1, 1)
    logits = 70 * 259 * 4
    assert measured["in place"].extra_bytes < logits <= measured["eager"].extra_bytes
    assert measured["in place"].gradient_bytes == 0
    assert measured["eager"].gradient_bytes == logits


def test_what_cannot_run_is_left_out(measured):
    assert measured["absent"].left_out == "nobody is here"
    assert measured["broken"].left_out == "RuntimeError: no such kernel"
    assert "GB are free" in measured["large"].left_out
    for name in ("absent", "broken", "large"):
        assert measured[name].seconds == []


def test_this_package_may_not_fail():
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.measure(toy(Implementation("drift_gate", broken)), SMALL, CPU, Bounds(rounds=1))


# What bounds a run.


def delayed(seconds: float) -> Any:
    def make(work: Any) -> Any:
        def run(logits: Tensor) -> dict[str, Tensor]:
            for _ in range(round(seconds / 0.01)):
                time.sleep(0.01)
            return square(work)(logits)

        return run

    return make


def test_a_call_is_stopped_at_its_limit():
    start = time.monotonic()
    with pytest.raises(TooLong), within(0.2):
        time.sleep(30)
    assert time.monotonic() - start < 10
    with within(0.2):
        pass
    time.sleep(0.3)  # no alarm is left behind


def test_a_slow_peer_is_called_once_and_a_slower_one_is_stopped():
    suite = toy(
        Implementation("quick", square),
        Implementation("slow", delayed(0.5)),
        Implementation("slower", delayed(60)),
        Implementation("slow once compiled", delayed(0.5), compiles=True),
    )
    bounds = Bounds(rounds=2, slack=0.2, slowest=0, compiling=0)
    found = harness.measure(suite, SMALL, CPU, bounds._replace(slack=2))
    assert [len(found[name].seconds) for name in ("quick", "slow")] == [2, 2]
    assert found["slower"].left_out == "one call takes more than 2 s"
    # An eager call of a millisecond, and 100 times as long allowed.
    bounds = bounds._replace(slack=0.2, slowest=2000, slow=1.5)
    found = harness.measure(suite, SMALL, CPU, bounds, ("quick", "slow", "slow once compiled"))
    for name in ("slow", "slow once compiled"):
        assert found[name].one_call and len(found[name].samples) == 1
        assert found[name].samples[0] > 0.5 and found[name].ratio_quartiles[1] > 1.5
        assert found[name].extra_bytes > 0 and found[name].errors["grad"]["scale"] > 0
    assert not found["quick"].one_call


def test_what_the_time_budget_does_not_reach_is_left_out():
    compiled = Implementation("torch.compile of eager", square)
    suite = toy(compiled, Implementation("late", square), Implementation("drift_gate", square))
    bounds = Bounds(rounds=5, end=time.monotonic() - 1)
    found = harness.measure(suite, SMALL, CPU, bounds)
    assert found["late"].left_out == harness.UNREACHED and found["late"].seconds == []
    assert found["torch.compile of eager"].left_out is None  # a row may need it
    for name in ("eager", "drift_gate"):  # must run, for one round
        assert len(found[name].seconds) == 1 and found[name].left_out is None


def test_results_are_kept_as_they_come():
    seen = []

    def keep(results: dict[str, Result]) -> None:
        seen.append({name: (len(r.seconds), r.left_out) for name, r in results.items()})
        if seen[-1]["eager"][0] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.measure(toy(Implementation("absent", absent)), SMALL, CPU, Bounds(5), keep=keep)
    cut = (0, harness.CUT)
    assert seen[0] == {"eager": cut, "absent": cut}
    assert seen[-3:] == [
        {"eager": (n, None if n else harness.CUT), "absent": (0, "nobody is here")}
        for n in range(3)
    ]


# Results.


def test_schema_of_a_result(measured, tmp_path):
    path = tmp_path / "a.json"
    wanted = list(measured.values())
    record.write(path, wanted)
    back = record.read(path)
    assert json.dumps([r.as_dict() for r in back]) == json.dumps([r.as_dict() for r in wanted])
    data = json.loads(path.read_text())["results"][0]
    assert data["bytes_must_move"] == 10**6
    median = sorted(s for one in data["seconds"] for s in one)[1]
    assert data["gb_per_s"] == pytest.approx(1e-3 / median)
    assert data["fraction_of_copy"] == pytest.approx(1e6 / median / data["copy_bytes_per_s"])
    assert data["machine"]["torch"] == torch.__version__
    assert {"device", "commit", "date", "threads", "python"} <= set(data["machine"])
    path.write_text("[]")
    with pytest.raises(ValueError, match="no benchmark results of schema"):
        record.read(path)


def made_up(seconds: float, suite: str = "opd_loss", rows: int = 4096, **fields: Any) -> Result:
    size = dict(what=targets.TRAIN, rows=rows, vocab=151_936, dtype="bfloat16")
    given = dict(implementation="drift_gate, in place", note="", baseline="eager", extra_bytes=10)
    return Result(
        suite=suite, case=size | dict(k=0, hidden=0, kind="peaked"),
        bytes_must_move=4_000_000, flops=8_000_000,
        machine={"device": "a machine", "torch": "2", "date": "today", "commit": "c0ffee"},
        copy_bytes_per_s=1e9, seconds=[[seconds], [1.1 * seconds], [1.2 * seconds]],
        **given | fields,
    )  # fmt: skip


def test_comparison_of_two_files(tmp_path):
    paths = tmp_path / "a.json", tmp_path / "b.json"
    record.write(paths[0], [made_up(1.0), made_up(1.0, rows=512), made_up(1.0, rows=99)])
    record.write(paths[1], [made_up(0.5, extra_bytes=20), made_up(1.05, rows=512)])
    first, second = compare.changes(*map(record.read, paths))
    assert (first.time, first.memory, first.verdict) == (pytest.approx(0.5), 2, "faster")
    assert second.verdict == ""  # the quartiles overlap
    assert compare.unmatched(*map(record.read, paths)) == (1, 0)
    done = CliRunner().invoke(cli.app, ["bench", "--compare", *map(str, paths)])
    assert done.exit_code == 0, done.output
    assert "faster" in done.output and "only in A: 1" in done.output


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from drift_gate.bench import plots

    names = ("eager", "drift_gate", "a peer")
    lines = [
        made_up(1e-6 * rows * (i + 1), rows=rows, implementation=name)
        for i, name in enumerate(names)
        for rows in (256, 1024, 4096)
    ]
    written = plots.draw(lines, tmp_path / "run.json")
    kinds = {path.stem.removeprefix("run_opd-loss_") for path in written}
    assert kinds == {"time", "memory", "roofline", "growth"}  # rows grow by 16
    for path in written:
        assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_rows_of_the_readme():
    row = next(target for target in targets.CPU if target.implementation == targets.INPLACE)

    def line(*results: Result) -> str:
        return targets.line(row, list(results), targets.cpu_time, gpu=False)

    eager = made_up(10.0, implementation="eager", extra_bytes=1000)
    assert "not measured" in line(eager)
    assert "not measured" in line(eager, made_up(1.0, rows=512))
    fast = made_up(1.0)
    assert "0.1 x eager (0.1 to 0.1), 1100 ms" in line(eager, fast) and "missed" not in line(
        eager, fast
    )
    slow = made_up(3.0)
    assert "0.3 x eager (0.3 to 0.3), 3300 ms (missed)" in line(eager, slow)
    assert "1.0%" in line(eager, fast) and "missed" in line(eager, made_up(1.0, extra_bytes=21))
    peers = (
        made_up(2.0, implementation="whole", note="gate eager"),
        made_up(1.0, implementation="half", note="cross entropy alone: no clip, no gate"),
    )
    assert "whole, 2200 ms" in line(eager, fast, *peers)  # who does less is not the best


def test_a_row_beside_another_implementation_than_the_eager_loss():
    row = next(target for target in targets.CPU if target.beside == targets.COMPILED)
    case = row.case._asdict()
    ours, eager, compiled = (
        dataclasses.replace(made_up(s, row.suite, implementation=name), case=case)
        for s, name in ((1.5, "drift_gate"), (3.0, "eager"), (2.0, targets.COMPILED))
    )
    text = targets.line(row, [ours, eager, compiled], targets.cpu_time, gpu=False)
    assert "0.75 x torch.compile of eager (0.75 to 0.75), 1650 ms" in text and "100.0%" in text
    once = dataclasses.replace(compiled, one_call=True, seconds=[[2.0]])
    assert "not measured" in targets.line(row, [ours, eager, once], targets.cpu_time, gpu=False)


def test_growth_of_the_cost():
    """Of the sizes of a suite the one whose rows span most; twice the time for twice the rows."""
    wide = [made_up(1e-6 * n, rows=n, extra_bytes=8 * n, gradient_bytes=2 * n) for n in (64, 4096)]
    narrow = [
        dataclasses.replace(r, case=r.case | {"vocab": 7})
        for r in (made_up(9.0), made_up(9, rows=2048))
    ]
    (found,) = growth.found_in([*wide, *narrow])
    assert (found.rows, found.factor) == ([64, 4096], 64)
    assert list(growth.cells(found)) == [("drift_gate, in place", ["1.1, 0.000384", "1.1, 0.0246"])]
    assert "| drift_gate, in place | 1.1, 0.000384 | 1.1, 0.0246 |" in growth.markdown(wide)
    assert not list(growth.found_in(narrow))


# Running.


def load_suite(name: str) -> Suite:
    import importlib

    return importlib.import_module(f"drift_gate.bench.suites.test_{name}").SUITE


def test_every_suite_has_the_baseline_first_and_no_name_twice():
    assert len(command.suite_names()) == 12
    for name in command.suite_names():
        suite = load_suite(name)
        names = [i.name for i in suite.implementations]
        assert suite.name == name and names[0] == "eager" and "drift_gate" in names
        assert len(names) == len(set(names))


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


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nonsense"], "no suite nonsense"),
        (["--grid", "huge"], "--grid"),
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


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a bash script")
def test_the_gpu_script(tmp_path):
    """Its syntax; and two stages, dry: every pass once, and the profile of one."""
    script = ROOT / "bench" / "gpu.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = os.environ | {"DRY": "1", "STAGES": "sanitizer profile", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in (tmp_path / "machine.txt").read_text()
    if has_triton():
        stages = (tmp_path / "stages.txt").read_text()
        assert "small_shapes: done" in stages and "profile: done" in stages
        passes = json.loads((tmp_path / "small_shapes.json").read_text())["results"]
        assert len({r["pass"] for r in passes if r["seconds"] > 0}) == 8
        assert "scan" in (tmp_path / "profile.txt").read_text()
