"""`Head.logits_dtype`: the float32 sums of the head's product, read as they are."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from support.heads import FORMS, HeadProblem, assert_same_budget, draw_head, run_head
from support.judge import EACH_FUSED, FUSED
from torch import Tensor

import drift_gate as dg
from drift_gate.head import logits as of_head
from drift_gate.head.check import HeadInputs, HeadRule, chunk_sizes
from drift_gate.head.scan import expand_head, scan_head
from drift_gate.head.sums import Needs
from drift_gate.measure import peak_bytes
from drift_gate.parallel.words import Shard
from drift_gate.passes.backends import passes_of

EACH_FORM = pytest.mark.parametrize("form", FORMS)
EACH_SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
WIDE = torch.float32


@EACH_FORM
@EACH_SHORT
@pytest.mark.parametrize("softcap", [None, 6.0])
@EACH_FUSED
def test_budget(form, dtype, softcap, backend, monkeypatch):
    """Chunks that end anywhere, and slabs of the head: 211 words are four and a part."""
    monkeypatch.setattr(of_head, "WIDENED_WORDS", 50 * 24)
    problems = [
        draw_head(form, 4, 100, seed=seed, dtype=dtype, softcap=softcap, logits_dtype=WIDE)
        for seed in range(4)
    ]
    assert_same_budget(problems, backend, metrics=False, chunk_size=128)


@EACH_FORM
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 32},  # blocks are longer: the log-probs come first
        {"reduction": "none"},  # the logits are made again in the backward
        {"chunk_size": 1000, "temperature": 0.7},  # all rows in one chunk
        {"wide_bias": True},
    ],
    ids=str,
)
@EACH_FUSED
def test_ways_through_the_rows(form, options, backend):
    options = dict(options)
    wide_bias = options.pop("wide_bias", False)
    problems = [
        draw_head(form, 4, 100, seed=seed, dtype=torch.bfloat16, masked=0.2, logits_dtype=WIDE)
        for seed in range(4)
    ]
    if wide_bias:
        for problem in problems:
            problem.head = dataclasses.replace(problem.head, bias=problem.bias.float() * 1.001)
    assert_same_budget(problems, backend, metrics=False, **{"chunk_size": 128, **options})


@EACH_FORM
@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_changes_for_longer_heads(form, backend, dtype):
    if backend not in (*FUSED, "reference") or (backend == "native" and dtype == torch.float64):
        pytest.skip("not here")
    problem = draw_head(form, 2, 70).to(dtype)
    results = []
    for wanted in (None, WIDE):
        problem.head = dataclasses.replace(problem.head, logits_dtype=wanted)
        results.append(run_head(problem, backend, chunk_size=64))
    (one, grads), (other, others) = results
    assert torch.equal(one.loss, other.loss) and torch.equal(one.log_probs, other.log_probs)
    assert all(map(torch.equal, grads, others))


def by_hand(problem: HeadProblem) -> Tensor:
    """Log-probs [..., V] in float64."""
    logits = problem.hidden.double() @ problem.weight.double().T + problem.bias.double()
    return logits.log_softmax(-1)


@EACH_SHORT
@pytest.mark.parametrize("backend", [*FUSED, "reference"])
def test_log_probs_have_the_digits_of_float32(dtype, backend):
    problem = draw_head("opd", 2, 70, dtype=dtype, softcap=None)
    labels = problem.rest[0]
    ids = torch.cat([labels[..., None], labels[..., None] * 0], -1)
    log_p = by_hand(problem)
    truth = log_p.gather(-1, ids)

    def errors(wanted: torch.dtype | None) -> list[float]:
        head = dataclasses.replace(problem.head, logits_dtype=wanted, chunk_size=64)
        now, entropy = dg.linear_token_log_probs(
            problem.hidden, head, labels, return_entropy=True, backend=backend
        )
        z, lse = dg.linear_gather_lse(problem.hidden, head, ids, backend=backend)
        pairs = (now, truth[..., 0]), (z - lse[..., None], truth)
        found = [(a.double() - b).abs().max().item() for a, b in pairs]
        expected = -(log_p.exp() * log_p).sum(-1)
        return [*found, (entropy.double() - expected).abs().max().item()]

    assert max(errors(WIDE)) < 5e-6
    assert min(errors(None)) > 1e-3 * (8 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@EACH_SHORT
@EACH_FUSED
def test_the_gradient_is_rounded_once(softcap, dtype, backend):
    """With the unit matrix as head, grad_hidden is the gradient of the logits itself."""
    generator = torch.Generator().manual_seed(0)
    width, rows = 64, 200
    hidden = (2 * torch.randn(rows, width, generator=generator)).to(dtype)
    rule = HeadRule(softcap or 0.0, 1.0, 128, 128, wide=True)
    head = HeadInputs(hidden, torch.eye(width).to(dtype), None, rule, Shard(width))
    ids = torch.randint(width, (rows, 1), generator=generator)
    beta = torch.randn(rows, 1, generator=generator)
    needs = Needs(True, False, False)
    of_hidden, *_ = expand_head(
        passes_of(backend), backend, head, ids, None, -beta[:, 0], beta, needs
    )
    z = hidden.double().requires_grad_()
    capped = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = (capped.log_softmax(-1).gather(1, ids) * beta.double()).sum()
    (truth,) = torch.autograd.grad(loss, z)
    once = of_hidden == truth.to(dtype)
    assert once.float().mean() > 0.99  # the others lie at a tie within float32's own error
    unit = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).tiny
    assert ((of_hidden.double() - truth).abs() <= 0.51 * unit + 1e-7).all()


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("peak", [1.0, 10.0])  # standard deviation of the logits
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@EACH_FUSED
def test_full_loss_is_as_exact_as_trl_s(beta, peak, softcap, backend):
    """`ChunkedDivergenceFunction` of TRL 1.16, which keeps float32 logits: both are off by the
    rounding of the gradient, and much less from each other. Rounded logits are off by ten times
    that."""
    trl = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = 64, 64, 8000

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator)

    hidden, weight = normal(rows, width), normal(vocab, width, scale=peak / width**0.5)
    theirs = (hidden + normal(rows, width, scale=0.1)).bfloat16()
    their_weight = (weight + normal(vocab, width, scale=0.05 * peak / width**0.5)).bfloat16()
    student = [hidden.bfloat16(), weight.bfloat16()]

    def gradients(loss, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in student]
        return [x.double() for x in torch.autograd.grad(loss(*leaves), leaves)]

    def ours(hidden: Tensor, weight: Tensor, which: str = backend, wanted=WIDE) -> Tensor:
        options = {"softcap": softcap, "logits_dtype": wanted}
        teacher = theirs.to(hidden.dtype), dg.Head(their_weight.to(hidden.dtype), **options)
        return dg.linear_full_loss(
            hidden, dg.Head(weight, **options), None, None, *teacher, direction="jsd", beta=beta,
            gate=None, backend=which,
        ).loss  # fmt: skip

    def trl_s(hidden: Tensor, weight: Tensor) -> Tensor:
        teacher = theirs, their_weight, None
        caps = 1.0, 1.0, softcap, 1.0, softcap  # temperature, and scale and cap of both
        return trl.apply(hidden, weight, None, *teacher, beta, *caps)[0].mean()

    truth = gradients(functools.partial(ours, which="reference"), torch.float64)
    results = gradients(ours), gradients(trl_s), gradients(functools.partial(ours, wanted=None))
    for mine, other, rounded, exact in zip(*results, truth, strict=True):
        error, of_trl, of_rounded = ((x - exact).norm() for x in (mine, other, rounded))
        assert error < 1.01 * of_trl and error < 0.003 * exact.norm()
        assert (mine - other).norm() < 1e-3 * exact.norm()
        assert of_rounded > 3 * error


@pytest.mark.parametrize(("step", "seen"), [(2e-4, 0.5), (1e-3, 0.7)])
def test_drift_at_151_936_words(step, seen):
    """A policy moves by 0.003 and by 0.008 nats a token; labels' logits are of size 13. What
    rounded logits show of it correlates with it by less than `seen`, and is larger."""
    vocab, width, rows = 151_936, 64, 256
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, width, generator=generator).bfloat16()
    near = torch.randint(vocab, (rows,), generator=generator)
    before = 0.4 * torch.randn(rows, width, generator=generator) + weight[near].float() * 14 / width
    labels = (before @ weight.float().T).softmax(-1).multinomial(1, generator=generator)[:, 0]
    after = before + step * torch.randn(rows, width, generator=generator)
    policies = [x.bfloat16() for x in (before, after)]

    def drift(dtype: torch.dtype, wanted: torch.dtype | None) -> Tensor:
        head = dg.Head(weight.to(dtype), logits_dtype=wanted)
        old, now = (dg.linear_token_log_probs(x.to(dtype), head, labels)[0] for x in policies)
        return (old - now).double()

    true = drift(torch.float64, None)
    assert step * 5 < true.abs().mean() < step * 20
    shown = {wanted: drift(torch.bfloat16, wanted) for wanted in (None, WIDE)}
    found = {k: torch.corrcoef(torch.stack([true, x]))[0, 1] for k, x in shown.items()}
    assert found[None] < seen and found[WIDE] > 0.999999
    assert shown[None].abs().mean() > 1.4 * true.abs().mean()
    torch.testing.assert_close(shown[WIDE].abs().mean(), true.abs().mean(), rtol=1e-3, atol=0)


@EACH_FORM
def test_micro_batches_are_one_batch(form):
    problem = draw_head(form, 8, 20, dtype=torch.bfloat16, logits_dtype=WIDE, masked=0.2)
    gate = dg.DriftGate(block_size=8)
    expected, grads = run_head(problem, "auto", gate=gate)
    normalizer, leaves = dg.GateNormalizer(gate), [problem.weight.clone().requires_grad_()]
    for part in (slice(0, 3), slice(3, 8)):
        rest = [x[part] if isinstance(x, Tensor) else x for x in problem.rest]
        mask = problem.options["response_mask"][part]
        head = problem.head_of(leaves[0], problem.bias)
        arguments = problem.hidden[part], head, *rest
        problem.function(*arguments, gate=normalizer, response_mask=mask).loss.backward()
    loss = normalizer.scale_gradients(leaves)
    torch.testing.assert_close(loss.float(), expected.loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[0].grad, grads[1], rtol=0.02, atol=1e-4)


@EACH_FORM
def test_compile_traces_without_a_break(form):
    problem = draw_head(form, 2, 40, dtype=torch.bfloat16, chunk_size=32, logits_dtype=WIDE)

    def step(hidden, weight, bias):
        return problem.function(hidden * 1, problem.head_of(weight, bias), *problem.rest).loss

    results = []
    for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        loss = function(*leaves, problem.bias)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_casts_first(backend):
    problem = draw_head("opd", 2, 40, logits_dtype=WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        got, grads = run_head(problem, backend)
    short = problem.to(torch.bfloat16)
    short.rest = problem.rest
    expected, wanted = run_head(short, backend)
    torch.testing.assert_close(got.log_probs, expected.log_probs, rtol=0, atol=1e-6)
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-2, atol=1e-5)


def test_a_wide_teacher_decides_about_chunks(monkeypatch):
    """Chunks are the student's, in which the teacher's larger logits must fit, too."""
    seen = []
    drawn = of_head.new_buffer
    monkeypatch.setattr(of_head, "new_buffer", lambda *args: seen.append(args[1]) or drawn(*args))
    monkeypatch.setattr("drift_gate.head.check.SMALL_BYTES", 0)
    monkeypatch.setattr("drift_gate.head.check.CPU_BYTES", 211 * 2 * 300)
    for wanted, size in ((None, 256), (WIDE, 64)):
        problem = draw_head("full", 2, 300, dtype=torch.bfloat16)
        problem.rest[3] = dataclasses.replace(problem.rest[3], logits_dtype=wanted)
        run_head(problem, "auto")
        assert seen.pop() == size


def test_memory():
    """A chunk takes 6 bytes a word beside the widened part of the head, whatever the rows; where
    logits are only read 4."""
    vocab, width, size = 20_000, 16, 64
    for rows in (256, 1024):
        problem = draw_head(
            "opd", rows, vocab=vocab, width=width, dtype=torch.bfloat16, bias=False, softcap=None,
            chunk_size=size, logits_dtype=WIDE,
        )  # fmt: skip
        leaves = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
        small = rows * 2000 + vocab * width * 10 + 2_000_000
        with peak_bytes() as memory:
            loss = problem.function(leaves[0], problem.head, *problem.rest).loss
            torch.autograd.grad(loss, leaves)
        assert 6 * size * vocab < memory.peak < 6 * size * vocab + small
        with peak_bytes() as memory, torch.no_grad():
            dg.linear_token_log_probs(leaves[0], problem.head, problem.rest[0])
        assert 4 * size * vocab < memory.peak < 4 * size * vocab + small


def test_chunks_count_the_float32_bytes():
    for device, bytes_ in (("cpu", 160 << 20), ("meta", 2400 << 20)):
        weight = torch.empty(151_936, 8, dtype=torch.bfloat16, device=device)
        rows, read = chunk_sizes("head.chunk_size", None, weight, len(weight), True)
        assert bytes_ - 256 * 6 * len(weight) < rows * len(weight) * 6 <= bytes_
        shorter, fewer = chunk_sizes("head.chunk_size", None, weight, len(weight))
        assert rows < shorter and read <= rows and 0.45 < read / fewer < 0.55
        assert chunk_sizes("head.chunk_size", 77, weight, len(weight), True) == (77, 77)


def test_a_scan_needs_no_room_for_a_gradient():
    problem = draw_head("opd", 64, vocab=5000, bias=False, softcap=None, dtype=torch.bfloat16)
    rule = HeadRule(0.0, 1.0, 64, 64, wide=True)
    head = HeadInputs(problem.hidden, problem.weight, None, rule, Shard(5000))
    with peak_bytes() as memory:
        scan_head(passes_of("torch"), head, problem.rest[0][:, None], None, False, 64)
    with peak_bytes() as both:
        scan_head(
            passes_of("torch"), head._replace(rule=rule._replace(wide=False)),
            problem.rest[0][:, None], None, False, 64,
        )  # fmt: skip
    assert memory.peak - both.peak < 64 * 5000 * 2 + 5000 * 24 * 4 + 10_000
