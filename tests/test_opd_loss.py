"""`opd_loss` on the PyTorch backend against the float64 reference, within the eager error."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.judge import EACH_BACKEND, EACH_FUSED, EACH_WIDE, assert_good, loss_and_grad
from support.problems import draw

from drift_gate import Clip, DriftGate, Reduction, opd_loss

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (2, 70, 517),  # two sequences of one full block and a partial one; odd V
    (1, 3, 32_000),  # a real vocabulary; a chunk of rows that is not full
    (150, 33),  # [N, V]: one sequence of three blocks
    (1, 1, 1),  # one row, one word: the log-prob is 0
    (3, 1, 2),  # blocks of one position
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EACH_FUSED
def test_shapes_and_dtypes(shape, dtype, backend):
    assert_good(draw(*shape, dtype=dtype), backend)


@pytest.mark.parametrize("estimator", ["ppo", "importance", "k1", "k2", "k3"])
@EACH_FUSED
def test_estimators(estimator, backend):
    problem = draw(2, 90, 101, drift=2.0, masked=0.2)  # ratios beyond every clip
    assert_good(problem, backend, estimator=estimator)
    assert_good(problem, backend, estimator=estimator, clip=Clip(advantage=0.5), temperature=0.7)


@EACH_FUSED
def test_every_clip_of_ppo_is_active(backend):
    problem = draw(2, 200, 50, drift=2.0)
    wide = Clip(low=0.9, high=50, dual=99)
    loose = opd_loss(*problem.arguments(), clip=wide)
    for tight in ({"low": 0.2}, {"high": 0.2}, {"dual": 1.5}):
        clip = dataclasses.replace(wide, **tight)
        assert not torch.equal(opd_loss(*problem.arguments(), clip=clip).loss, loose.loss)
        assert_good(problem, backend, clip=clip)


MODES = [
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
    "none",
]
SIZES = [
    {},
    {"batch_num_tokens": 500, "global_batch_size": 9, "dp_size": 4, "loss_scale_factor": 37},
    {"batch_num_tokens": torch.tensor(500.0), "global_batch_size": torch.tensor(9)},
]


@pytest.mark.parametrize("sizes", SIZES, ids=["own", "numbers", "tensors"])
@pytest.mark.parametrize("mode", MODES)
@EACH_FUSED
def test_reductions(mode, sizes, backend):
    problem = draw(4, 40, 60, masked=0.3)
    problem.options["response_mask"][2] = False  # a sequence without a valid position
    assert_good(problem, backend, reduction=Reduction(mode, **sizes))


GATES = [
    DriftGate(),
    DriftGate("block", block_size=7, tau=2.5, aggregate="mean_abs"),
    DriftGate("token", aggregate="rms", normalize="sequence"),
    DriftGate("sequence", aggregate="max_abs"),
    DriftGate("sequence", aggregate="rms", normalize="none"),
    DriftGate("span", aggregate="rms"),
    DriftGate("span", aggregate="max_abs", normalize="sequence"),
    DriftGate("block", block_size=1000, normalize="none"),
    None,
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=str)
@EACH_FUSED
def test_gates(gate, packed, backend):
    shape = (123, 40) if packed else (3, 41, 40)
    problem = draw(*shape, drift=1.5, masked=0.25)
    if packed:  # the second sequence is empty
        problem.options["cu_seqlens"] = torch.tensor([0, 17, 17, 70, 123])
    if gate is not None and gate.granularity == "span":  # ids that recur after others
        generator = torch.Generator().manual_seed(1)
        problem.options["span_ids"] = torch.randint(-3, 3, shape[:-1], generator=generator)
    assert_good(problem, backend, gate=gate)
    assert_good(problem, backend, gate=gate, reduction="seq-mean-token-mean")


def test_float64_stays_float64():
    problem = draw(2, 70, 90, masked=0.2).to(torch.float64)
    (got, grad), (truth, truth_grad) = (loss_and_grad(problem, b) for b in ("torch", "reference"))
    for name in ("loss", "token_loss", "log_probs", "gate", "drift", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(truth, name), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-11, atol=1e-14)


@EACH_WIDE
def test_gradcheck(backend):
    problem = draw(2, 5, 7, masked=0.2).to(torch.float64)
    _, *rest = problem.arguments()
    logits = problem.logits.requires_grad_()

    def outputs(z, **options):
        result = opd_loss(z, *rest, **problem.options, backend=backend, gate=None, **options)
        return result.loss, result.token_loss

    # Away from the clips' kinks, at which finite differences are of no use.
    for estimator in ("importance", "k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda z, e=estimator: outputs(z, estimator=e), (logits,))
    wide = Clip(low=0.99, high=9)
    assert torch.autograd.gradcheck(lambda z: outputs(z, clip=wide), (logits,))


@EACH_WIDE
def test_the_gate_is_detached(backend):
    """The gradient is that of the ungated loss with the gate's weights as constants."""
    problem = draw(2, 80, 30, drift=1.0).to(torch.float64)
    gated, grad = loss_and_grad(problem, backend)
    _, expected = loss_and_grad(problem, backend, gated.gate / 160, gate=None, reduction="none")
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


