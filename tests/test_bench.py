"""The benchmarks: what they divide by, what they hold to be true, and whom they leave out."""

from __future__ import annotations

import json

import pytest
import torch
from drift_gate.bench import cases, floors, inputs, targets
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import load_suite
from drift_gate.bench.peers import guard, plain
from drift_gate.bench.truth import sampled_or_listed

import drift_gate

SMALL = Case("work", 70, 259, "float32", k=8)  # a block of rows and a part; an odd vocabulary
CPU = torch.device("cpu")


# Bytes that must move.


def test_floors_by_hand():
    case = Case("", 3, 10, "bfloat16", k=2)
    assert floors.scan(case, 2).bytes == 3 * 10 * 2 + 3 * (2 * 16 + 8)
    assert floors.scan(case, 1, with_entropy=True).bytes == 60 + 3 * (16 + 12)
    assert floors.expand(case, 1).bytes == 2 * 60 + 3 * (12 + 16)
    assert floors.expand(case, 2, read=False).bytes == 60 + 3 * (12 + 32)
    # A row without a gradient is written, not read; nor is it where alpha is 0 anyway.
    whole = floors.scan(case, 1) + floors.expand(case, 1)
    assert whole.with_dead(2).bytes == whole.bytes - 2 * 10 * 2
    assert floors.expand(case, 2, read=False).with_dead(2) == floors.expand(case, 2, read=False)
    assert floors.divergence(case).bytes == 2 * 60 + 3 * 37
    assert floors.divergence(case, "jsd").bytes == 4 * 60 + 3 * 37
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
            assert row.what in suite.works
            names = {i.name for i in suite.chosen("targets", on_gpu)}
            assert {"eager", row.implementation, row.beside} <= names
            if row.suite != targets.HOST:
                assert suite.floor(row.case).bytes > 0
                assert (targets.GEMMS in names) == (on_gpu and row.hidden > 0)
        assert load_suite("rows").cases("targets", on_gpu) == []
    assert {i.name for i in load_suite("linear_opd_loss").chosen("growth", False)} == {
        "eager", targets.COMPILED, "drift_gate", "drift_gate, float32 logits",
        "drift_gate, float32 logits, one chunk",
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


def test_rows_that_are_clipped_need_not_be_read():
    """PPO clips a third of the rows where the old policy is 0.3 nats away, and none nearby."""
    suite, case = load_suite("opd_loss"), SMALL._replace(what=targets.TRAIN, k=0, rows=700)
    peaked, live = (inputs.draw(case._replace(kind=kind), CPU) for kind in ("peaked", "live"))
    assert suite.live(live) == 700 and 0.55 < suite.live(peaked) / 700 < 0.8
    leaf = peaked.logits.requires_grad_()
    loss = drift_gate.opd_loss(leaf, peaked.labels, peaked.old, peaked.teacher).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    assert int(grad.any(-1).sum()) == suite.live(peaked)


def test_lists_by_a_zipf_law_repeat_words_in_many_rows_and_none_in_a_row():
    generator = torch.Generator().manual_seed(0)
    lists = inputs.zipf_lists(500, 10_000, 16, generator)
    assert all(len(set(row)) == 16 for row in lists.tolist())
    shares = lists.flatten().bincount(minlength=10_000) / 500
    assert shares[0] > 0.7 and shares[:10].sum() > 3 and shares[5000:].sum() < 2
    work = inputs.draw(SMALL._replace(kind="zipf", hidden=16), CPU)
    expected = work.logits64(slice(None)).gather(-1, work.ids)
    torch.testing.assert_close(work.listed64, expected)


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


def test_time_against_memory_of_chunks(monkeypatch, capsys, tmp_path):
    from drift_gate.bench import chunks

    monkeypatch.setattr(chunks, "PAUSE", 0)
    sizes = "--rows", "40", "--vocab", "70", "--width", "16", "--sizes", "16"
    assert chunks.markdown(tmp_path) == []
    (tmp_path / "device").mkdir()
    path = tmp_path / "device" / "chunks.json"
    monkeypatch.setattr("sys.argv", ["chunks", *sizes, "--out", str(path)])
    chunks.main()
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(path.read_text())
    text = chunks.markdown(tmp_path)
    assert "40 x 70, H 16" in text[0] and "(default)" in text[4] and text[5].startswith("| 16 |")
    assert list(found["rows a chunk"]) == ["products", "default", "16"]
    assert all(row["ms"] > 0 for row in found["rows a chunk"].values())


def test_ceilings(monkeypatch, capsys):
    from drift_gate.bench import ceilings

    monkeypatch.setattr("sys.argv", ["ceilings", "--small"])
    monkeypatch.setattr(ceilings, "LAUNCHES", 1)
    ceilings.main()
    lines = capsys.readouterr().out.splitlines()
    assert any("copy" in line for line in lines) and "grad_weight, 8 rows" in lines[-1]
    assert all(float(line.split()[0]) > 0 for line in lines[1:5])
