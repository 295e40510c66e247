"""`DriftGate(sample_every=s)`: the drift of a block at every s-th of its valid positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.heads import assert_same_budget, draw_head, run_head
from support.judge import EACH_FUSED
from support.problems import draw

import drift_gate as dg
from drift_gate import DriftGate, gate_weights
from drift_gate.call.weighing import most_measured
from drift_gate.fuzz.local_ranks import run_ranks
from drift_gate.head import chunk_losses
from drift_gate.losses import topk
from drift_gate.parallel import words
from drift_gate.passes import torch as plain
from drift_gate.passes.rules import GateRule, RowData

NAN = torch.nan
SHAPE = 2, 70
UNITS = {"block": 64, "span": 20, "sequence": 70}  # positions of a unit here


def spans_of(gate: DriftGate) -> dict[str, torch.Tensor]:
    ids = torch.arange(SHAPE[1]) // UNITS["span"]
    return {"span_ids": ids.expand(SHAPE).contiguous()} if gate.granularity == "span" else {}


def test_the_formula_by_hand():
    """Blocks of 4 positions; of the first the second is masked: its 1st and 3rd valid ones count,
    positions 0 and 3; of the other, whose last is masked, positions 4 and 6."""
    new = torch.zeros(8)
    old = torch.tensor([0.5, 9.0, 7.0, 1.5, -3.0, 8.0, 1.0, 9.0])
    mask = torch.tensor([1, 0, 1, 1, 1, 1, 1, 0])
    result = gate_weights(new, old, DriftGate(block_size=4, sample_every=2), response_mask=mask)
    g = torch.tensor([1.0, 0, 1.0, 1.0, 1.0, 1.0, 1.0, 0]).neg().exp() * mask
    torch.testing.assert_close(result.weights, g / (g.sum() / 6))
    shown = torch.tensor([0.5, 0.0, NAN, 1.5, -3.0, NAN, 1.0, 0.0])
    torch.testing.assert_close(result.drift, shown, equal_nan=True)
    torch.testing.assert_close(result.metrics["drift_abs"], torch.tensor(6.0 / 4))
    torch.testing.assert_close(result.metrics["drift_signed"], torch.tensor(0.0))
    assert result.block_ids.tolist() == [0, -1, 0, 0, 1, 1, 1, -1]


@pytest.mark.parametrize("aggregate", ["mean", "mean_abs", "rms", "max_abs"])
@pytest.mark.parametrize("granularity", UNITS)
def test_what_is_not_measured_is_not_read(granularity, aggregate):
    gate = DriftGate(granularity, block_size=16, aggregate=aggregate, sample_every=3)
    new, old = -torch.rand(SHAPE), -torch.rand(SHAPE)
    mask = torch.rand(SHAPE) < 0.8
    options = {"response_mask": mask, **spans_of(gate)}
    whole = gate_weights(new, old, gate, **options)
    unmeasured = whole.drift.isnan()
    assert unmeasured.any() and not unmeasured[~mask].any()
    blind = [x.masked_fill(unmeasured, NAN) for x in (new, old)]
    for x, y in zip(whole[:3], gate_weights(*blind, gate, **options)[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gate", [DriftGate("token"), DriftGate(block_size=1)], ids=str)
def test_blocks_of_one_position_are_always_measured(gate):
    new, old = -torch.rand(SHAPE), -torch.rand(SHAPE)
    options = {"granularity": gate.granularity, "block_size": gate.block_size}
    for x, y in zip(
        gate_weights(new, old, gate)[:3],
        gate_weights(new, old, DriftGate(**options, sample_every=8))[:3],
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("bad", [0, -1])
def test_positive(bad):
    with pytest.raises(ValueError, match=f"sample_every must be at least 1; got {bad}"):
        DriftGate(sample_every=bad)


@pytest.mark.parametrize("bad", [1.0, True, "2", None], ids=str)
def test_an_integer(bad):
    with pytest.raises(TypeError, match="sample_every must be an int"):
        DriftGate(sample_every=bad)


@pytest.mark.parametrize("granularity", UNITS)
@EACH_FUSED
def test_the_gate_is_the_same_function_in_every_loss(granularity, backend):
    """Losses that compute all log-probs return them; lists on the renormalised support NaN."""
    gate = DriftGate(granularity, sample_every=8)
    options = {"gate": gate, "reduction": "none", "masked": 0.2, **spans_of(gate)}
    problems = {form: draw_head(form, *SHAPE, **options) for form in ("opd", "topk", "full")}
    whole, _ = run_head(problems["opd"], backend, torch.ones(SHAPE))
    assert whole.drift.isnan().any() and not whole.log_probs.isnan().any()
    for form, support in (("topk", "renormalized"), ("topk", "tail"), ("full", None)):
        extra = {} if support is None else {"support": support}
        result, _ = run_head(problems[form], backend, torch.ones(SHAPE), **extra)
        for name in ("gate", "drift"):
            x, y = (getattr(out, name) for out in (result, whole))
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
        unmeasured = result.drift.isnan() & (support == "renormalized")
        for name in ("log_probs", "entropy"):
            x, y = getattr(result, name), getattr(whole, name)
            assert torch.equal(x.isnan(), unmeasured)
            torch.testing.assert_close(x[~unmeasured], y[~unmeasured], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", UNITS)
@EACH_FUSED
def test_logits_and_hidden_states_give_the_same(granularity, backend):
    gate = DriftGate(granularity, sample_every=4)
    problem = draw_head("topk", *SHAPE, softcap=None, masked=0.2, **spans_of(gate))
    options = {**problem.options, "gate": gate, "return_entropy": True, "backend": backend}
    linear, _ = run_head(problem, backend, gate=gate)
    logits = torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias)
    direct = dg.topk_loss(logits, *problem.rest, **options)
    for name in ("loss", "token_loss", "log_probs", "gate", "drift", "entropy"):
        x, y = getattr(linear, name), getattr(direct, name)
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert linear.metrics.keys() == direct.metrics.keys()
    for name, x in linear.metrics.items():
        torch.testing.assert_close(x, direct.metrics[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def products(monkeypatch):
    """Rows of every product with a head."""
    rows: list[int] = []
    original = chunk_losses.logits_of

    def counted(head, hidden, out):
        rows.append(len(hidden))
        return original(head, hidden, out)

    monkeypatch.setattr(chunk_losses, "logits_of", counted)
    return rows


@pytest.mark.parametrize(("every", "wanted"), [(1, 140), (8, 18), (1000, 4)])
@EACH_FUSED
def test_only_measured_rows_take_part_in_the_product(every, wanted, backend, products):
    """Two sequences of 70: blocks of 64 and 6 rows. The backward has no product at all."""
    problem = draw_head("topk", *SHAPE)
    run_head(problem, backend, gate=DriftGate(sample_every=every), return_entropy=False)
    assert sum(products) == wanted


def test_nor_does_one_where_log_probs_are_given(products):
    problem = draw_head("topk", *SHAPE)
    known = torch.where(torch.arange(70) % 64 % 8 == 0, -torch.rand(SHAPE), NAN)
    gate = DriftGate(sample_every=8)
    result, _ = run_head(problem, "auto", gate=gate, return_entropy=False, log_probs=known)
    assert products == [] and result.loss.isfinite()
    torch.testing.assert_close(result.log_probs, known, equal_nan=True)


@EACH_FUSED
def test_logits_of_other_words_are_not_read(backend, monkeypatch):
    """Of rows that are not measured: the loss is a function of the list there."""
    scanned = []

    def counted(run, logits, labels, ids, valid, *rest):
        scanned.append(int(valid.sum()))
        return words.scan_lists(run, logits, labels, ids, valid, *rest)

    monkeypatch.setattr(topk, "scan_lists", counted)
    problem = draw(*SHAPE, 50)
    log_q, ids = torch.randn(*SHAPE, 50).log_softmax(-1).topk(5)
    gate = DriftGate(sample_every=8)
    labels, old = problem.arguments()[1:3]

    def run(logits):
        leaf = logits.clone().requires_grad_()
        out = dg.topk_loss(leaf, labels, old, ids, log_q, gate=gate, backend=backend)
        out.loss.backward()
        return out, leaf.grad

    whole, grad = run(problem.logits)
    others = torch.ones_like(problem.logits, dtype=torch.bool).scatter(-1, ids, False)
    blind, same = run(problem.logits.masked_fill(others & whole.drift.isnan()[..., None], NAN))
    assert torch.equal(whole.loss, blind.loss) and torch.equal(grad, same)
    assert scanned == [18, 18]


@pytest.mark.parametrize("layout", ["contiguous", "striped"])
@pytest.mark.parametrize("granularity", UNITS)
@pytest.mark.parametrize("form", ["topk", "opd"])
def test_a_rank_counts_on_where_another_ends(form, granularity, layout, products):
    """Blocks cut over 2 ranks: what is measured is what one process measures, products included."""
    gate = DriftGate(granularity, block_size=16, sample_every=5)
    problem = draw_head(form, *SHAPE, masked=0.3, **spans_of(gate))
    whole, _ = run_head(problem, "auto", gate=gate)
    count, ids = len(products), torch.arange(70).expand(SHAPE)
    alone = sum(products)
    at = (
        [slice(0, 35), slice(35, 70)]
        if layout == "contiguous"
        else [slice(i, 70, 2) for i in (0, 1)]
    )

    def work(rank, named):
        def mine(x):
            return x[:, at[rank]]

        options = {name: mine(x) for name, x in problem.options.items()}
        return problem.function(
            mine(problem.hidden), problem.head, *map(mine, problem.rest), **options, gate=gate,
            position_ids=mine(ids), parallel=dg.Parallel(**named), return_entropy=True,
        )  # fmt: skip

    parts = run_ranks(2, work)
    assert sum(products[count:]) == alone or form == "opd"  # whose gradient is there at once
    for name in ("log_probs", "gate", "drift", "entropy", "token_loss"):
        found = torch.empty(SHAPE)
        for rank, part in enumerate(parts):
            found[:, at[rank]] = getattr(part, name)
        torch.testing.assert_close(
            found, getattr(whole, name), rtol=1e-4, atol=1e-5, equal_nan=True
        )
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    measured = [int((p.drift.isfinite() & (p.drift != 0)).sum()) for p in parts]
    for name in ("drift_abs", "ppo_kl", "student_mass")[: 3 if form == "topk" else 2]:  # a rank's
        mean = sum(n * p.metrics[name] for n, p in zip(measured, parts, strict=True))
        torch.testing.assert_close(mean / sum(measured), whole.metrics[name])


def test_compile_traces_it_without_a_break():
    torch._dynamo.reset()
    problem = draw_head("topk", 2, 20)
    gate = DriftGate(block_size=8, sample_every=3)

    def step(hidden, weight):
        head = dg.Head(weight, problem.bias, problem.head.softcap)
        return dg.linear_topk_loss(hidden, head, *problem.rest, gate=gate, return_entropy=True)

    found = []
    for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        out = function(*leaves)
        grads = torch.autograd.grad(out.loss, leaves)
        found.append([out.loss, out.log_probs, out.entropy, out.metrics["entropy"], *grads])
    torch.testing.assert_close(*found, equal_nan=True)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64, 100])
@pytest.mark.parametrize("every", [2, 7, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_no_more_rows_than_shapes_say(block_size, every, packed):
    """Whatever is valid; and of whole blocks that s divides exactly as many."""
    generator = torch.Generator().manual_seed(block_size + every)
    for granularity in ("block", "sequence"):
        gate = GateRule(granularity, block_size, sample_every=every, normalize="batch", tau=1.0)
        for share in (1.0, 0.9, 0.3):
            valid = torch.rand(192, generator=generator) < share
            borders = torch.tensor([0, 3, 3, 100, 192]) if packed else None
            data = RowData(valid, torch.zeros(192), torch.zeros(192), None, borders, 64)
            found = int(plain.measured_rows(data, gate).sum())
            rows = SimpleNamespace(gate=gate, n_rows=192, length=64, cu_seqlens=borders, context="")
            most = most_measured(rows)
            assert found <= most <= 192 // every + 192 // block_size + 5
            if share == 1 and not packed:
                assert found == most


def test_rows_of_a_list_without_support_shift_the_others(kernels_on_cpu):
    """No row is left out by the caller, so the kernels' route counts by shapes alone."""
    problem = draw_head("topk", 2, 20, softcap=None, ignore_index=None).to(kernels_on_cpu)
    problem.rest[2][0, :3] = -1
    gate = DriftGate(block_size=8, sample_every=3)
    assert_same_budget(problem, "triton", device=kernels_on_cpu, gate=gate, chunk_size=8)