def test_loss_and_token_loss_both_carry_gradients():
    problem = draw(2, 30, 20, masked=0.2)
    z = problem.logits.requires_grad_()
    _, *rest = problem.arguments()
    result = opd_loss(z, *rest, **problem.options)
    weight = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    (both,) = torch.autograd.grad(3 * result.loss + (weight * result.token_loss).sum(), z,
                                  retain_graph=True)  # fmt: skip
    (first,) = torch.autograd.grad(result.loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(result.token_loss, z, weight)
    torch.testing.assert_close(both, 3 * first + second)
    for name in ("log_probs", "gate", "drift"):
        assert not getattr(result, name).requires_grad


@EACH_FUSED
def test_invalid_rows_may_hold_anything(backend):
    problem = draw(2, 60, 30, masked=0.4)
    clean, clean_grad = loss_and_grad(problem, backend)
    masked = ~problem.options["response_mask"]
    for x in (problem.logits, problem.old_log_probs, problem.teacher_log_probs):
        x[masked] = float("nan")
    problem.labels[masked] = 10**9
    got, grad = loss_and_grad(problem, backend)
    torch.testing.assert_close(got.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(grad, clean_grad, rtol=0, atol=0)
    for name in ("token_loss", "log_probs", "gate", "drift", "entropy"):
        assert (getattr(got, name)[masked] == 0).all(), name
    assert (grad[masked] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@EACH_BACKEND
def test_a_batch_without_valid_rows_has_loss_0(shape, mode, backend):
    problem = draw(*shape, reduction=mode)
    problem.labels.fill_(-100)
    result, grad = loss_and_grad(
        problem, backend, torch.ones(shape[:-1]) if mode == "none" else None
    )
    assert (result.loss == 0).all()
    assert (grad == 0).all()
    assert all(value == 0 for value in result.metrics.values())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@EACH_FUSED
def test_a_nan_or_infinite_logit_makes_the_loss_nan(poison, backend):
    problem = draw(1, 80, 30)
    problem.logits[0, 3, 5] = poison
    result, grad = loss_and_grad(problem, backend)
    assert result.loss.isnan()
    assert grad[0, 3].isnan().all()


@EACH_FUSED
def test_minus_infinity_is_a_word_without_mass(backend):
    problem = draw(1, 80, 30)
    problem.logits[..., ::3] = -float("inf")
    problem.labels[:] = problem.labels // 3 * 3 + 1
    assert_good(problem, backend, gate=None)


@EACH_FUSED
def test_strided_logits_are_not_copied(backend):
    """`logits[:, :-1]` of a padded buffer: the view's own values, whatever lies between."""
    problem = draw(2, 40, 50, dtype=torch.bfloat16)
    buffer = torch.full((2, 41, 56), float("nan"), dtype=torch.bfloat16)
    view = buffer[:, :-1, :50].copy_(problem.logits)
    expected, grad = loss_and_grad(problem, backend)
    problem.logits = view
    got, strided_grad = loss_and_grad(problem, backend)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(grad, strided_grad)


@EACH_FUSED
def test_same_inputs_same_bits(backend):
    problem = draw(3, 200, 257, dtype=torch.bfloat16, masked=0.2)
    (a, grad_a), (b, grad_b) = (loss_and_grad(problem, backend) for _ in range(2))
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.gate, b.gate)
    assert torch.equal(grad_a, grad_b)


@EACH_FUSED
def test_int32_labels_and_other_mask_dtypes(backend):
    problem = draw(2, 30, 20, masked=0.3)
    expected, _ = loss_and_grad(problem, backend)
    problem.labels = problem.labels.int()
    problem.options["response_mask"] = problem.options["response_mask"].float()
    assert torch.equal(loss_and_grad(problem, backend)[0].loss, expected.loss)
