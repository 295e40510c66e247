"""The reference's options for the sampled token and for rows, against formulas written out.

They are those of the trainers and papers named. In float64, the truth of the other tests; a
formula's gradient counts as its value.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.formulas import (
    GATE,
    B,
    T,
    V,
    assert_loss,
    listed,
    log_probs_of,
    masked_mean,
    sampled,
    with_leaf,
)
from torch import Tensor

from drift_gate import Clip, Head, LossOutput, Reduction, reference
from drift_gate.gate import Granularity

# --- ratios and surrogates ----------------------------------------------------------------------


def test_ratio_of_a_sequence_is_verls_gspo():
    """compute_policy_loss_gspo: r = exp(sg(mean) + logp - sg(logp)), PPO's clip, no dual clip."""
    arguments, _ = with_leaf(sampled())
    output = reference.opd_loss(
        **arguments, gate=None, ratio="sequence", clip=Clip(0.03, 0.04, dual=None),
        reduction="seq-mean-token-mean",
    )  # fmt: skip
    mask, old = arguments["response_mask"].double(), arguments["old_log_probs"]
    log_prob = log_probs_of(arguments)
    advantages = arguments["teacher_log_probs"] - old
    lengths = mask.sum(-1)
    mean = ((log_prob - old) * mask).sum(-1) / lengths
    ratio = (log_prob - log_prob.detach() + mean.detach()[:, None]).exp()
    worse = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.97, 1.04))
    expected = ((worse * mask).sum(-1) / (lengths + 1e-8)).mean()
    assert_loss(output, arguments, expected)
    clipped = -advantages * ratio.clamp(0.97, 1.04) > -advantages * ratio
    torch.testing.assert_close(output.metrics["pg_clipfrac"], masked_mean(clipped.double(), mask))
    assert 0 < output.metrics["pg_clipfrac"] < 1


