"""`drift_gate.integrations.skyrl` in SkyRL's own registry, with its configuration, on the CPU.

`make test-integrations` lays SkyRL beside the pinned set; without it these tests are skipped.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import cloudpickle
import pytest
import torch

from support.skyrl_loading import ppo_utils  # isort: skip  (skips where there is no SkyRL)
from skyrl.backends.skyrl_train.utils.torch_utils import logprobs_from_logits
from skyrl.train.config import AlgorithmConfig
from support.trainer_memory import ROWS, WORDS, step_peaks

import drift_gate as dg
from drift_gate.integrations import skyrl as integration

BATCH, LENGTH, VOCAB = 4, 7, 31
GATE = dg.DriftGate(block_size=2, tau=1.5)
LONGEST = 9  # max_seq_len
# Each of SkyRL's losses and reductions as the package has it.
SAME = {
    "regular": dict(estimator="ppo", clip=dg.Clip(0.15, 0.25, None)),
    "dual_clip": dict(estimator="ppo", clip=dg.Clip(0.15, 0.25, 1.6)),
    "gspo": dict(estimator="ppo", ratio="sequence", clip=dg.Clip(0.15, 0.25, None)),
    "cispo": dict(estimator="cispo", clip=dg.Clip(0.4, 0.5, None)),
}
REDUCTIONS = {
    "token_mean": dg.Reduction("token-mean"),
    "sequence_mean": dg.Reduction("seq-mean-token-mean"),
    "seq_mean_token_sum_norm": dg.Reduction("seq-mean-token-sum-norm", loss_scale_factor=LONGEST),
}


def algorithm(loss: str, **options: Any) -> AlgorithmConfig:
    config = AlgorithmConfig(
        policy_loss_type=loss, eps_clip_low=0.15, eps_clip_high=0.25, clip_ratio_c=1.6, **options
    )
    config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high = 0.4, 0.5
    return config


class Case:
    """A mini-batch in float64, whose sums over losses of both signs float32 would blur."""

    def __init__(self, drift: float = 0.8) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.logits = (draw(BATCH, LENGTH, VOCAB) * 2).requires_grad_()
        self.labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        now = dg.token_log_probs(self.logits.detach(), self.labels)[0]
        self.old = now + drift * draw(BATCH, LENGTH)
        self.rollout = self.old + 0.5 * draw(BATCH, LENGTH)
        self.advantages = draw(BATCH, LENGTH)
        self.mask = torch.arange(LENGTH) < torch.tensor([7, 4, 6, 5])[:, None]
        self.mask[0, 2] = False  # a tool's token

    def through_skyrl(self, name: str, config: AlgorithmConfig, rollout: bool = False):
        """Loss, metrics and gradient of the logits, as a worker of SkyRL computes them."""
        advantages = ppo_utils.apply_loss_reduction_to_advantages_minibatch(
            self.advantages, self.mask.double(), config.loss_reduction, BATCH, LONGEST
        )
        log_probs = self.logits.log_softmax(-1).gather(-1, self.labels[..., None])[..., 0]
        loss, metrics = ppo_utils.PolicyLossRegistry.get(name)(
            log_probs, self.old, advantages, config=config, loss_mask=self.mask.long(),
            rollout_logprobs=self.rollout if rollout else None,
        )  # fmt: skip
        return loss.detach(), metrics, torch.autograd.grad(loss, self.logits)[0]

    def direct(self, loss: str, reduction: str, **options: Any):
        result = dg.opd_loss(
            self.logits, self.labels, self.old, None, advantages=self.advantages,
            response_mask=self.mask, reduction=REDUCTIONS[reduction], **SAME[loss], **options,
        )  # fmt: skip
        return result.loss.detach(), torch.autograd.grad(result.loss, self.logits)[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", SAME)
def test_without_tau_it_is_skyrl_s_own(registered, loss, reduction):
    """Every bit of loss, metrics and gradient."""
    case = Case()
    name = registered("ungated", loss, gate=dg.DriftGate(tau=0.0))
    config = algorithm(loss, loss_reduction=reduction)
    expected, metrics, gradient = case.through_skyrl(loss, config)
    config = algorithm(name, loss_reduction=reduction)
    found = case.through_skyrl(name, config)
    assert config.policy_loss_type == name
    assert torch.equal(found[0], expected)
    assert gradient.abs().max() > 1e-3 and torch.equal(found[2], gradient)
    assert {x: found[1][x] for x in metrics} == metrics
    assert metrics["clip_ratio"] > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", SAME)
def test_gated_it_is_the_package_s(registered, loss, reduction):
    case = Case()
    name = registered("gated", loss, gate=GATE)
    config = algorithm(name, loss_reduction=reduction)
    found, metrics, gradient = case.through_skyrl(name, config)
    expected, expected_gradient = case.direct(loss, reduction, gate=GATE)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["gate_min"] < 0.8 < 1.2 < metrics["gate_max"]
    stock = case.through_skyrl(loss, algorithm(loss, loss_reduction=reduction))[1]
    assert metrics["clip_ratio"] == stock["clip_ratio"]  # of the ratios, not of weighed losses


@pytest.mark.parametrize("loss", SAME)
def test_importance_weights_of_the_sampler_are_row_weights(loss):
    """SkyRL's off-policy correction, on top of the gate that the registered names have."""
    case = Case()
    config = algorithm(f"gated_{loss}")
    correction = config.off_policy_correction
    correction.tis_ratio_type, correction.token_tis_ratio_clip_high = "token", 1.3
    found, metrics, gradient = case.through_skyrl(f"gated_{loss}", config, rollout=True)
    weights = (case.old - case.rollout).float().exp().double().clamp(max=1.3)
    expected, expected_gradient = case.direct(loss, "token_mean", row_weights=weights)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["tis_token_clip_high_ratio"] > 0


