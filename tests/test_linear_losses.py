"""The `linear_` losses against the reference: values, gradients, gates formed chunk by chunk."""

from __future__ import annotations

import pytest
import torch
from support.heads import FORMS, assert_same_budget, draw_head, run_head
from support.judge import EACH_FUSED

import drift_gate as dg
from drift_gate import DriftGate
from drift_gate.choices import SUPPORTS

EACH_FORM = pytest.mark.parametrize("form", FORMS)
# (4, 100) rows in chunks of 128: blocks of 64 and 36 rows, so that chunks end at 64 + 36.
SHAPE, CHUNK = (4, 100), 128


@EACH_FORM
@pytest.mark.parametrize("masked", [0.0, 0.4])
@EACH_FUSED
def test_float32(form, masked, backend):
    problem = draw_head(form, *SHAPE, masked=masked, logit_scale=0.7, temperature=1.3)
    assert_same_budget(problem, backend, chunk_size=CHUNK)


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 6.0])
@EACH_FUSED
def test_short_dtypes(form, dtype, softcap, backend):
    """Eight seeds: one scalar of a batch may be nearer the truth by chance. float32 judges the
    metrics, means over rows whose errors cancel by chance too."""
    problems = [
        draw_head(form, *SHAPE, seed=seed, dtype=dtype, softcap=softcap) for seed in range(8)
    ]
    assert_same_budget(problems, backend, metrics=False, chunk_size=CHUNK)


@pytest.mark.parametrize(
    ("form", "options"),
    [("opd", {}), ("full", {}), *(("topk", {"support": support}) for support in SUPPORTS)],
)
def test_float64_is_exact(form, options):
    problem = draw_head(form, *SHAPE, masked=0.2).to(torch.float64)
    results = [
        run_head(problem, backend, chunk_size=CHUNK, **options)
        for backend in ("torch", "reference")
    ]
    for name in ("loss", "token_loss", "log_probs", "gate", "drift", "entropy"):
        got, expected = (getattr(result, name) for result, _ in results)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-11, atol=1e-14)


@EACH_FORM
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 32},  # blocks are longer: the log-probs come first
        {"chunk_size": 37, "gate": None},
        {"chunk_size": 37, "gate": DriftGate("token", aggregate="rms")},
        {"gate": DriftGate("sequence")},  # a chunk holds one sequence
        {"chunk_size": 64, "gate": DriftGate("sequence")},  # or not
        {"gate": DriftGate(normalize="sequence")},
        {"gate": DriftGate(normalize="none", tau=0.5)},
        {"gate": DriftGate(tau=30.0, aggregate="mean_abs")},  # the sums move to lower shifts
        {"gate": DriftGate(block_size=7, aggregate="max_abs")},
        {"gate": DriftGate(sample_every=5)},
        {"gate": DriftGate("sequence", sample_every=8, aggregate="rms"), "chunk_size": 64},
    ],
    ids=str,
)
@EACH_FUSED
def test_gates(form, options, backend):
    problem = draw_head(form, *SHAPE, masked=0.3)
    assert_same_budget(problem, backend, **{"chunk_size": CHUNK, **options})


@EACH_FORM
@pytest.mark.parametrize(
    "reduction",
    [
        "none",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
        dg.Reduction(batch_num_tokens=1000, dp_size=4),
        dg.Reduction(batch_num_tokens=torch.tensor(1000.0)),
        dg.Reduction("seq-mean-token-mean", global_batch_size=7, dp_size=2),
    ],
    ids=str,
)
@EACH_FUSED
def test_reductions(form, reduction, backend):
    problem = draw_head(form, *SHAPE, masked=0.3)
    assert_same_budget(problem, backend, chunk_size=CHUNK, reduction=reduction)


@EACH_FORM
@EACH_FUSED
def test_packed_rows_and_spans(form, backend):
    """Spans of 20 rows that come in pairs: a chunk may not end between the two of a pair."""
    spans = torch.arange(300) // 20
    spans = torch.where(spans % 4 < 2, spans % 2, spans % 2 + 2) + spans // 4 * 4
    borders = torch.tensor([0, 80, 80, 300])
    problem = draw_head(form, 300, cu_seqlens=borders, span_ids=spans, masked=0.1)
    assert_same_budget(problem, backend, chunk_size=100, gate=DriftGate("span"))


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("support", ["renormalized", "truncated", "tail"])
@pytest.mark.parametrize("mode", ["token-mean", "none"])
@EACH_FUSED
def test_divergences_of_the_lists(direction, support, mode, backend):
    problem = draw_head("topk", 2, 70, direction=direction, support=support, beta=0.3)
    problem.rest[2][0, 3, 1] = -1
    problem.rest[2][1, 5] = -1  # a row that lists nothing
    assert_same_budget(problem, backend, chunk_size=64, reduction=mode)


@pytest.mark.parametrize("support", ["renormalized", "truncated"])
@pytest.mark.parametrize("return_entropy", [False, True])
@EACH_FUSED
def test_log_probs_of_the_caller(support, return_entropy, backend):
    problem = draw_head("topk", 2, 70, support=support)
    labels = problem.rest[0]
    known, _ = dg.linear_token_log_probs(problem.hidden, problem.head, labels)
    options = {"return_entropy": return_entropy, "chunk_size": 64}
    got, grads = run_head(problem, backend, log_probs=known, **options)
    expected, true_grads = run_head(problem, backend, **options)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(got.gate, expected.gate)
    torch.testing.assert_close(grads, true_grads, rtol=1e-4, atol=1e-7)
    assert_same_budget(problem, backend, log_probs=known - 0.1, **options)


