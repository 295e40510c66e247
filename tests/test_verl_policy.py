"""Gated policy losses in verl's registry, through its own `ppo_loss`, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("support.verl_loading", reason="needs verl: pip install 'drift-gate[verl]'")

from support.trainer_memory import ROWS, WORDS, step_peaks
from support.verl_cases import AGG_MODES, SIZES, Case, draw
from verl.trainer.ppo import core_algos
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import drift_gate as dg
from drift_gate.integrations import verl as integration

GATE = dg.DriftGate(block_size=2, tau=1.5)
CLIPS = dict(clip_ratio_low=0.15, clip_ratio_high=0.25, clip_ratio_c=1.6)
# Each of verl's losses as the package has it.
SAME = {
    "vanilla": dict(estimator="ppo", clip=dg.Clip(0.15, 0.25, 1.6)),
    "gspo": dict(estimator="ppo", ratio="sequence", clip=dg.Clip(0.15, 0.25, None)),
    "cispo": dict(estimator="cispo", clip=dg.Clip(0.15, 0.25, None)),
}


def weighed(case: Case) -> torch.Tensor:
    """verl's importance weights beside the case: some 0, as after its rejection."""
    weights = torch.rand(case.old.shape, generator=torch.Generator().manual_seed(3)) * 2
    weights[weights < 0.5] = 0
    case.data["rollout_is_weights"] = weights
    return weights


def doubled(case: Case) -> Case:
    """In float64: sums of losses of both signs lose float32's last digits."""
    for name in ("old_log_probs", "advantages", "rollout_is_weights"):
        if name in case.data:
            case.data[name] = case.data[name].double()
    logits = case.logits.detach().double().requires_grad_()
    return case._replace(logits=logits, old=case.old.double())


def actor(mode: str, agg_mode: str) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=agg_mode,
        policy_loss=PolicyLossConfig(loss_mode=mode), **CLIPS,
    )  # fmt: skip


def through_verl(case: Case, mode: str, agg_mode: str):
    """Loss, metrics and gradient of the logits of verl's `ppo_loss`."""
    config = actor(mode, agg_mode)
    packed, offsets = case.data["input_ids"].values(), case.data["input_ids"].offsets()
    log_probs = logprobs_from_logits(case.logits[0], packed.roll(-1), inplace_backward=False)
    output = {"log_probs": torch.nested.nested_tensor_from_jagged(log_probs, offsets)}
    loss, metrics = ppo_loss(config, output, case.data)
    (gradient,) = torch.autograd.grad(loss, case.logits)
    return loss.detach(), {name: x.aggregate() for name, x in metrics.items()}, gradient


def padded(x: torch.Tensor) -> torch.Tensor:
    return x.to_padded_tensor(0.0) if x.is_nested else x


def direct(case: Case, loss: str, agg_mode: str, **options: Any):
    """The package's own loss of these advantages, and its gradient."""
    result = dg.opd_loss(
        case.response(case.logits[0]), case.labels, case.old, None,
        advantages=padded(case.data["advantages"]), response_mask=case.mask,
        reduction=dg.Reduction(agg_mode, **SIZES), **SAME[loss], **options,
    )  # fmt: skip
    return result.loss.detach(), torch.autograd.grad(result.loss, case.logits)[0]


@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("loss", SAME)
def test_without_drift_or_tau_it_is_verl_s_own(registered, loss, agg_mode, rollout):
    """Every bit of loss, metrics and gradient, at tau = 0."""
    case = draw(drift=0.8)
    if rollout:
        weighed(case)
    expected, metrics, gradient = through_verl(case, loss, agg_mode)
    mode = registered("ungated", loss, gate=dg.DriftGate(tau=0.0))
    found = through_verl(case, mode, agg_mode)
    assert torch.equal(found[0], expected)
    assert gradient.abs().max() > 1e-3 and torch.equal(found[2], gradient)
    assert {name: found[1][name] for name in metrics} == metrics
    assert metrics["actor/pg_clipfrac"] > 0


