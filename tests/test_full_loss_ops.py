"""`full_loss` as a citizen of PyTorch: views, autograd, compile, memory, bits."""

from __future__ import annotations

import pytest
import torch
from drift_gate.bench.measure import peak_bytes
from support.full import EACH_DIRECTION, NAN, draw_full
from support.judge import EACH_FUSED, loss_and_grad

from drift_gate import full_loss


@EACH_DIRECTION
@EACH_FUSED
def test_strided_logits_are_not_copied(direction, backend):
    problem = draw_full(2, 40, 50, dtype=torch.bfloat16)
    expected, grad = loss_and_grad(problem, backend, function=full_loss, direction=direction)
    for name, width in (("logits", 56), ("teacher", 51)):
        buffer = torch.full((2, 41, width), NAN, dtype=torch.bfloat16)
        setattr(problem, name, buffer[:, :-1, :50].copy_(getattr(problem, name)))
    got, strided_grad = loss_and_grad(problem, backend, function=full_loss, direction=direction)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(grad, strided_grad)


@EACH_DIRECTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inplace_backward(direction, dtype):
    """Overwrites the logits with their gradient; run twice, the same bits."""
    problem = draw_full(2, 30, 40, masked=0.2, dtype=dtype)
    _, *rest = problem.arguments()
    options = {**problem.options, "direction": direction, "vocab_size": 37, "gate": None}
    problem.labels.clamp_(max=36)
    leaf = problem.logits.requires_grad_()
    (expected,) = torch.autograd.grad(full_loss(leaf, *rest, **options).loss, leaf)
    logits = leaf * 1
    loss = full_loss(logits, *rest, **options, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    assert torch.equal(logits, expected) and torch.equal(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd():
    """A second backward is exact, a double one refused; the teacher gets no gradient."""
    problem = draw_full(2, 30, 40)
    z, y = problem.logits.requires_grad_(), problem.teacher.requires_grad_()
    result = full_loss(*problem.arguments(), return_entropy=True)
    for name in ("log_probs", "gate", "drift", "entropy"):
        assert not getattr(result, name).requires_grad
    (first,) = torch.autograd.grad(result.loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(result.loss, z, torch.tensor(-2.5), create_graph=True)
    torch.testing.assert_close(second, -2.5 * first)
    with pytest.raises(RuntimeError, match="drift_gate"):
        second.sum().backward()
    full_loss(*problem.arguments()).loss.backward()
    assert z.grad is not None and y.grad is None


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "jsd", "inplace_backward": True}, {"direction": "forward", "gate": None}],
    ids=str,
)
def test_compile_traces_without_a_break(options):
    torch._dynamo.reset()

    def step(leaf, labels, old, teacher):
        return full_loss(leaf * 1, labels, old, teacher, vocab_size=28, **options).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for length in (20, 13):  # the second time with a dynamic length
        problem = draw_full(2, length, 30)
        problem.labels.clamp_(max=27)
        _, *rest = problem.arguments()
        grads = []
        for function in (compiled, step):
            leaf = problem.logits.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(leaf, *rest), leaf)[0])
        torch.testing.assert_close(grads[0], grads[1])


def test_extra_memory():
    """Beyond inputs: in place a few scratch rows, else the gradient and those rows."""
    problem = draw_full(1, 1024, 4099, dtype=torch.bfloat16)
    _, *rest = problem.arguments()
    leaf = problem.logits.requires_grad_()
    for inplace in (True, False):
        logits = leaf * 1
        full_loss(logits.detach(), *rest)  # one-time set-up is not counted
        with peak_bytes() as memory:
            loss = full_loss(logits, *rest, inplace_backward=inplace).loss
            torch.autograd.grad(loss, logits)
        assert memory.peak <= (0 if inplace else leaf.nbytes) + (14 << 20)


@EACH_DIRECTION
@EACH_FUSED
def test_the_same_bits_again_and_with_any_number_of_threads(direction, backend):
    problem = draw_full(3, 200, 257, dtype=torch.bfloat16, masked=0.2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(problem, backend, function=full_loss, direction=direction))
    finally:
        torch.set_num_threads(before)
    (one, one_grad), *others = results
    for other, grad in others:
        assert torch.equal(other.loss, one.loss) and torch.equal(grad, one_grad)
