"""Reverse KL to a teacher that rules out the words beyond its list: NeMo-RL's zero_outside_topk."""

from __future__ import annotations

import itertools

import pytest
import torch
from drift_gate.kernels import expand as kernel_module
from support.calls import arguments_of
from support.judge import EACH_BACKEND, EACH_FUSED, assert_same_budget
from support.problems import draw_topk

import drift_gate as dg
from drift_gate.passes.backends import passes_of

KINDS = [("reverse", 0.5), ("mixed", 0.3), ("mixed", 0.0), ("mixed", 1.0)]
OUTSIDE = {"support": "truncated", "zero_outside_topk": True}
EACH_KIND = pytest.mark.parametrize(("direction", "beta"), KINDS)
EACH_WIDE = pytest.mark.parametrize("backend", ["torch", "reference"])


def by_hand(logits, ids, teacher, direction, beta):
    """KL to the teacher whose log-probs are -100 where it lists nothing, [...]."""
    log_p = logits.log_softmax(-1)
    share = teacher.log_softmax(-1)
    log_q = torch.full_like(log_p, -100.0).scatter(-1, ids, share)
    reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
    forward = (share.exp() * (share - log_p.gather(-1, ids))).sum(-1)
    return reverse if direction == "reverse" else beta * forward + (1 - beta) * reverse


@EACH_KIND
@EACH_BACKEND
def test_the_formula_by_hand(direction, beta, backend):
    dtype = torch.float32 if backend in ("native", "triton") else torch.float64
    problem = draw_topk(2, 9, 50, k=4).to(dtype)
    logits = problem.logits.requires_grad_()
    options = {**OUTSIDE, "direction": direction, "beta": beta, "gate": None, "backend": backend}
    got = dg.topk_loss(logits, None, None, problem.ids, problem.teacher, **options).loss
    wanted = by_hand(logits, problem.ids, problem.teacher, direction, beta).mean()
    grads = [torch.autograd.grad(x, logits)[0] for x in (got, wanted)]
    tight = {} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(got, wanted, **tight)
    torch.testing.assert_close(*grads, **tight)


@EACH_WIDE
@EACH_KIND
def test_gradcheck(backend, direction, beta):
    problem = draw_topk(2, 3, 7, k=3, masked=0.2).to(torch.float64)
    problem.ids[0, 1, 2] = -1
    options = {**OUTSIDE, "direction": direction, "beta": beta, "backend": backend}

    def losses(z):
        out = dg.topk_loss(z, *problem.arguments()[1:], **problem.options, **options, gate=None)
        return out.loss, out.token_loss

    assert torch.autograd.gradcheck(losses, (problem.logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("direction", "beta"), KINDS[:2])
@EACH_FUSED
def test_error_budget(direction, beta, dtype, backend):
    problem = draw_topk(8, 60, 301, k=12, dtype=dtype, masked=0.2, teacher_share=0.95)
    options = {**OUTSIDE, "direction": direction, "beta": beta}
    assert_same_budget(dg.topk_loss, problem, backend, **options)


@EACH_FUSED
def test_excluded_words_and_near_certainty(backend):
    """Words of -inf are outside and add nothing; a listed one may have all of the mass."""
    problem = draw_topk(1, 4, 40, k=3)
    ids = problem.ids
    problem.logits[0, 0, (ids[0, 0, 0] + 1) % 40] = -torch.inf
    problem.logits[0, 1].scatter_(0, ids[0, 1, :1], 60.0)
    problem.logits[0, 2, ids[0, 2, 1]] = -torch.inf
    problem.logits[0, 3] = -torch.inf
    problem.logits[0, 3, ids[0, 3, 0]] = 2.0
    logits = problem.logits.requires_grad_()
    options = {**OUTSIDE, "gate": None}
    results = []
    for each in (backend, "reference"):
        out = dg.topk_loss(logits, None, None, ids, problem.teacher, **options, backend=each)
        results += [out.loss, torch.autograd.grad(out.loss, logits)[0]]
        assert all(x.isfinite().all() for x in results)
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-5, atol=2e-5)