@EACH_FUSED
def test_lists_without_labels(backend):
    problem = draw_head("topk", 2, 70, gate=None)
    problem.rest[:2] = None, None
    for options in ({}, {"return_entropy": False}, {"support": "tail"}):
        assert_same_budget(problem, backend, **options)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@EACH_FUSED
def test_heads_of_different_words(direction, backend):
    problem = draw_head("full", 2, 70, direction=direction, vocab_size=200)
    problem.rest[3] = dg.Head(problem.rest[3].weight[:205], softcap=6.0)
    problem.rest[0] %= 200
    assert_same_budget(problem, backend, chunk_size=64)
    _, (_, grad, _) = run_head(problem, backend)
    assert (grad[200:] == 0).all() and (grad[:200] != 0).any()


@EACH_FORM
@pytest.mark.parametrize("largest", [1e30, torch.inf])
def test_drifts_however_large(form, largest):
    """Chunks drift by 1e30 or infinite nats, by 300, and by 0: the last one alone weighs."""
    problem = draw_head(form, 192, softcap=None).to(torch.float64)
    log_probs, _ = dg.linear_token_log_probs(problem.hidden, problem.head, problem.rest[0])
    problem.rest[1] = log_probs + torch.tensor([largest, 300.0, 0.0]).repeat_interleave(64)
    options = {"chunk_size": 64, "estimator": "k1"} if form == "opd" else {"chunk_size": 64}
    got, grads = run_head(problem, "torch", **options)
    expected, true_grads = run_head(problem, "reference", **options)
    torch.testing.assert_close(got.gate, expected.gate)
    torch.testing.assert_close(grads, true_grads, rtol=1e-9, atol=1e-15)
    assert got.gate[-1] == 3 and (grads[0][:128].abs() < 1e-100).all()


@EACH_FORM
@EACH_FUSED
def test_a_nan_row_is_not_hidden(form, backend):
    problem = draw_head(form, 2, 70)
    problem.hidden[0, 3] = torch.nan
    result, _ = run_head(problem, backend, chunk_size=64)
    assert result.loss.isnan()
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, 3] = False
    result, grads = run_head(problem, backend, chunk_size=64, response_mask=mask)
    assert result.loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0, 3] == 0).all()


@EACH_FORM
@pytest.mark.parametrize("mode", ["token-mean", "none"])
@EACH_FUSED
def test_nothing_valid_and_no_rows(form, mode, backend):
    problem = draw_head(form, 2, 70, reduction=mode)
    mask = torch.zeros(2, 70, dtype=torch.bool)
    upstream = torch.ones(2, 70) if mode == "none" else None
    result, grads = run_head(problem, backend, upstream, response_mask=mask)
    assert (result.loss == 0).all() and all((grad == 0).all() for grad in grads)
    problem.hidden = problem.hidden[:, :0]
    problem.rest[:2] = [x[:, :0] for x in problem.rest[:2]]
    problem.rest[2] = problem.rest[2][:, :0]
    if form == "topk":
        problem.rest[3] = problem.rest[3][:, :0]
    upstream = torch.ones(2, 0) if mode == "none" else None
    result, grads = run_head(problem, backend, upstream)
    assert (result.loss == 0).all() and all((grad == 0).all() for grad in grads)


@EACH_FORM
@pytest.mark.parametrize("mode", ["token-mean", "none"])
@EACH_FUSED
def test_same_bits_twice(form, mode, backend):
    problem = draw_head(form, *SHAPE, dtype=torch.bfloat16, masked=0.2, reduction=mode)
    upstream = torch.linspace(-1, 1, 400).view(SHAPE) if mode == "none" else None
    (first, grads), (second, again) = (
        run_head(problem, backend, upstream, chunk_size=CHUNK) for _ in range(2)
    )
    assert torch.equal(first.token_loss, second.token_loss)
    assert all(map(torch.equal, grads, again))


def test_token_log_probs_and_gather_lse():
    problem = draw_head("opd", 2, 70, logit_scale=0.7, chunk_size=33).to(torch.float64)
    ids = torch.randint(211, (2, 70, 5), generator=torch.Generator().manual_seed(0))

    def results(backend):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        student = leaves[0], problem.head_of(leaves[1], problem.bias)
        options = {"temperature": 1.3, "backend": backend}
        log_probs, entropy = dg.linear_token_log_probs(
            *student, problem.rest[0], return_entropy=True, **options
        )
        z, lse = dg.linear_gather_lse(*student, ids, **options)
        grads = []
        for target in (log_probs.square().sum(), (z.square().sum() + lse.sum()), z.square().sum()):
            grads += torch.autograd.grad(target, leaves, retain_graph=True)
        return [log_probs, entropy, z, lse, *grads]

    torch.testing.assert_close(results("torch"), results("reference"))


@pytest.mark.parametrize("chunk_size", [64, 8], ids=["one chunk", "several"])
@EACH_FUSED
def test_large_denominators_cost_float16_no_digits(chunk_size, backend):
    """Such a gradient is far below float16's least number until a loss scale brings it back."""
    found = []
    for scale in (2.0**6, 2.0**30):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(64, 32, generator=generator).half().requires_grad_()
        weight = torch.randn(200, 32, generator=generator).half().requires_grad_()
        labels = torch.randint(200, (64,), generator=generator)
        old, teacher = (-5 * torch.rand(64, generator=generator) for _ in range(2))
        result = dg.linear_opd_loss(
            hidden, dg.Head(weight, chunk_size=chunk_size), labels, old, teacher,
            gate=DriftGate(block_size=8), reduction=dg.Reduction(batch_num_tokens=scale),
            backend=backend,
        )  # fmt: skip
        found.append(torch.autograd.grad(result.loss * scale, (hidden, weight)))
    for small, large in zip(*found, strict=True):
        assert small.abs().max() > 0.01
        assert torch.equal(small, large)
