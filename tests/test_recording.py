"""`record_calls`: what it writes and costs, and the replay of `drift-gate bench --recorded`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import drift_gate as dg
from drift_gate import cli
from drift_gate.call import recording

B, T, V, H, K = 2, 10, 40, 8, 4


def calls(valid: float = 1.0) -> dict[str, Callable[[], dg.LossOutput]]:
    """A call of every loss, by name; the last rows are masked."""
    torch.manual_seed(0)
    logits = torch.randn(B, T, V, requires_grad=True)
    hidden, weight = torch.randn(B, T, H, requires_grad=True), torch.randn(V, H)
    labels = torch.randint(V, (B, T))
    old, teacher = -torch.rand(2, B, T)
    log_q, ids = torch.randn(B, T, V).log_softmax(-1).topk(K)
    mask = torch.arange(T) < T * valid
    options = dict(response_mask=mask.expand(B, T))
    sampled, listed = (labels, old, teacher), (labels, old, ids, log_q)
    return {
        "opd_loss": lambda: dg.opd_loss(logits, *sampled, **options),
        "topk_loss": lambda: dg.topk_loss(logits, *listed, **options),
        "full_loss": lambda: dg.full_loss(
            logits, labels, old, torch.ones(B, T, V), beta=0.25, direction="jsd", **options
        ),
        "linear_opd_loss": lambda: dg.linear_opd_loss(hidden, dg.Head(weight), *sampled, **options),
        "linear_topk_loss": lambda: dg.linear_topk_loss(hidden, weight, *listed, **options),
        "linear_full_loss": lambda: dg.linear_full_loss(
            hidden, weight, labels, old, torch.ones(B, T, H), torch.ones(V, H), **options
        ),
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors_of(found: dg.LossOutput) -> list[Tensor]:
    return [found.loss, found.token_loss, found.log_probs, found.gate, *found.metrics.values()]


def test_every_loss_is_recorded(tmp_path: Path) -> None:
    """All that are public: what ends in _loss."""
    losses = calls(0.7)
    assert set(losses) == {name for name in dg.__all__ if name.endswith("_loss")}
    path = tmp_path / "calls.jsonl"
    with dg.record_calls(path):
        for call in losses.values():
            call()
    head, *found = lines(path)
    assert head["schema"] == 1 and head["torch"] == torch.__version__
    assert [line["function"] for line in found] == list(losses)
    for line in found:
        assert line["rows"] == B * T and line["valid"] == pytest.approx(0.7)
        assert line["tensors"]["labels"] == {"shape": [B, T], "dtype": "int64", "grad": False}
    assert [line["at"] for line in found] == sorted(line["at"] for line in found)
    by_name = {line["function"]: line for line in found}
    logits = {"shape": [B, T, V], "dtype": "float32", "grad": True}
    assert by_name["opd_loss"]["tensors"]["logits"] == logits
    assert by_name["opd_loss"]["options"] == {}
    assert by_name["full_loss"]["options"]["direction"] == "jsd"
    assert by_name["full_loss"]["options"]["beta"] == 0.25
    weight = {"shape": [V, H], "dtype": "float32", "grad": False}
    assert by_name["linear_opd_loss"]["options"]["head"] == {"type": "Head", "weight": weight}


def test_options_that_are_objects(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    logits, labels = torch.randn(B, T, V, requires_grad=True), torch.randint(V, (B, T))
    old = -torch.rand(B, T)
    gates = dg.DriftGate(), dg.DriftGate("sequence", tau=0.5), dg.GateNormalizer(), None, old.exp()
    with dg.record_calls(path):
        for gate in gates:
            clip, reduction = dg.Clip(high=0.28), dg.Reduction(batch_num_tokens=torch.tensor(9.0))
            dg.opd_loss(logits, labels, old, old, gate=gate, clip=clip, reduction=reduction)
    _, *found = lines(path)
    of_gate = [line["options"].get("gate", "absent") for line in found]
    rule = {"type": "DriftGate"}
    assert of_gate[:2] == [rule, {**rule, "granularity": "sequence", "tau": 0.5}]
    assert of_gate[2:] == [{"type": "GateNormalizer", "gate": rule}, None, "absent"]
    assert found[4]["tensors"]["gate"]["shape"] == [B, T]
    assert found[0]["options"]["clip"] == {"type": "Clip", "high": 0.28}
    number = {"shape": [], "dtype": "float32", "grad": False}
    assert found[0]["options"]["reduction"] == {"type": "Reduction", "batch_num_tokens": number}


def test_no_data_and_the_same_bits(tmp_path: Path) -> None:
    alone = {name: call() for name, call in calls().items()}
    with dg.record_calls(tmp_path / "calls.jsonl"):
        beside = {name: call() for name, call in calls().items()}
    for name in alone:
        assert all(map(torch.equal, tensors_of(alone[name]), tensors_of(beside[name])))
    # 400 logits, 20 labels, ...: the file says none of their values.
    assert (tmp_path / "calls.jsonl").stat().st_size < 900 * (len(alone) + 1)


def python_calls(run: Callable[[], object]) -> int:
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_what_a_call_costs(tmp_path: Path) -> None:
    """Of Python calls: whether it compiles (2), `note` and `Noted`; once it has stopped, none."""
    call = calls()["opd_loss"]
    call()
    before = python_calls(call)
    with dg.record_calls(tmp_path / "calls.jsonl"):
        during = python_calls(call)
    assert python_calls(call) == before and during - before <= 4


def test_calls_are_written_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that were copied 3 calls ago are written, the others at the end."""
    monkeypatch.setattr(recording, "BATCH", 3)
    path, call = tmp_path / "calls.jsonl", calls()["opd_loss"]
    recorder = dg.record_calls(path)
    for _ in range(5):
        call()
    assert not path.exists()
    call()
    assert len(lines(path)) == 1 + 3
    call()
    recorder.stop()
    recorder.stop()
    assert len(lines(path)) == 1 + 7
    call()
    assert len(lines(path)) == 1 + 7


