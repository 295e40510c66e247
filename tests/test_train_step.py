"""The suite `train_step`: every loss trains one small model; its table and its picture."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drift_gate.bench import harness, record, report, step_report, summary, train_step
from drift_gate.bench.bounds import Bounds
from drift_gate.bench.names import LAYERS, STEP
from drift_gate.bench.record import Result
from rich.console import Console

pytest.importorskip("transformers")
CPU = torch.device("cpu")
OURS = [entry.name for entry in train_step.ENTRIES if entry.name.startswith("drift_gate")]


@pytest.fixture(scope="module")
def dry() -> Any:
    (case,) = train_step.SUITE.cases("dry", False)
    return case


@pytest.fixture(scope="module")
def measured(dry: Any) -> dict[str, Result]:
    """This package, what it is held to, and a peer that runs on a CPU."""
    wanted = (*OURS, "TRL selective_log_softmax")
    return train_step.SUITE.measure(dry, CPU, Bounds(2), wanted)


def test_each_loss_has_the_gradient_of_the_eager_one(measured: dict[str, Result]) -> None:
    pytest.importorskip("trl")
    assert len(OURS) == 4
    for entry in train_step.ENTRIES:
        if entry.unit and entry.name in measured:
            found, eager = (measured[name].step for name in (entry.name, entry.unit))
            assert found is not None and eager is not None
            # TRL's function takes bfloat16 logits' log-softmax in bfloat16.
            near = 1e-3 if entry.name in OURS else 0.05
            assert found["gradient_norm"] == pytest.approx(eager["gradient_norm"], rel=near)
            assert found["loss"] == pytest.approx(eager["loss"], abs=0.01)


def test_time_and_memory_are_of_the_whole_step(measured: dict[str, Result]) -> None:
    layers, eager = (measured[name] for name in (LAYERS, train_step.OPD))
    for result in (layers, eager):
        assert len(result.seconds) == 2 and result.step is not None
        assert result.step["peak_bytes"] == result.step["held_bytes"] + result.extra_bytes
        # Weights in bfloat16, 259 x 64 of them in the head alone.
        assert result.step["held_bytes"] > 2 * 259 * 64
    assert eager.ratio_quartiles == (1, 1, 1)


def test_the_batch(dry: Any) -> None:
    """Padded on the right, prompts masked, a quarter in all; blocks of the eager gate are ours."""
    from drift_gate import gate_weights

    problem = train_step.draw(dry, CPU)
    assert problem.model.training and problem.model.is_gradient_checkpointing
    assert not problem.mask[:, -1].any() and not problem.mask[:, :16].any()
    assert problem.mask.float().mean() == pytest.approx(0.83, abs=0.01)  # two of four sequences
    gate = gate_weights(problem.old, problem.teacher, response_mask=problem.mask)
    for of_eager in problem.blocks[problem.mask.flatten()].unique():
        ours = gate.block_ids.flatten()[(problem.blocks == of_eager) & problem.mask.flatten()]
        assert len(ours.unique()) == 1
    assert (problem.labels[:, :-1] == problem.tokens[:, 1:]).all()


def test_whoever_computes_another_loss_or_fails_has_no_bar(dry: Any) -> None:
    def ungated(x: Any) -> Any:
        return lambda hidden: hidden.float().square().mean()

    def broken(x: Any) -> Any:
        def loss(hidden: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        return loss

    def grows(x: Any) -> Any:
        """Warm three times, and then no longer."""
        steps = iter((train_step.ENTRIES[1].make(x),) * 3)

        def loss(hidden: Any) -> Any:
            eager = next(steps, None)
            if eager is None:
                raise torch.OutOfMemoryError("no memory")
            return eager(hidden)

        return loss

    entries = (
        *train_step.ENTRIES[:2],
        train_step.Entry("growing", grows, train_step.OPD),
        train_step.Entry("another", ungated, train_step.OPD),
        train_step.Entry("large", broken, train_step.OPD),
    )
    suite = train_step.SUITE._replace(implementations=entries)
    found = suite.measure(dry, CPU, Bounds(1))
    assert found["another"].left_out.startswith("wrong: its gradient has norm")
    assert found["another"].seconds == []
    assert found["large"].left_out == found["growing"].left_out == harness.OUT_OF_MEMORY
    assert found["growing"].seconds == [] and len(found[train_step.OPD].seconds) == 1
    (steps,) = step_report.found_in(found.values())
    assert {bar.name for bar in steps.bars} == {LAYERS, train_step.OPD, "large", "growing"}
    assert set(steps.left_out) == {"another"}
    assert "out of memory" in "\n".join(step_report.markdown(found.values()))


def test_the_budget(dry: Any) -> None:
    """The layers, the eager loss and the fused head run; peers wait for a time that is not left."""
    wanted = ("drift_gate linear_opd_loss", "drift_gate opd_loss, in place")
    bounds = Bounds(5, end=time.monotonic() - 1)
    kept: list[dict[str, Any]] = []

    def keep(results: dict[str, Result]) -> None:
        kept.append({name: len(r.seconds) for name, r in results.items()})

    found = train_step.SUITE.measure(dry, CPU, bounds, wanted, keep)
    assert found[wanted[1]].left_out == harness.UNREACHED
    assert all(len(found[name].seconds) == 1 for name in (LAYERS, train_step.OPD, wanted[0]))
    assert kept[1][LAYERS] == 1 and kept[1][wanted[0]] == 0  # written as it comes


def test_models_by_grid_and_device() -> None:
    def names(grid: str, gpu: bool) -> list[str]:
        return [case.what for case in train_step.SUITE.cases(grid, gpu)]

    assert names("star", True) == ["Qwen3 1.7B", "Qwen3 0.6B", "Qwen3 4B"]
    assert names("targets", True) == names("quick", True) == ["Qwen3 1.7B"]
    assert names("star", False) == ["Qwen3 tiny"] and names("growth", False) == []
    for case in train_step.SUITE.cases("star", True):
        assert (case.rows, case.vocab, case.dtype) == (16384, 151_936, "bfloat16")


def test_table_text_and_picture(measured: dict[str, Result], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from drift_gate.bench import plots

    path = tmp_path / "run.json"
    record.write(path, list(measured.values()))
    back = record.read(path)
    assert json.dumps([r.as_dict() for r in back]) == json.dumps(
        [r.as_dict() for r in measured.values()]
    )
    (steps,) = step_report.found_in(back)
    names = [bar.name for bar in steps.bars]
    assert names[:2] == [LAYERS, train_step.OPD] and set(names[-2:]) <= set(OURS)
    assert [bar.loss for bar in steps.bars] == sorted(
        (bar.loss for bar in steps.bars), key=["", "OPD", "LSM"].index
    )
    console = Console(width=80, record=True)
    for table in report.tables(back, 80):
        console.print(table)
    said = console.export_text()
    assert "drift_gate linear_topk_loss" in said and "…" not in said
    assert len(summary.lines(back)) > len(measured) and "peak" in "".join(summary.lines(back))
    (written,) = plots.draw(back, path)
    assert written.name == "run_train-step_qwen3-dry.png" and written.stat().st_size > 10_000


def test_the_last_run_of_a_model_counts(measured: dict[str, Result]) -> None:
    later = [
        dataclasses.replace(r, machine=r.machine | {"commit": "c0ffee"}) for r in measured.values()
    ]
    (steps,) = step_report.found_in([*measured.values(), *later])
    assert steps.machine["commit"] == "c0ffee"
    assert all(r.suite == STEP for r in later)