@EACH_KIND
@EACH_FUSED
@pytest.mark.parametrize("per_token", [False, True])
def test_through_a_head(direction, beta, backend, per_token):
    """Chunks, a cap and a bias: the dense way."""
    hidden, head, labels, old, ids, teacher = arguments_of("linear_topk_loss", 2, 9)
    head = dg.Head(head.weight, head.bias, softcap=6.0, logit_scale=0.7, chunk_size=5)
    options = {**OUTSIDE, "direction": direction, "beta": beta}
    options["reduction"] = "none" if per_token else "token-mean"
    results = []
    for each in (backend, "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, head.weight, head.bias)]
        given = dg.Head(leaves[1], leaves[2], 6.0, 0.7, 5)
        out = dg.linear_topk_loss(
            leaves[0], given, labels, old, ids, teacher, backend=each, **options
        )
        results.append([out.loss, *torch.autograd.grad(out.loss.sum(), leaves)])
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-4)


def expand_by_hand(z, ids, alpha, beta, gamma, scale):
    log_p = (scale * z.double()).log_softmax(-1)
    slope = alpha.double()[:, None] + gamma.double()[:, None] * log_p.clamp(min=-1e4)
    return scale * (slope * log_p.exp()).scatter_add(1, ids.long(), beta.double())


def assert_expands(passes, device, vocab, k):
    """Rows without either coefficient are not read; excluded words get no gradient."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(6, vocab, generator=generator)
    z[:, 3] = -torch.inf
    z[4] = torch.nan
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:k] for _ in range(6)])
    alpha, gamma = torch.randn(2, 6, generator=generator).unbind()
    beta = torch.randn(6, k, generator=generator)
    alpha[2], gamma[3], alpha[4], gamma[4] = 0, 0, 0, 0
    beta[4] = 0
    scaled = 0.7 * z
    top = scaled.amax(-1)
    log_sum = (scaled - top[:, None]).exp().sum(-1).log()
    gathered = scaled.gather(1, ids)
    top[4] = log_sum[4] = gathered[4] = 0
    out = torch.empty_like(z, device=device)[None]
    moved = [x.to(device) for x in (z[None], ids, top, log_sum, gathered)]
    row_data = [x.to(device) for x in (alpha, beta)]
    passes.expand(*moved, None, *row_data, 0.7, out, gamma.to(device))
    wanted = expand_by_hand(z.masked_fill(z.isnan(), 0), ids, alpha, beta, gamma, 0.7)
    wanted[4] = 0
    torch.testing.assert_close(out[0].cpu().double(), wanted, rtol=2e-6, atol=2e-6)


EACH_SIZE = pytest.mark.parametrize(("vocab", "k"), [*itertools.product((5, 1003), (1, 3))])


@EACH_SIZE
@EACH_FUSED
def test_expand_with_the_slope_of_the_entropy(backend, vocab, k):
    assert_expands(passes_of(backend), "cpu", vocab, k)


@EACH_SIZE
def test_the_kernel_expands_with_the_slope_of_the_entropy(kernels_on_cpu, vocab, k):
    assert_expands(kernel_module, kernels_on_cpu, vocab, k)


def test_arguments():
    problem = draw_topk(1, 3, 10, k=2)
    wrong = [
        ({"support": "tail"}, "zero_outside_topk needs support 'truncated' .* got 'tail'"),
        ({}, "zero_outside_topk needs support 'truncated'"),
        ({**OUTSIDE, "direction": "jsd"}, "'reverse' or 'mixed'; got 'truncated' and 'jsd'"),
        ({**OUTSIDE, "log_prob_floor": -9.0}, "zero_outside_topk takes no log_prob_floor"),
    ]  # fmt: skip
    for options, message in wrong:
        options = {"zero_outside_topk": True, **options}
        with pytest.raises(ValueError, match=message):
            dg.topk_loss(*problem.arguments(), **options)


def test_compiled():
    problem = draw_topk(2, 9, 30, k=3)
    arguments = problem.arguments()

    def loss(z, backend):
        return dg.topk_loss(z, *arguments[1:], **OUTSIDE, backend=backend).loss

    z = arguments[0].requires_grad_()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(z, "torch")
        results.append([value, torch.autograd.grad(value, z)[0]])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