@pytest.mark.parametrize(("ratio", "size"), [("block", 8), ("span", 5), ("sequence", T)])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_ratios_of_blocks_and_spans(ratio: Granularity, size: int, gated: bool):
    """Each unit by hand; blocks are of the gate's size, and of 64 positions without one."""
    arguments, _ = with_leaf(sampled())
    spans = (torch.arange(T) // size).expand(B, T)
    size = 64 if ratio == "block" and not gated else size
    output = reference.opd_loss(
        **arguments, gate=GATE if gated else None, ratio=ratio, estimator="importance",
        span_ids=spans, reduction="none",
    )  # fmt: skip
    mask, old = arguments["response_mask"], arguments["old_log_probs"]
    log_prob = log_probs_of(arguments)
    expected = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        first = int(mask[b].nonzero()[0]) if ratio == "block" else 0
        for start in range(first - size, T, size):
            unit = [t for t in range(max(start, 0), min(start + size, T)) if mask[b, t]]
            if unit:
                gap = (log_prob - old)[b, unit]
                ratio_ = (gap.mean().detach() + gap - gap.detach()).exp()
                advantage = (arguments["teacher_log_probs"] - old)[b, unit]
                expected = expected.index_put(
                    (torch.tensor(b), torch.tensor(unit)), -advantage * ratio_
                )
    assert_loss(output._replace(loss=output.loss.sum()), arguments, (output.gate * expected).sum())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_ratio_is_held_within_20_nats(ratio: str, sign: int):
    arguments, leaf = with_leaf(sampled())
    arguments["old_log_probs"] = arguments["old_log_probs"] - sign * 40
    output = reference.opd_loss(
        **arguments, gate=None, estimator="importance", reduction="none", ratio=ratio,
        advantages=torch.ones(B, T),
    )  # fmt: skip
    of_valid = output.loss[arguments["response_mask"]]
    torch.testing.assert_close(of_valid, torch.full_like(of_valid, -math.exp(sign * 20)))
    (grad,) = torch.autograd.grad(output.loss.sum(), leaf)
    assert (grad == 0).all()


def test_cispo_as_verl_computes_it():
    """compute_policy_loss_cispo: -sg(clip(r)) A logp; MiniMax-M1, arXiv 2506.13585, equation 4."""
    arguments, _ = with_leaf(sampled())
    output = reference.opd_loss(**arguments, gate=None, estimator="cispo", clip=Clip(0.1, 0.28))
    mask, old = arguments["response_mask"].double(), arguments["old_log_probs"]
    log_prob = log_probs_of(arguments)
    ratio = (log_prob - old).clamp(-20, 20).exp()
    clipped = ratio.clamp(0.9, 1.28)
    advantages = arguments["teacher_log_probs"] - old
    assert_loss(output, arguments, masked_mean(-clipped.detach() * advantages * log_prob, mask))
    fraction = masked_mean((ratio != clipped).double(), mask)
    torch.testing.assert_close(output.metrics["pg_clipfrac"], fraction)


def test_without_the_dual_clip_the_loss_is_that_of_ppo():
    arguments, _ = with_leaf(sampled())
    old = arguments["old_log_probs"] = arguments["old_log_probs"] - 2  # ratios beyond 3
    advantages = torch.linspace(-1, 1, B * T, dtype=torch.float64).view(B, T)
    options = {"gate": None, "advantages": advantages}
    output = reference.opd_loss(**arguments, **options, clip=Clip(dual=None))
    ratio = (log_probs_of(arguments) - old).exp()
    kept = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    assert_loss(output, arguments, masked_mean(-kept, arguments["response_mask"].double()))
    assert reference.opd_loss(**arguments, **options).loss < output.loss


def test_k3_without_bounds():
    arguments, _ = with_leaf(sampled())
    arguments["teacher_log_probs"] = arguments["teacher_log_probs"] + 4  # some beyond k3 = 10
    output = reference.opd_loss(
        **arguments, gate=None, estimator="k3", clip=Clip(kl=False), reduction="token-sum"
    )
    gap = arguments["teacher_log_probs"] - log_probs_of(arguments)
    k3 = gap.exp() - gap - 1
    assert (k3[arguments["response_mask"]] > 10).any()
    assert_loss(output, arguments, (k3 * arguments["response_mask"]).sum())


# --- advantages ---------------------------------------------------------------------------------


def test_refreshed_advantage():
    """AsyncOPD, arXiv 2606.24143: the teacher beside the student of this step, not of sampling."""
    arguments, _ = with_leaf(sampled())
    output = reference.opd_loss(**arguments, gate=None, advantage="current")
    log_prob = log_probs_of(arguments)
    ratio = (log_prob - arguments["old_log_probs"]).exp()
    advantage = (arguments["teacher_log_probs"] - log_prob).detach()
    worse = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    worse = torch.where(advantage < 0, torch.minimum(worse, -3.0 * advantage), worse)
    assert_loss(output, arguments, masked_mean(worse, arguments["response_mask"].double()))


def test_the_callers_advantages_make_a_gated_grpo():
    arguments, _ = with_leaf(sampled())
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    advantages = ((rewards - rewards.mean()) / rewards.std())[:, None].expand(B, T)
    arguments["teacher_log_probs"] = None
    output = reference.opd_loss(
        **arguments, gate=GATE, advantages=advantages, clip=Clip(dual=None, advantage=(-0.5, 1.0))
    )
    log_prob, old = log_probs_of(arguments), arguments["old_log_probs"]
    weights = reference.gate_weights(
        log_prob, old, GATE, response_mask=arguments["response_mask"]
    ).weights
    ratio, bounded = (log_prob - old).exp(), advantages.clamp(-0.5, 1.0)
    kept = torch.minimum(ratio * bounded, ratio.clamp(0.8, 1.2) * bounded)
    assert_loss(
        output, arguments, masked_mean(-kept * weights, arguments["response_mask"].double())
    )


@pytest.mark.parametrize("estimator", ["ppo", "importance", "cispo"])
def test_without_old_log_probs_the_update_is_on_policy(estimator: str):
    """REINFORCE with the advantage teacher - logp: one gradient for all three."""
    arguments, leaf = with_leaf(sampled())
    arguments["old_log_probs"] = None
    output = reference.opd_loss(**arguments, gate=None, estimator=estimator)
    log_prob, mask = log_probs_of(arguments), arguments["response_mask"].double()
    advantage = (arguments["teacher_log_probs"] - log_prob).detach()
    (got,) = torch.autograd.grad(output.loss, leaf)
    (expected,) = torch.autograd.grad(masked_mean(-advantage * log_prob, mask), leaf)
    torch.testing.assert_close(got, expected)
    assert (output.drift == 0).all()


def test_the_least_log_prob_of_the_teacher():
    arguments, _ = with_leaf(sampled())
    mask = arguments["response_mask"]
    arguments["teacher_log_probs"][0, :4] = -torch.inf
    floor = float(arguments["teacher_log_probs"][mask].median())
    output = reference.opd_loss(**arguments, gate=None, estimator="k2", teacher_log_prob_min=floor)
    below = arguments["teacher_log_probs"] < floor
    teacher = torch.where(below, floor, arguments["teacher_log_probs"])
    k2 = 0.5 * (log_probs_of(arguments) - teacher).square()
    assert_loss(output, arguments, masked_mean(k2, mask.double()))
    assert output.metrics["floored"] == (below & mask).sum() > 0


# --- row weights, and batches of nothing --------------------------------------------------------


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "token-sum", "none"])
def test_row_weights_come_after_the_unit_mean_and_do_not_count(mode: str):
    """Truncated importance sampling (min(p_train / p_rollout, C), as verl's rollout_is_weights)."""
    arguments, _ = with_leaf(sampled())
    v = (2 * torch.rand(B, T, generator=torch.Generator().manual_seed(1))).double().clamp(max=1.5)
    output = reference.opd_loss(**arguments, gate=GATE, row_weights=v, reduction=mode)
    plain = reference.opd_loss(**arguments, gate=GATE, reduction="none")
    mask = arguments["response_mask"]
    torch.testing.assert_close(output.gate, plain.gate)
    torch.testing.assert_close(output.metrics["gate_max"], plain.metrics["gate_max"])
    weighed = v * plain.loss
    expected = {
        "token-mean": weighed.sum() / mask.sum(),
        "seq-mean-token-mean": (weighed.sum(-1) / (mask.sum(-1) + 1e-8)).mean(),
        "token-sum": weighed.sum(),
        "none": weighed,
    }[mode]
    torch.testing.assert_close(output.loss, expected)
    (got,) = torch.autograd.grad(output.loss.sum(), arguments["logits"])
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum(), arguments["logits"])[0])


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_rows_of_weight_0_hold_anything_and_count(linear: bool):
    """Exact zeros in loss and gradients, also of a head; a NaN in the gate would reach all rows."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(B, T, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(V, 4, dtype=torch.float64, generator=generator)
    rest = [sampled()[name] for name in ("labels", "old_log_probs", "teacher_log_probs")]
    v = torch.ones(B, T)
    v[:, ::3] = 0

    def run(row_weights: Tensor, poison: float) -> tuple[LossOutput, list[Tensor]]:
        poisoned = torch.where(row_weights[..., None] == 0, poison * hidden, hidden)
        leaves = [poisoned, weight] if linear else [poisoned @ weight.T]
        leaves = [x.clone().requires_grad_() for x in leaves]
        function = reference.linear_opd_loss if linear else reference.opd_loss
        out = function(*leaves, *rest, gate=None, row_weights=row_weights)
        return out, list(torch.autograd.grad(out.loss, leaves))

    clean, grads = run(v, 1.0)
    dirty, dirty_grads = run(v, math.nan)
    torch.testing.assert_close(dirty.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(dirty.token_loss, clean.token_loss, rtol=0, atol=0)
    for got, expected in zip(dirty_grads, grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert (dirty_grads[0][:, ::3] == 0).all() and (dirty.token_loss[:, ::3] == 0).all()
    everything, _ = run(torch.ones(B, T), 1.0)
    torch.testing.assert_close(clean.loss * (B * T), everything.token_loss[v != 0].sum())
    assert dirty.metrics["ppo_kl"].isnan()  # they count in the metrics
    torch.testing.assert_close(clean.metrics["ppo_kl"], everything.metrics["ppo_kl"])


@pytest.mark.parametrize("size", [None, 7, torch.tensor(0.0), torch.tensor([0])])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_a_batch_without_valid_rows_is_0_over_anything(mode: str, size: Any):
    arguments, leaf = with_leaf(sampled() | {"response_mask": torch.zeros(B, T)})
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    output = reference.opd_loss(**arguments, gate=GATE, reduction=Reduction(mode, **{name: size}))
    (grad,) = torch.autograd.grad(output.loss, leaf)
    assert output.loss == 0 and output.loss.shape == () and (grad == 0).all()
    assert all(value == 0 for value in output.metrics.values())


@pytest.mark.parametrize("form", ["opd", "topk", "full"])
def test_a_head_is_the_product_that_makes_the_logits(form: str):
    """With every option of the head; the gradients of hidden states, weight and bias too."""
    generator = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    leaves = [x.requires_grad_() for x in (normal(B, T, 4), normal(V, 4), normal(V))]
    head = Head(leaves[1], leaves[2], softcap=3.0, logit_scale=0.5)
    logits = 0.5 * 3 * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / 3)
    arguments = listed()
    rows = [arguments["labels"], arguments["old_log_probs"]]
    common = {"gate": GATE, "temperature": 0.7, "response_mask": sampled()["response_mask"]}
    if form == "opd":
        teacher = wanted = [normal(B, T)]
    elif form == "topk":
        teacher = wanted = [arguments["teacher_topk_ids"], arguments["teacher_topk_log_probs"]]
    else:
        teacher = [normal(B, T, 2), Head(normal(V + 3, 2), softcap=2.0)]
        wanted = [2 * torch.tanh(teacher[0] @ teacher[1].weight.T / 2)]
        common["vocab_size"] = V
    got = getattr(reference, f"linear_{form}_loss")(leaves[0], head, *rows, *teacher, **common)
    expected = getattr(reference, f"{form}_loss")(logits, *rows, *wanted, **common)
    assert got.token_loss.requires_grad == (form == "topk")  # as its support is renormalised
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(x.loss, leaves) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