def test_wrong_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^path must be a str or os.PathLike; got int$"):
        dg.record_calls(3)  # type: ignore[arg-type]
    with (
        dg.record_calls(str(tmp_path / "a.jsonl")),
        pytest.raises(RuntimeError, match=r"recorded already, to .*a\.jsonl$"),
    ):
        dg.record_calls(tmp_path / "b.jsonl")
    assert recording.active is None and list(tmp_path.iterdir()) == []  # no call, no file


SCRIPT = """
import torch, drift_gate
logits = torch.randn(6, 9, requires_grad=True)
row = torch.zeros(6)
drift_gate.opd_loss(logits, row.long(), row, row).loss.backward()
"""


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_environment_variable(tmp_path: Path, ranks: int) -> None:
    """From import to exit, without a stop; a file each of several ranks."""
    path = tmp_path / "calls.jsonl"
    environment = os.environ | {"DRIFT_GATE_RECORD": str(path), "RANK": "3"}
    environment["WORLD_SIZE"] = str(ranks)
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)
    (written,) = tmp_path.iterdir()
    assert written.name == ("calls.jsonl" if ranks == 1 else "calls.rank3.jsonl")
    _, line = lines(written)
    assert line["function"] == "opd_loss" and line["rows"] == 6


@pytest.mark.slow
def test_a_compiled_call_is_not_recorded(tmp_path: Path) -> None:
    """It is one graph as ever, and gives what it gave."""
    torch._dynamo.reset()
    arguments = torch.randint(V, (B, T)), *-torch.rand(2, B, T)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits: Tensor) -> Tensor:
        return dg.opd_loss(logits, *arguments).loss

    logits = torch.randn(B, T, V, requires_grad=True)
    alone = compiled(logits)
    path = tmp_path / "calls.jsonl"
    with dg.record_calls(path):
        assert torch.equal(compiled(logits), alone)
    assert not path.exists()
    torch._dynamo.reset()


