"""What the benchmarks show: comparisons, pictures, the README's rows, growth."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from drift_gate.bench import (
    compare,
    device_time,
    growth,
    readme_table,
    record,
    report,
    short_table,
    summary,
    targets,
    verdict,
)
from drift_gate.bench.harness import load_suite
from drift_gate.bench.record import Result
from rich.console import Console
from typer.testing import CliRunner

from drift_gate import cli


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
        return targets.line(row, list(results), gpu=False)

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
    text = targets.line(row, [ours, eager, compiled], gpu=False)
    assert "0.75 x torch.compile of eager (0.75 to 0.75), 1650 ms" in text and "100.0%" in text
    once = dataclasses.replace(compiled, one_call=True, seconds=[[2.0]])
    assert "not measured" in targets.line(row, [ours, eager, once], gpu=False)


def on_gpu(row: targets.Target, seconds: float, **fields: Any) -> Result:
    result = made_up(seconds, row.suite, **fields)
    machine = result.machine | {"cuda": "13.0"}
    return dataclasses.replace(result, case=row.case._asdict(), machine=machine)


def test_a_gpu_s_row_has_the_time_of_the_device_and_of_the_call():
    row = next(target for target in targets.GPU if target.kind == "live")
    floor = load_suite(row.suite).floor(row.case).bytes / 1e9  # seconds, at a gigabyte a second
    ours = on_gpu(row, floor, live_rows=8192, device_seconds=[floor, 1.02 * floor, 1.04 * floor])
    text = targets.line(row, [ours], gpu=True)
    assert "| 1.02 x floor, " in text and "| 1.1 x floor, " in text  # made_up's median is 1.1
    assert "(missed)" in text  # a call may take 1.08
    # With half the rows live there is less to move: 2.5 instead of 3 passes over the logits.
    half = dataclasses.replace(ours, live_rows=4096)
    assert "| 1.22 x floor, " in targets.line(row, [half], gpu=True)
    # Results of earlier versions do not say how many rows are live, and have no ratio.
    old = dataclasses.replace(ours, live_rows=None, device_seconds=[])
    assert f"| - | {1100 * floor:.4g} ms |" in targets.line(row, [old], gpu=True)


def test_a_row_beside_bare_products_and_one_with_two_limits():
    row = next(target for target in targets.GPU if target.instead)
    gemms = on_gpu(row, 1.0, implementation=targets.GEMMS, device_seconds=[1.0])

    def line(device: float, gib: float) -> str:
        extra = round(gib * targets.GIB)
        given = dict(implementation="drift_gate", extra_bytes=extra, device_seconds=[device])
        return targets.line(row, [gemms, on_gpu(row, 1.0, **given)], gpu=True)

    assert "| 1.05 x 3 GEMMs, 1050 ms | 1 x 3 GEMMs, " in line(1.05, 4.0)
    for device, gib, missed in ((1.05, 4.0, False), (1.05, 5.0, True), (1.12, 2.0, False)):
        assert ("missed" in line(device, gib)) == missed
    assert "missed" in line(1.12, 4.0)  # too slow for the one, too large for the other


def test_who_is_wrong_has_no_time():
    """Held to the eager loss's error; without one, to being finite."""

    def off(error: float, **fields: Any) -> Result:
        return made_up(1.0, errors={"grad": dict(max=error, rms=error, scale=1e-2)}, **fields)

    eager = off(1e-5, implementation="eager")
    near, far = off(9e-5, implementation="near"), off(2e-4, implementation="far")
    ours = off(9e-5)  # what a peer may, this package may not
    nan = off(float("nan"), implementation="nan")
    results = [eager, near, far, ours, nan]
    found = verdict.verdicts(results)
    assert set(found) == {id(far), id(ours), id(nan)}
    assert found[id(nan)] == "grad is not finite" and "is off by 2.0e-04" in found[id(far)]
    assert verdict.sound(results) == [eager, near]
    assert set(verdict.verdicts([far, nan])) == {id(nan)}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(next(report.tables(results, 120)))
    text = captured.get()
    assert text.count("wrong") == 6 and "wrong: far: grad is off by" in text
    assert text.count("1.1 s") == 2 and "far" in "\n".join(summary.lines(results))


