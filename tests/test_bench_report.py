"""What the benchmarks show: comparisons, pictures, the README's rows, growth."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from drift_gate.bench import compare, growth, record, targets
from drift_gate.bench.record import Result
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