@pytest.mark.gpu
def test_nothing_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "BATCH", 2)
    logits = torch.randn(B, T, V, device="cuda", requires_grad=True)
    labels = torch.randint(V, (B, T), device="cuda")
    old, teacher = -torch.rand(2, B, T, device="cuda")
    dg.opd_loss(logits, labels, old, teacher, ignore_index=None)
    recorder = dg.record_calls(tmp_path / "calls.jsonl")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            dg.opd_loss(logits, labels, old, teacher, ignore_index=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.stop()
    assert [line["valid"] for line in lines(recorder.path)[1:]] == [1.0] * 7


# The replay.


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Every loss twice; and a packed batch with spans, and without labels."""
    path = tmp_path / "calls.jsonl"
    with dg.record_calls(path):
        for call in (*calls(0.7).values(), *calls(0.5).values()):
            call()
        logits = torch.randn(12, V, dtype=torch.bfloat16, requires_grad=True)
        log_q, ids = torch.randn(12, V).log_softmax(-1).topk(K)
        borders = torch.tensor([0, 5, 12])
        labels, old = torch.full((12,), -100), torch.zeros(12)
        labels[:9] = 1
        spans = torch.arange(12) // 3
        options = dict(cu_seqlens=borders, gate=dg.DriftGate("span"), span_ids=spans)
        dg.opd_loss(logits, labels, old, old, reduction=dg.Reduction("token-sum"), **options)
        dg.topk_loss(logits, None, None, ids, log_q, gate=None, support="tail", direction="forward")
    return path


def test_groups_of_calls(recorded: Path) -> None:
    replay = pytest.importorskip("drift_gate.bench.recorded")
    found = replay.read(recorded)
    assert [group.count for group in found.groups] == [2] * 6 + [1, 1]
    assert found.groups[0].valid == pytest.approx(0.6) and found.seconds > 0
    packed = next(group for group in found.groups if "cu_seqlens" in group.tensors)
    given = replay.draw(packed, torch.device("cpu"))
    assert given["cu_seqlens"].tolist() == [0, 6, 12] and packed.valid == pytest.approx(0.75)
    assert given["gate"] == dg.DriftGate("span") and given["logits"].dtype == torch.bfloat16
    assert replay.size(packed) == "12 x 40 bfloat16"
    with pytest.raises(ValueError, match="is no recording"):
        replay.read(Path(__file__))


def test_drawn_calls_are_those_recorded(recorded: Path, tmp_path: Path) -> None:
    """Recorded again while they are replayed: the same lines, but for times and chance."""
    replay = pytest.importorskip("drift_gate.bench.recorded")
    found = replay.read(recorded)
    again = tmp_path / "again.jsonl"
    with dg.record_calls(again):
        for group in found.groups:
            given = replay.draw(group, torch.device("cpu"))
            replay.ours(group, given)()
    for group, line in zip(found.groups, lines(again)[1:], strict=True):
        assert (line["function"], line["tensors"]) == (group.function, group.tensors)
        assert line["options"] == group.options
        assert abs(line["valid"] - group.valid) < 0.4  # of 12 or 20 rows


def test_the_eager_loss_is_the_same_where_options_are_plain(recorded: Path) -> None:
    replay = pytest.importorskip("drift_gate.bench.recorded")
    for group in replay.read(recorded).groups[:6]:
        given = replay.draw(group, torch.device("cpu"))
        ours, theirs = replay.ours(group, given)(), replay.eagerly(group, given)()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_command(recorded: Path) -> None:
    pytest.importorskip("drift_gate.bench.command")
    arguments = ["bench", "--recorded", str(recorded), "--rounds", "1", "--device", "cpu"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "linear_topk_loss" in said and "the recorded calls take" in said
    assert "of which the losses are" in said
    missing = CliRunner().invoke(cli.app, ["bench", "--recorded", "nowhere.jsonl"])
    assert missing.exit_code == 2 and "--recorded" in missing.output
