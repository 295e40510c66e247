"""`full_loss` on infinities, NaN, masks, invalid rows, and arguments that do not fit."""

from __future__ import annotations

import pytest
import torch
from support.full import EACH_DIRECTION, INF, NAN, draw_full, losses
from support.judge import EACH_BACKEND, loss_and_grad

from drift_gate import full_loss


@EACH_BACKEND
@EACH_DIRECTION
def test_minus_infinity(direction, backend):
    problem = draw_full(1, 6, 40)
    x, y = problem.logits, problem.teacher
    problem.labels.fill_(39)
    x[0, 0, :39] = -INF  # one word has all the mass
    x[0, 1, ::2] = y[0, 1, ::2] = -INF  # words that neither has
    x[0, 2, ::2] = -INF  # the student alone has them not
    y[0, 3, ::2] = -INF  # the teacher alone
    x[0, 4, 3], y[0, 4, 3] = -1e4, -INF  # a probability that underflows, and is no -inf
    infinite = {"reverse": [3, 4], "forward": [0, 2], "jsd": []}[direction]
    result, grad = losses(problem, backend, direction=direction)
    truth, truth_grad = losses(problem.to(torch.float64), "reference", direction=direction)
    assert result.loss[0].isinf().nonzero()[:, 0].tolist() == infinite
    torch.testing.assert_close(result.loss, truth.loss.float())
    finite = result.loss.isfinite()
    torch.testing.assert_close(grad[finite], truth_grad[finite].float())
    if direction != "reverse":
        assert grad.isfinite().all()
    for excluded in ((x[0] == -INF)[finite[0]],):
        assert (grad[finite][excluded] == 0).all() or direction == "forward"


@EACH_BACKEND
@EACH_DIRECTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masks_of_finfo_min(dtype, direction, backend):
    """Count as -inf where that is finite; where it is infinite, the loss is huge and no NaN."""
    problem = draw_full(1, 4, 40, dtype=dtype)
    lowest = torch.finfo(dtype).min
    problem.labels.fill_(39)
    problem.logits[0, :2, ::2] = lowest
    problem.teacher[0, 1:3, ::2] = lowest
    huge = {"reverse": [2], "forward": [0], "jsd": []}[direction]
    truth, truth_grad = losses(problem.to(torch.float64), "reference", direction=direction)
    result, grad = losses(problem, backend, direction=direction)
    assert (result.loss[0] > 1e20).nonzero()[:, 0].tolist() == huge
    good = [row for row in range(4) if row not in huge]
    tolerance = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.loss[0, good], truth.loss[0, good].float(), **tolerance)
    tolerance = dict(rtol=1e-2, atol=1e-6) if dtype == torch.bfloat16 else tolerance
    expected = truth_grad[0, good].to(dtype)
    torch.testing.assert_close(grad[0, good], expected, **tolerance)


@EACH_BACKEND
@EACH_DIRECTION
@pytest.mark.parametrize("poison", [NAN, INF, "all -inf"])
def test_nan_and_infinite_logits_make_their_row_nan(poison, direction, backend):
    for side in ("logits", "teacher"):
        problem = draw_full(1, 80, 30)
        x = getattr(problem, side)
        if poison == "all -inf":
            x[0, 3] = -INF
        else:
            x[0, 3, 5] = poison
        result, grad = losses(problem, backend, direction=direction)
        bad = result.loss.isnan()
        assert bad[0].nonzero().tolist() == [[3]]
        assert grad[bad].isnan().all() and grad[~bad].isfinite().all()


@EACH_DIRECTION
def test_invalid_rows_may_hold_anything(direction):
    problem = draw_full(2, 60, 30, masked=0.4)
    clean, clean_grad = loss_and_grad(problem, "torch", function=full_loss, direction=direction)
    masked = ~problem.options["response_mask"]
    for x in (problem.logits, problem.old_log_probs, problem.teacher):
        x[masked] = NAN
    problem.labels[masked] = 10**9
    for backend in ("torch", "reference"):
        got, grad = loss_and_grad(problem, backend, function=full_loss, direction=direction)
        torch.testing.assert_close(got.loss, clean.loss)
        torch.testing.assert_close(grad, clean_grad)
        for name in ("token_loss", "log_probs", "gate", "drift", "entropy"):
            assert (getattr(got, name)[masked] == 0).all(), name
        assert (grad[masked] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 7), (2, 3, 7)], ids=str)
@EACH_BACKEND
def test_a_batch_without_valid_rows_has_loss_0(shape, backend):
    problem = draw_full(*shape)
    problem.labels.fill_(-100)
    result, grad = loss_and_grad(problem, backend, function=full_loss, direction="jsd")
    assert (result.loss == 0).all() and (grad == 0).all()


BAD = [
    ({"teacher": torch.rand(2, 4, 7)}, ValueError, r"teacher_logits .*\[2, 5\]; got shape .*4, 7"),
    ({"teacher": torch.rand(2, 5, 8)}, ValueError, "same words; got V = 7 and 8 .vocab_size"),
    ({"teacher": torch.rand(2, 7, 5).mT}, ValueError, "teacher_logits must be contiguous in their"),
    ({"teacher": torch.rand(2, 5, 7, device="meta")}, ValueError, "logits, cpu; got meta"),
    ({"teacher": torch.ones(2, 5, 7).int()}, TypeError, "teacher_logits must be a floating-point"),
    ({"teacher": None}, TypeError, "teacher_logits must be a torch.Tensor; got NoneType"),
    ({"vocab_size": 8}, ValueError, r"between 1 and the words of logits \(7\).*got 8"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be between 1 and .*got 0"),
    ({"vocab_size": 7.0}, TypeError, "vocab_size must be an int; got float"),
    (
        {"labels": torch.full((2, 5), 6), "vocab_size": 6},
        ValueError,
        r"labels must lie in \[0, 6\)",
    ),
    ({"direction": "both"}, ValueError, "direction must be one of reverse, forward, jsd; got 'bo"),
    ({"beta": -0.1}, ValueError, "beta must be finite and at least 0; got -0.1"),
    ({"beta": 1.1}, ValueError, "beta must be at most 1; got 1.1"),
    ({"beta": "1"}, TypeError, "beta must be a number; got str"),
    ({"teacher_temperature": 0}, ValueError, "teacher_temperature must be finite and greater"),
    ({"temperature": 0}, ValueError, "temperature must be finite and greater than 0; got 0"),
    ({"labels": None}, ValueError, "labels must be a tensor where a gate or old_log_probs"),
    ({"old_log_probs": None}, ValueError, "old_log_probs must be a tensor where a gate is used"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(changes, error, message):
    names = ("logits", "labels", "old_log_probs", "teacher")
    arguments = dict(zip(names, draw_full(2, 5, 7).arguments(), strict=True)) | changes
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=message):
        full_loss(*positional, **arguments)
