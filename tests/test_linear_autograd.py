"""The `linear_` losses as citizens of autograd: what it asks for, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from support.heads import FORMS, draw_head, run_head
from support.judge import EACH_FUSED
from support.problems import move
from torch.utils.checkpoint import checkpoint

EACH_FORM = pytest.mark.parametrize("form", FORMS)


def leaves_of(problem, *, bias=True):
    tensors = (problem.hidden, problem.weight, problem.bias)[: 3 if bias else 2]
    return [x.clone().requires_grad_() for x in tensors]


def call(problem, hidden, weight, bias=None, **options):
    merged = {**problem.options, **options}
    return problem.function(hidden, problem.head_of(weight, bias), *problem.rest, **merged)


@EACH_FORM
@pytest.mark.parametrize("mode", ["token-mean", "none"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_traces_without_a_break(form, mode, backend):
    torch._dynamo.reset()
    problem = draw_head(form, 2, 70, masked=0.2, reduction=mode, chunk_size=64)
    if form == "topk":
        problem.options["support"] = "tail"

    def step(hidden, weight, bias):
        return call(problem, hidden * 1, weight, bias).loss.sum()

    results = []
    for function in (torch.compile(step, backend=backend, fullgraph=True), step):
        leaves = leaves_of(problem)
        loss = function(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@EACH_FORM
def test_any_upstream_gradient(form):
    problem = draw_head(form, 2, 70).to(torch.float64)
    leaves = leaves_of(problem)
    once = torch.autograd.grad(call(problem, *leaves).loss, leaves)
    other = torch.autograd.grad((call(problem, *leaves).loss - 2).square(), leaves)
    factor = 2 * (call(problem, *leaves).loss.detach() - 2)
    torch.testing.assert_close(other, [factor * grad for grad in once])


@pytest.mark.parametrize(("form", "options"), [("opd", {}), ("topk", {"support": "tail"})])
def test_a_second_backward_says_why_it_cannot(form, options):
    problem = draw_head(form, 2, 70, **options)
    leaves = leaves_of(problem)
    loss = call(problem, *leaves).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    with pytest.raises(RuntimeError, match="handed out by the first backward"):
        loss.backward(retain_graph=True)
    assert all(map(torch.equal, first, kept))
    loss = call(problem, *leaves).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("form", "mode"), [("topk", "token-mean"), ("opd", "none"), ("full", "none")]
)
def test_losses_whose_backward_may_run_twice(form, mode):
    problem = draw_head(form, 2, 70, reduction=mode)
    leaves = leaves_of(problem)
    loss = call(problem, *leaves).loss.sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves)))


@EACH_FORM
@EACH_FUSED
def test_no_gradient_where_none_is_asked_for(form, backend):
    problem = draw_head(form, 2, 70)
    leaves = leaves_of(problem)
    with torch.no_grad():
        assert not call(problem, *leaves).loss.requires_grad
    assert not call(problem, problem.hidden, problem.weight).loss.requires_grad
    _, expected = run_head(problem, backend)
    for asked in ([0], [1], [2], [0, 2]):
        parts = [problem.hidden, problem.weight, problem.bias]
        for k in asked:
            parts[k] = parts[k].clone().requires_grad_()
        result = call(problem, *parts)
        assert result.token_loss.requires_grad == (form == "topk")  # of the renormalised support
        grads = torch.autograd.grad(result.loss, [parts[k] for k in asked])
        torch.testing.assert_close(grads, [expected[k] for k in asked], rtol=1e-5, atol=1e-8)


@EACH_FORM
def test_tied_embedding_and_computed_head(form):
    problem = draw_head(form, 2, 70, bias=False).to(torch.float64)
    tokens = problem.rest[0]
    low, high = torch.randn(2, 211, dtype=torch.float64), torch.randn(24, 2, dtype=torch.float64)

    def gradient(backend):
        weight, a, b = (x.clone().requires_grad_() for x in (problem.weight, low, high))
        hidden = torch.nn.functional.embedding(tokens, weight) + problem.hidden
        loss = call(problem, hidden, weight + 0.1 * (b @ a).T, backend=backend).loss
        return torch.autograd.grad(loss, [weight, a, b])

    torch.testing.assert_close(gradient("torch"), gradient("reference"))


@EACH_FORM
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(form, reentrant):
    problem = draw_head(form, 2, 70)
    expected = torch.autograd.grad(3 * call(problem, *(x := leaves_of(problem))).loss, x)

    def loss(*leaves):
        return call(problem, *leaves).loss

    leaves = leaves_of(problem)
    (3 * checkpoint(loss, *leaves, use_reentrant=reentrant)).backward()
    assert all(map(torch.equal, [x.grad for x in leaves], expected))


@EACH_FORM
@pytest.mark.parametrize("of_hidden", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_head", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(form, of_hidden, of_head):
    """As the same call on bfloat16 copies; gradients in the dtype of their leaves."""
    problem = draw_head(form, 2, 70)
    hidden, weight = leaves_of(problem, bias=False)
    leaves = [hidden.detach().to(of_hidden), weight.detach().to(of_head)]
    leaves = [x.requires_grad_() for x in leaves]
    if form == "full":
        problem.rest[2] = problem.rest[2].to(of_hidden)
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(problem, *leaves).loss
    grads = torch.autograd.grad(loss, leaves)
    assert [grad.dtype for grad in grads] == [of_hidden, of_head]
    short = [x.detach().bfloat16().requires_grad_() for x in leaves]
    if form == "full":
        problem.rest[2:] = [move(x, torch.bfloat16) for x in problem.rest[2:]]
    expected = call(problem, *short).loss
    assert torch.equal(loss, expected)
    for grad, other in zip(grads, torch.autograd.grad(expected, short), strict=True):
        assert torch.equal(grad, other.to(grad.dtype))


def test_double_backward_is_refused():
    problem = draw_head("opd", 2, 70)
    leaves = leaves_of(problem)
    (grad, *_) = torch.autograd.grad(call(problem, *leaves).loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
