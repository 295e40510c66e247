"""`full_loss`: the three divergences against formulas, float64, and each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.full import EACH_DIRECTION, INF, NAN, FullProblem, draw_full, losses
from support.judge import EACH_BACKEND, EACH_WIDE, FUSED, assert_same_budget, loss_and_grad

from drift_gate import DriftGate, full_loss


def check(problem: FullProblem, **options: Any) -> None:
    for backend in ("torch",) if problem.teacher.dtype == torch.float64 else FUSED:
        assert_same_budget(full_loss, problem, backend, **options)


@EACH_WIDE
def test_kl_as_pytorch_has_it(backend):
    problem = draw_full(1, 30, 50).to(torch.float64)
    log_p, log_q = problem.logits.log_softmax(-1), problem.teacher.log_softmax(-1)
    for direction, pair in (("reverse", (log_q, log_p)), ("forward", (log_p, log_q))):
        expected = torch.nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
        result, _ = losses(problem, backend, direction=direction)
        torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-12)


@EACH_WIDE
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd_as_trl_computes_it(beta, backend):
    """m = beta teacher + (1 - beta) student; both softmaxed at the temperature."""
    problem = draw_full(1, 30, 50).to(torch.float64)
    p, q = (problem.logits / 0.9).softmax(-1), (problem.teacher / 0.9).softmax(-1)
    m = beta * q + (1 - beta) * p
    expected = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
    result, _ = losses(problem, backend, direction="jsd", beta=beta, temperature=0.9)
    torch.testing.assert_close(result.loss, expected.sum(-1), rtol=1e-10, atol=1e-12)


@EACH_DIRECTION
def test_the_gradient_is_the_documented_one(direction):
    problem = draw_full(1, 30, 50).to(torch.float64)
    options = {"direction": direction, "beta": 0.3, "temperature": 0.7, "teacher_temperature": 1.9}
    result, grad = losses(problem, **options)
    p, q = (problem.logits / 0.7).softmax(-1), (problem.teacher / 1.9).softmax(-1)
    if direction == "forward":
        expected = p - q
    else:
        m = q if direction == "reverse" else 0.3 * q + 0.7 * p
        h = (1.0 if direction == "reverse" else 0.7) * (p / m).log()
        expected = p * (h - (p * h).sum(-1, keepdim=True))
    torch.testing.assert_close(grad, expected / 0.7, rtol=1e-9, atol=1e-13)
    assert (result.loss > 0).all()


@EACH_WIDE
@EACH_DIRECTION
def test_gradcheck(direction, backend):
    problem = draw_full(2, 3, 7, masked=0.2).to(torch.float64)
    problem.labels.clamp_(max=5)
    _, *rest = problem.arguments()
    options = {"direction": direction, "beta": 0.3, "temperature": 0.8, "vocab_size": 6}

    def outputs(z):
        result = full_loss(z, *rest, **options, **problem.options, gate=None, backend=backend)
        return result.loss, result.token_loss

    assert torch.autograd.gradcheck(outputs, (problem.logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 70, 517),  # two sequences; odd V
        (1, 3, 32_000),  # a real vocabulary; a chunk of rows that is not full
        (150, 33),  # [N, V]
        (50, 1, 2),  # two words; rows enough for the eager error to be a yardstick
    ],
    ids=str,
)
@EACH_DIRECTION
def test_shapes_and_dtypes(direction, shape, dtype):
    check(draw_full(*shape, dtype=dtype), direction=direction, beta=0.3)


@EACH_DIRECTION
def test_one_word(direction):
    """p = q = 1: no divergence, and no gradient but for the rounding of 1."""
    result, grad = losses(draw_full(3, 2, 1), direction=direction)
    assert (result.loss == 0).all()
    assert grad.abs().max() < 4e-7


@EACH_DIRECTION
def test_temperatures(direction):
    problem = draw_full(2, 60, 101, masked=0.2)
    options = {"direction": direction, "temperature": 0.7}
    check(problem, **options)
    check(problem, **options, teacher_temperature=1.6)
    given, _ = losses(problem, **options)
    expected, _ = losses(problem, **options, teacher_temperature=0.7)
    assert torch.equal(given.loss, expected.loss)


@EACH_DIRECTION
def test_a_teacher_of_another_dtype(direction):
    problem = draw_full(2, 60, 101, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.float64):
        problem.teacher = problem.teacher.to(dtype)
        check(problem, direction=direction)


@EACH_DIRECTION
def test_logits_of_1e4_and_equal_models(direction):
    """A constant costs no digits; two equal models have divergence 0 and no gradient."""
    problem = draw_full(1, 40, 600)
    for x in (problem.logits, problem.teacher):  # exact in float32
        x.copy_((x * 16).round() / 16 + 1e4)
    check(problem, direction=direction, gate=None)
    problem.teacher = problem.logits.clone()
    result, grad = losses(problem, direction=direction)
    assert result.loss.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "gate", [DriftGate(block_size=9, aggregate="rms"), DriftGate("span"), None], ids=str
)
def test_gates_and_reductions(gate, packed):
    shape = (123, 40) if packed else (3, 41, 40)
    problem = draw_full(*shape, drift=1.5, masked=0.25)
    if packed:  # the second sequence is empty
        problem.options["cu_seqlens"] = torch.tensor([0, 17, 17, 70, 123])
    if gate is not None and gate.granularity == "span":
        generator = torch.Generator().manual_seed(1)
        problem.options["span_ids"] = torch.randint(-3, 3, shape[:-1], generator=generator)
    for mode in ("token-mean", "seq-mean-token-mean", "none"):
        check(problem, gate=gate, reduction=mode)


@EACH_WIDE
def test_the_gate_is_detached(backend):
    problem = draw_full(2, 80, 30, drift=1.0).to(torch.float64)
    gated, grad = loss_and_grad(problem, backend, function=full_loss)
    _, expected = loss_and_grad(
        problem, backend, gated.gate / 160, function=full_loss, gate=None, reduction="none"
    )
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@EACH_BACKEND
def test_without_labels(backend):
    """Every position is valid but for the mask, whatever the ignore_index."""
    problem = draw_full(2, 30, 40, masked=0.3)
    expected, expected_grad = losses(problem, backend)
    problem.labels = problem.old_log_probs = None
    for ignore_index in (-100, 0):
        got, grad = losses(problem, backend, ignore_index=ignore_index)
        assert torch.equal(got.loss, expected.loss) and torch.equal(grad, expected_grad)
        assert (got.log_probs == 0).all() and (got.drift == 0).all()
    assert (got.loss != 0).equal(problem.options["response_mask"])


@EACH_DIRECTION
def test_float64_stays_float64(direction):
    problem = draw_full(2, 70, 90, masked=0.2).to(torch.float64)
    (got, grad), (truth, truth_grad) = (
        loss_and_grad(problem, b, function=full_loss, direction=direction)
        for b in ("torch", "reference")
    )
    for name in ("loss", "token_loss", "log_probs", "gate", "drift", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(truth, name), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-10, atol=1e-14)


@EACH_DIRECTION
def test_vocab_size(direction):
    """As if both were cut; the student's words beyond get no gradient, whatever they hold."""
    problem = draw_full(2, 40, 50, masked=0.2)
    cut = dataclasses.replace(
        problem, logits=problem.logits[..., :45].clone(), teacher=problem.teacher[..., :45].clone()
    )
    cut.labels.clamp_(max=44)
    expected, expected_grad = losses(cut, direction=direction)
    problem.logits[..., 45:] = NAN
    problem.teacher[..., 45:] = INF
    for width in (50, 47):
        problem.teacher = problem.teacher[..., :width]
        for backend in ("torch", "reference"):
            got, grad = losses(problem, backend, direction=direction, vocab_size=45)
            torch.testing.assert_close(got.loss, expected.loss)
            torch.testing.assert_close(grad[..., :45], expected_grad)
            assert (grad[..., 45:] == 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_of_a_certain_student_has_no_gradient(beta: float) -> None:
    """Found by fuzzing: the terms of a word with all the mass did not cancel to the last bit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(64, 128).index_fill_(1, torch.tensor([5]), 200.0).requires_grad_()
    teacher = 5 * torch.randn(64, 128, generator=generator)
    result = full_loss(logits, None, None, teacher, direction="jsd", beta=beta, gate=None)
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert result.loss > 0 and not grad.any()
