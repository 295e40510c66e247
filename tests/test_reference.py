"""The reference against formulas written out: what papers define and what trainers compute."""

from __future__ import annotations

import pytest
import torch
from support.judge import EACH_WIDE, loss_and_grad
from support.problems import draw
from torch import Tensor

from drift_gate import Clip, DriftGate, Reduction, gather_lse, opd_loss, token_log_probs


def agg_loss(
    loss: Tensor, mask: Tensor, mode: str, dp_size=1, batch_num_tokens=None,
    global_batch_size=None, loss_scale_factor=None,
) -> Tensor:  # fmt: skip
    """verl 0.9's reduction, from its documentation: [B, T] losses and mask to a scalar."""
    per_sequence = (loss * mask).sum(-1)
    tokens = mask.sum(-1)
    non_empty = (tokens > 0).sum()
    if mode == "token-mean":
        return per_sequence.sum() / (batch_num_tokens or mask.sum()) * dp_size
    if mode == "token-sum":
        return per_sequence.sum() * dp_size
    if mode == "seq-mean-token-mean":
        per_sequence = per_sequence / (tokens + 1e-8)
    mean = per_sequence.sum() / (global_batch_size or non_empty) * dp_size
    if mode == "seq-mean-token-sum-norm":
        return mean / (loss_scale_factor or mask.shape[-1])
    return mean


def vanilla_ppo(new: Tensor, old: Tensor, advantage: Tensor, low=0.2, high=0.2, c=3.0) -> Tensor:
    """PPO with dual clip, position by position (arXiv 1912.09729, equation 5)."""
    out = torch.empty_like(new)
    for i in range(new.numel()):
        ratio = (new[i] - old[i]).clamp(-20, 20).exp()
        kept = min(ratio * advantage[i], ratio.clamp(1 - low, 1 + high) * advantage[i])
        out[i] = -max(kept, c * advantage[i]) if advantage[i] < 0 else -kept
    return out


@EACH_WIDE
@pytest.mark.parametrize("sizes", [{}, {"batch_num_tokens": 77, "global_batch_size": 5,
                                        "dp_size": 2, "loss_scale_factor": 33}])  # fmt: skip
@pytest.mark.parametrize(
    "mode",
    [
        "token-mean",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "seq-mean-token-mean",
    ],
)
def test_the_reduction_is_verls_agg_loss(mode, sizes, backend):
    problem = draw(4, 30, 20, masked=0.4).to(torch.float64)
    problem.options["response_mask"][1] = False
    result = opd_loss(
        *problem.arguments(), **problem.options, reduction=Reduction(mode, **sizes), backend=backend
    )
    mask = problem.options["response_mask"].double()
    if mode in ("token-mean", "token-sum"):
        sizes = {name: value for name, value in sizes.items() if name != "global_batch_size"}
    expected = agg_loss(result.token_loss, mask, mode, **sizes)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)


@EACH_WIDE
def test_ppo_is_the_clipped_surrogate_of_the_frozen_advantage(backend):
    problem = draw(1, 300, 20, drift=1.5).to(torch.float64)
    result = opd_loss(
        *problem.arguments(), gate=None, reduction="none", clip=Clip(dual=1.5), backend=backend
    )
    old, teacher = problem.old_log_probs[0], problem.teacher_log_probs[0]
    new = problem.logits[0].log_softmax(-1).gather(1, problem.labels[0][:, None])[:, 0]
    torch.testing.assert_close(result.log_probs[0], new)
    torch.testing.assert_close(result.drift[0], old - new)
    expected = vanilla_ppo(new, old, teacher - old, c=1.5)
    torch.testing.assert_close(result.loss[0], expected)
    ratio, advantage = (new - old).exp(), teacher - old
    held = -advantage * ratio.clamp(0.8, 1.2)
    clipped = (held > -advantage * ratio).double().mean()
    torch.testing.assert_close(result.metrics["pg_clipfrac"], clipped)
    torch.testing.assert_close(result.metrics["ppo_kl"], (old - new).clamp(-20, 20).mean())