def test_a_table_says_how_many_rows_are_live_and_what_the_device_took():
    console = Console(width=120)
    results = [made_up(1.0, live_rows=2048, device_seconds=[0.25])]
    with console.capture() as captured:
        console.print(next(report.tables(results, 120)))
    text = captured.get()
    assert "50.0% of the rows live" in text and "device" in text and "250 ms" in text
    assert "50.0% of rows live" in summary.lines(results)[1]


def test_results_of_a_folder_come_by_date_and_sweeps_are_passed_over(tmp_path):
    folder = tmp_path / "a-gpu"
    days = {"2026-12-01_later.json": "2026-12-01", "early.json": "2026-11-26"}
    for name, date in days.items():
        one = made_up(1.0)
        record.write(
            folder / name, [dataclasses.replace(one, machine=one.machine | {"date": date})]
        )
    (folder / "sweep.json").write_text(json.dumps({"machine": {}, "results": [{"pass": "scan"}]}))
    assert [r.machine["date"] for r in record.read(tmp_path)] == ["2026-11-26", "2026-12-01"]


def test_committed_results_fill_the_rows_of_the_readme():
    """Those of a GPU too, which an earlier version measured."""
    text = readme_table.figures(record.read(readme_table.RESULTS))
    gpu, cpu = text.split("Targets on a CPU")
    assert "NVIDIA H200" in gpu and "3 GEMMs" in gpu and gpu.count(" ms") > 10
    assert "x eager" in cpu


def test_the_pages_are_those_of_the_committed_results():
    """`make readme-table` writes them."""
    results = record.read(readme_table.RESULTS)
    short = readme_table.first_screen(results)
    devices = short.count("**") // 2  # each with the eager loss and this package's, or more
    assert devices >= 3 and short.count(" ms, ") >= 2 * devices * len(short_table.LINES)
    for path, text in (
        (readme_table.README, short),
        (readme_table.PAGE, readme_table.figures(results)),
    ):
        assert readme_table.between_marks(path, text) == path.read_text()


def test_the_short_table_leaves_out_what_is_wrong_or_missing():
    row = next(target for target in targets.CPU if target.implementation == targets.INPLACE)
    ours, eager = (
        dataclasses.replace(
            made_up(1.0, row.suite, implementation=name, extra_bytes=1 << 29),
            case=row.case._asdict(),
        )
        for name in (targets.INPLACE, "eager")
    )
    assert short_table.markdown([eager]) == short_table.markdown([])
    *_, line = short_table.markdown([ours, eager])
    assert line.endswith("| 1,100 ms, 0.5 GiB |  | 1,100 ms, 0.5 GiB |")
    never = dataclasses.replace(eager, seconds=[])
    assert short_table.markdown([ours, never])[-1].endswith(" |  |  | 1,100 ms, 0.5 GiB |")


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


def test_kernels_that_differ_behind_their_namespaces_are_told_apart():
    rest = "(at::TensorIteratorBase&)::{lambda()#1}::operator()() const"
    names = (
        f"void at::native::vectorized_elementwise_kernel<4, at::native::{one}{rest}"
        for one in ("sin_kernel_cuda", "AUnaryFunctor<float, float, float>")
    )
    sine, other = map(device_time.short_name, names)
    assert sine.startswith("vectorized_elementwise_kernel<4, sin_kernel_cuda(") and sine != other


def test_the_kernels_of_a_call_are_listed():
    profile = {"kernels": {"_scan": [2, 3e-3], "fill": [1, 1e-6]}, "busy": 3.001e-3}
    profile |= {"span": 4e-3, "returned": 5e-4, "allocated": 0}
    shown = summary.lines([made_up(1.0, profile=profile)])
    assert any("kernels 3001 us, from first to last 4000, returned after 500" in x for x in shown)
    assert any(x.endswith("3000.0 us  2 x _scan") for x in shown)
    assert summary.kernels(profile, most=1)[1:] == ["   3000.0 us  2 x _scan"]