@pytest.mark.parametrize("rollout", [False, True])
@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize("loss", SAME)
def test_gated_it_is_the_package_s(registered, loss, agg_mode, rollout):
    case = draw(jagged=True, drift=0.8)
    weights = weighed(case) if rollout else None
    case = doubled(case)
    mode = registered("gated", loss, gate=GATE)
    found, metrics, gradient = through_verl(case, mode, agg_mode)
    expected, expected_gradient = direct(case, loss, agg_mode, gate=GATE, row_weights=weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["actor/gate_min"] < 0.8 < 1.2 < metrics["actor/gate_max"]
    # What verl says of its clips is of the ratios, not of the weighed losses.
    stock = through_verl(case, loss, agg_mode)[1]
    assert all(metrics[x] == stock[x] for x in stock if x != "actor/pg_loss")
    assert metrics["actor/pg_loss"] != stock["actor/pg_loss"]


@pytest.mark.parametrize("loss", SAME)
def test_the_registered_names_have_the_paper_s_gate(loss):
    case = draw(drift=0.8)
    found, metrics, _ = through_verl(case, f"gated_{loss}", "token-mean")
    expected, _ = direct(case, loss, "token-mean", gate=dg.DriftGate())
    torch.testing.assert_close(found, expected)
    gated = dg.gate_weights(
        case.response(case.logits[0]).log_softmax(-1).gather(-1, case.labels[..., None])[..., 0],
        case.old,
        response_mask=case.mask,
    )
    for name, value in gated.metrics.items():
        torch.testing.assert_close(torch.tensor(metrics[f"actor/{name}"]).float(), value)


def test_a_micro_batch_without_tokens(registered):
    case = draw()
    case.data["response_mask"] = torch.zeros_like(case.mask, dtype=torch.long)
    mode = registered("empty", "vanilla", gate=GATE)
    loss, _, gradient = through_verl(case, mode, "token-mean")
    assert loss == 0 and not gradient.any()


@pytest.mark.slow
def test_peak_memory_beside_verl_s_own():
    """From logits, log-probs by verl: the gate adds numbers of positions, nothing of [N, V]."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(WORDS, (ROWS,), generator=generator)
    old, advantages = torch.randn(2, 8, ROWS // 8, generator=generator).sub(10)
    mask = torch.ones(8, ROWS // 8, dtype=torch.bool)
    config = actor("vanilla", "token-mean")

    def step(mode):
        def loss(logits):
            log_probs = logprobs_from_logits(logits, labels, inplace_backward=False)
            return core_algos.get_policy_loss_fn(mode)(
                old, log_probs.view(8, -1), advantages, mask, config=config
            )[0]

        return loss

    peaks = step_peaks("verl, GRPO", {mode: step(mode) for mode in ("vanilla", "gated_vanilla")})
    assert peaks["gated_vanilla"] < peaks["vanilla"] + 0.1


def test_what_is_not_supported_says_so(registered):
    with pytest.raises(ValueError, match="loss must be one of vanilla, gspo, cispo; got 'kl_cov'"):
        registered("other", "kl_cov")
    with pytest.raises(ValueError, match="gate granularity must be one of block, token, sequence"):
        registered("lines", "vanilla", gate=dg.DriftGate("span"))
    with pytest.raises(TypeError, match=r"gate must be a DriftGate \('gspo' is verl's ungated"):
        registered("none", "gspo", gate=None)
    with pytest.raises(ValueError, match="Policy loss gated_gspo already registered"):
        integration.register_policy("gated_gspo", "gspo")


@pytest.fixture
def registered(monkeypatch):
    """`register_policy` under a name that lasts for one test."""
    monkeypatch.setattr(core_algos, "POLICY_LOSS_REGISTRY", dict(core_algos.POLICY_LOSS_REGISTRY))

    def register(name, loss, **options):
        integration.register_policy(f"test_{name}", loss, **options)
        return f"test_{name}"

    return register