@EACH_WIDE
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_are_verls_kl_penalty_with_the_teacher_as_reference(estimator, backend):
    """Value and gradient; large gaps reach k3's clamps (20 on the log-ratio, 10 on the value)."""
    problem = draw(1, 200, 30, drift=1.0).to(torch.float64)
    problem.teacher_log_probs[0, :50] += torch.linspace(-25, 25, 50)
    result, grad = loss_and_grad(
        problem, backend, torch.ones(1, 200, dtype=torch.float64),
        gate=None, estimator=estimator, reduction="none",
    )  # fmt: skip
    z = problem.logits.clone().requires_grad_()
    new = z.log_softmax(-1).gather(-1, problem.labels[..., None])[..., 0]
    gap = problem.teacher_log_probs - new
    if estimator == "k1":
        expected = -gap
    elif estimator == "k2":
        expected = 0.5 * gap.square()
    else:
        bounded = gap.clamp(min=-20, max=20)
        expected = (bounded.exp() - bounded - 1).clamp(min=-10, max=10)
    torch.testing.assert_close(result.token_loss, expected.detach())
    (expected_grad,) = torch.autograd.grad(expected.sum(), z)
    torch.testing.assert_close(grad, expected_grad)


@EACH_WIDE
def test_importance_is_the_unclipped_surrogate(backend):
    problem = draw(1, 100, 20, drift=1.5).to(torch.float64)
    _, labels, old, teacher = problem.arguments()
    result = opd_loss(
        *problem.arguments(), gate=None, estimator="importance", clip=Clip(advantage=0.7),
        reduction="none", temperature=1.7, backend=backend,
    )  # fmt: skip
    new = (problem.logits / 1.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected = -(teacher - old).clamp(-0.7, 0.7) * (new - old).exp()
    torch.testing.assert_close(result.loss, expected)


@EACH_WIDE
def test_the_gated_loss_is_the_weighted_one(backend):
    """Gating the advantage gates the loss: PPO's clips are homogeneous in it."""
    problem = draw(2, 100, 20, drift=1.0, masked=0.2).to(torch.float64)
    common = {**problem.options, "backend": backend, "reduction": "none"}
    gated = opd_loss(*problem.arguments(), gate=DriftGate(block_size=16), **common)
    plain = opd_loss(*problem.arguments(), gate=None, **common)
    torch.testing.assert_close(gated.loss, gated.gate * plain.loss)
    advantage = gated.gate * (problem.teacher_log_probs - problem.old_log_probs)
    moved = opd_loss(
        *problem.arguments()[:3], problem.old_log_probs + advantage, gate=None, **common
    )
    valid = problem.options["response_mask"]
    torch.testing.assert_close(gated.loss[valid], moved.loss[valid])


@EACH_WIDE
def test_gather_lse_and_token_log_probs(backend):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 6, 40, dtype=torch.float64, generator=generator).requires_grad_()
    ids = torch.randint(40, (2, 6, 3), generator=generator)
    picked, lse = gather_lse(z, ids, temperature=0.5, backend=backend)
    torch.testing.assert_close(picked, (2 * z).gather(-1, ids))
    torch.testing.assert_close(lse, (2 * z).logsumexp(-1))
    log_probs, entropy = token_log_probs(
        z, ids[..., 0], temperature=0.5, return_entropy=True, backend=backend
    )
    log_p = (2 * z).log_softmax(-1)
    torch.testing.assert_close(log_probs, log_p.gather(-1, ids[..., :1])[..., 0])
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).detach())
    assert torch.autograd.gradcheck(
        lambda x: gather_lse(x, ids, temperature=0.5, backend=backend), (z,), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda x: token_log_probs(x, ids[..., 0], backend=backend)[0], (z,), fast_mode=True
    )


def test_a_users_own_loss_over_gather_lse():
    """Cross entropy with label smoothing over three words, as ten lines of PyTorch write it."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 300, generator=generator).requires_grad_()
    ids = torch.rand(50, 300, generator=generator).topk(3).indices
    picked, lse = gather_lse(z, ids)
    loss = (lse - picked @ torch.tensor([0.8, 0.1, 0.1])).mean()
    target = torch.zeros(50, 300).scatter(1, ids, torch.tensor([0.8, 0.1, 0.1]).expand(50, 3))
    expected = torch.nn.functional.cross_entropy(z, target)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(got, torch.autograd.grad(expected, z)[0])