def test_without_a_mask_all_positions_count(registered):
    case = Case()
    name = registered("whole", "regular", gate=GATE)
    case.mask = torch.ones_like(case.mask)
    log_probs = dg.token_log_probs(case.logits.detach(), case.labels)[0]
    loss, _ = ppo_utils.PolicyLossRegistry.get(name)(
        log_probs, case.old, case.advantages, config=algorithm(name)
    )
    expected, _ = case.direct("regular", "token_mean", gate=GATE)
    torch.testing.assert_close(loss / case.mask.numel(), expected)


def test_it_travels_to_the_workers(registered, monkeypatch):
    """SkyRL's registry pickles functions by value: a worker need not import the module."""
    name = registered("pickled", "dual_clip", gate=GATE)
    here = ppo_utils.PolicyLossRegistry._functions
    expected = Case().through_skyrl(name, algorithm(name))
    pickled = cloudpickle.dumps(here[name])
    monkeypatch.setitem(sys.modules, integration.__name__, None)
    here[name] = cloudpickle.loads(pickled)
    found = Case().through_skyrl(name, algorithm(name))
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@pytest.mark.slow
def test_peak_memory_beside_skyrl_s_own():
    """From logits, log-probs by SkyRL: the gate adds numbers of positions, nothing of [N, V]."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(WORDS, (1, ROWS), generator=generator)
    old, advantages = torch.randn(2, 1, ROWS, generator=generator).sub(10)
    mask = torch.ones(1, ROWS)

    def step(name):
        def loss(logits):
            log_probs = logprobs_from_logits(logits[None], labels)
            policy = ppo_utils.PolicyLossRegistry.get(name)
            return policy(log_probs, old, advantages, config=algorithm(name), loss_mask=mask)[0]

        return loss

    peaks = step_peaks("SkyRL", {name: step(name) for name in ("regular", "gated_regular")})
    assert peaks["gated_regular"] < peaks["regular"] + 0.1


def test_what_is_not_supported_says_so(registered):
    with pytest.raises(
        ValueError, match="loss must be one of regular, dual_clip, gspo, cispo; got"
    ):
        registered("other", "clip_cov")
    with pytest.raises(ValueError, match="gate granularity must be one of block, token, sequence"):
        registered("lines", "regular", gate=dg.DriftGate("span"))
    with pytest.raises(TypeError, match=r"gate must be a DriftGate \('gspo' is SkyRL's ungated"):
        registered("none", "gspo", gate=None)
    with pytest.raises(ValueError, match="'gated_gspo' already registered"):
        integration.register("gated_gspo", "gspo")


@pytest.mark.parametrize("missing", ["the package", "a function", "the version"])
def test_a_missing_or_other_skyrl_is_named(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, integration.__name__)
    if missing == "the package":
        monkeypatch.setitem(sys.modules, "skyrl", None)
    elif missing == "a function":
        monkeypatch.delattr(ppo_utils, "register_policy_loss")
    else:
        monkeypatch.setattr("skyrl.__version__", "0.40.0")
    wanted = r"drift_gate.integrations.skyrl needs skyrl 0.4: pip install 'skyrl==0.4.\*'; got .+"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module(integration.__name__)


@pytest.fixture
def registered(monkeypatch):
    """`register` under a name that lasts for one test."""
    registry = ppo_utils.PolicyLossRegistry
    monkeypatch.setattr(registry, "_functions", dict(registry._functions))

    def register(name, loss, **options):
        integration.register(f"test_{name}", loss, **options)
        return f"test_{name}"

    return register
