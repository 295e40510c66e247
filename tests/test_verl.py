"""`drift_gate.integrations.verl` under verl's own loss functions, on the CPU."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("support.verl_loading", reason="needs verl: pip install 'drift-gate[verl]'")

import verl.trainer.distillation.losses as losses
from support import verl_loading
from support.trainer_memory import ROWS, WORDS, step_peaks
from support.verl_cases import AGG_MODES, SIZES, Case, K, draw
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import ActorConfig, DistillationConfig, DistillationLossConfig

import drift_gate as dg
from drift_gate.integrations import verl as integration
from drift_gate.integrations.verl import Kind

GATE = dg.DriftGate(block_size=2, tau=1.5)


def configs(mode: str, agg_mode: str = "token-mean", **options: Any):
    actor = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode=agg_mode
    )
    base = dict(
        loss_mode=mode, topk=K, use_task_rewards=False, use_policy_gradient=False,
        loss_max_clamp=None, log_prob_min_clamp=None,
    )  # fmt: skip
    return actor, DistillationConfig(distillation_loss=DistillationLossConfig(**base | options))


def through_verl(case: Case, mode: str, agg_mode: str = "token-mean", **options: Any):
    """Loss, metrics, gradient of the logits, and the logits processor's outputs, as in its engine:
    `prepare_model_outputs` between the two calls of `distillation_ppo_loss`."""
    actor, distillation = configs(mode, agg_mode, **options)
    packed, offsets = case.data["input_ids"].values(), case.data["input_ids"].offsets()
    model_output, processed = {}, {}
    if distillation.distillation_loss.loss_settings.use_topk:
        processed = losses.distillation_ppo_loss(
            actor, distillation, student_logits=case.logits, data=case.data
        )
        for name, value in processed.items():
            assert value.shape == (1, len(packed))
            model_output[name] = torch.nested.nested_tensor_from_jagged(value[0], offsets)
    log_probs = logprobs_from_logits(case.logits[0], packed.roll(-1), inplace_backward=False)
    model_output["log_probs"] = torch.nested.nested_tensor_from_jagged(log_probs, offsets)
    loss, metrics = losses.distillation_ppo_loss(
        actor, distillation, model_output=model_output, data=case.data
    )
    (gradient,) = torch.autograd.grad(loss, case.logits)
    return loss.detach(), metrics, gradient, processed


def direct(case: Case, loss, *teacher: torch.Tensor, agg_mode: str = "token-mean", **options: Any):
    """Loss and gradient of the package's own function on the responses, padded."""
    logits = case.response(case.logits[0])
    result = loss(
        logits, case.labels, case.old, *(case.response(x) for x in teacher),
        response_mask=case.mask, reduction=dg.Reduction(agg_mode, **SIZES), **options,
    )  # fmt: skip
    return result.loss.detach(), torch.autograd.grad(result.loss, case.logits)[0]


def lists(case: Case):
    return case.data["teacher_ids"].values(), case.data["teacher_logprobs"].values()


def test_verl_loads_the_module_and_knows_its_losses():
    assert verl_loading.loaded
    assert losses.compute_topk_loss is integration.compute_topk_loss
    names = {"gated_opd", "gated_k1", "gated_k2", "gated_k3", "gated_lsm", "gated_forward_kl_topk"}
    assert names < losses.DISTILLATION_LOSS_REGISTRY.keys()


def test_the_case_is_aligned():
    """Rows of the packed batch that predict the responses: verl's own slicing and rolling."""
    case = draw()
    rolled = case.data["input_ids"].values().roll(-1)
    assert torch.equal(case.response(rolled)[case.mask], case.labels[case.mask])


@pytest.mark.parametrize("clamp", [None, -3.0])
def test_forward_top_k_is_verl_s_own_computation(clamp):
    """With verl's clamp of the log-probs, which at -3 holds most of the student's."""
    case = draw()
    stock, ours = (
        losses.distillation_ppo_loss(
            *configs(mode, log_prob_min_clamp=clamp), student_logits=case.logits, data=case.data
        )
        for mode in ("forward_kl_topk", "gated_forward_kl_topk")
    )
    for name in ("distillation_losses", "student_mass", "teacher_mass"):
        torch.testing.assert_close(ours[name], stock[name])
    upstream = torch.rand(stock["student_mass"].shape)
    gradients = [
        torch.autograd.grad((x["distillation_losses"] * upstream).sum(), case.logits)[0]
        for x in (stock, ours)
    ]
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("jagged", [False, True])
@pytest.mark.parametrize("agg_mode", AGG_MODES)
def test_ungated_forward_top_k_is_verl_s_loss(agg_mode, jagged):
    """On policy all gates are 1. verl holds the loss above 0; here it is there already."""
    case = draw(jagged=jagged, drift=0.0)
    loss, metrics, gradient, stock = through_verl(case, "forward_kl_topk", agg_mode)
    assert (case.response(stock["distillation_losses"][0])[case.mask] > 0).all()
    found = through_verl(case, "gated_forward_kl_topk", agg_mode)
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[2], gradient)
    for name in ("distillation/student_mass", "distillation/teacher_mass"):
        torch.testing.assert_close(found[1][name].aggregate(), metrics[name])


@pytest.mark.parametrize(
    "estimator, policy_gradient",
    [("k1", True), ("k2", True), ("k3", True), ("k2", False), ("k3", False)],
)
def test_ungated_estimators_are_verl_s_loss(estimator, policy_gradient):
    case = draw(estimator=True, drift=0.0)
    options = dict(use_policy_gradient=policy_gradient)
    loss, _, gradient, _ = through_verl(case, estimator, **options)
    found = through_verl(case, f"gated_{estimator}", **options)
    torch.testing.assert_close(found[0], loss)
    torch.testing.assert_close(found[2], gradient)


@pytest.mark.parametrize("jagged", [False, True])
@pytest.mark.parametrize("agg_mode", AGG_MODES)
@pytest.mark.parametrize(
    "name, kind",
    [("lsm", Kind("reverse", "renormalized", 0.5)), ("jsd", Kind("jsd", "truncated", 0.3))],
)
def test_gated_top_k_is_the_package_s_loss(registered, name, kind, agg_mode, jagged):
    case = draw(jagged=jagged)
    mode = registered(name, kind, gate=GATE)
    loss, metrics, gradient, _ = through_verl(case, mode, agg_mode)
    expected, expected_gradient = direct(
        case, dg.topk_loss, *lists(case), agg_mode=agg_mode, gate=GATE, direction=kind.direction,
        support=kind.support, beta=kind.beta,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert metrics["distillation/gate_min"].aggregate() < 0.8
    assert metrics["distillation/gate_max"].aggregate() > 1.2


@pytest.mark.parametrize("agg_mode", AGG_MODES)
def test_gated_advantages_are_a_gated_ppo_loss(registered, agg_mode):
    """PPO's clip and dual clip are homogeneous in the advantage: the gate passes through both."""
    case = draw(estimator=True, jagged=True, drift=0.8)
    mode = registered("opd", "opd", gate=GATE)
    loss, metrics, gradient, _ = through_verl(case, mode, agg_mode, use_policy_gradient=True)
    teacher = case.data["teacher_logprobs"].values()[:, 0]
    expected, expected_gradient = direct(
        case, dg.opd_loss, teacher, agg_mode=agg_mode, gate=GATE, estimator="ppo"
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    for part in ("pg_clipfrac", "pg_clipfrac_lower"):  # both clips bind somewhere
        assert metrics[f"distillation/{part}"] > 0


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gated_estimators_are_the_package_s_loss(registered, estimator):
    case = draw(estimator=True)
    mode = registered(estimator, estimator, gate=dg.DriftGate("span"), newline_ids=[5, 6])
    loss, _, gradient, _ = through_verl(case, mode)
    spans = dg.newline_spans(case.labels, [5, 6], response_mask=case.mask)
    teacher = case.data["teacher_logprobs"].values()[:, 0]
    expected, expected_gradient = direct(
        case, dg.opd_loss, teacher, gate=dg.DriftGate("span"), span_ids=spans, estimator=estimator
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_the_loss_s_clamp_comes_before_the_gate(registered):
    """And verl's own after it: where a gate exceeds 1, a clamped loss is clamped again."""
    case = draw()
    kind = Kind("reverse", "renormalized", 0.5)
    plain, gated = registered("plain", kind, gate=None), registered("clamped", kind, gate=GATE)
    values = case.response(through_verl(case, plain)[3]["distillation_losses"][0])
    now = case.response(case.logits[0].log_softmax(-1)).gather(-1, case.labels[..., None])[..., 0]
    weights = dg.gate_weights(now, case.old, GATE, response_mask=case.mask).weights
    expected = (values.clamp(max=0.5) * weights).clamp(max=0.5)[case.mask].sum() / 40 * 2
    assert (values[case.mask] > 0.5).any() and (values[case.mask] < 0.5).any()
    loss, *_ = through_verl(case, gated, loss_max_clamp=0.5)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("mode", ["gated_lsm", "gated_forward_kl_topk"])
def test_logits_overwritten_by_another_backward_do_no_harm(mode):
    """verl's log-probs may leave their gradient in the logits; with task rewards both are used."""
    case = draw(drift=0.0)
    actor, distillation = configs(mode, use_task_rewards=True)
    processed = losses.distillation_ppo_loss(
        actor, distillation, student_logits=case.logits, data=case.data
    )
    total = processed["distillation_losses"].sum()
    (expected,) = torch.autograd.grad(total, case.logits, retain_graph=True)
    case.logits.data.fill_(7.0)  # autograd does not see it: no version is bumped
    (found,) = torch.autograd.grad(total, case.logits)
    assert expected.abs().max() > 0.01
    assert torch.equal(found, expected)


def test_a_teacher_s_missing_words_are_left_out(registered):
    case = draw()
    kind = Kind("forward", "renormalized", 0.5)
    case.data["teacher_logprobs"].values()[:, -1] = -torch.inf
    loss, _, gradient, _ = through_verl(case, registered("missing", kind, gate=GATE))
    ids, log_probs = lists(case)
    expected, expected_gradient = direct(
        case, dg.topk_loss, ids[:, :-1], log_probs[:, :-1], gate=GATE, direction="forward"
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_other_modes_go_to_verl(monkeypatch):
    seen = []
    monkeypatch.setattr(integration, "stock_topk_loss", lambda *args: seen.append(args))
    actor, distillation = configs("forward_kl_topk")
    losses.compute_topk_loss(actor, distillation, {}, torch.zeros(1, 2, 3), "thd")
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gated_lsm", "gated_forward_kl_topk"])
def test_peak_memory_beside_verl_s_own(mode):
    """verl's forward top K makes a log_softmax of the logits; with its own, K = 64."""
    generator = torch.Generator().manual_seed(1)
    log_probs, words = torch.randn(ROWS, WORDS, generator=generator).log_softmax(-1).topk(64)
    ids = torch.randint(WORDS, (1, ROWS), generator=generator)
    packed = dict(teacher_logprobs=log_probs[None], teacher_ids=words[None].int(), input_ids=ids)
    data = {
        name: torch.nested.as_nested_tensor(x, layout=torch.jagged) for name, x in packed.items()
    }

    def step(name):
        actor, distillation = configs(name, topk=64)

        def loss(logits):
            out = losses.compute_topk_loss(actor, distillation, data, logits[None], "thd")
            return out["distillation_losses"].mean()

        return loss

    peaks = step_peaks("verl, top K", {name: step(name) for name in ("forward_kl_topk", mode)})
    assert peaks[mode] < 0.3 * peaks["forward_kl_topk"]


def test_what_is_not_supported_says_so(registered):
    case = draw()
    actor, distillation = configs("gated_lsm")
    megatron = ActorConfig(strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    with pytest.raises(NotImplementedError, match="'gated_lsm' needs logits with the whole voc"):
        losses.compute_topk_loss(megatron, distillation, case.data, case.logits, "thd")
    data = draw(estimator=True).data
    with pytest.raises(ValueError, match="topk must be at least 2 with loss_mode 'gated_lsm'"):
        losses.compute_topk_loss(actor, distillation, data, case.logits, "thd")
    with pytest.raises(RuntimeError, match="set use_fused_kernels=False"):
        losses.distillation_ppo_loss(actor, distillation, model_output={}, data=case.data)
    for mode in ("gated_opd", "gated_k1"):
        with pytest.raises(ValueError, match="use_policy_gradient must be True with loss_mode"):
            through_verl(draw(estimator=True), mode)
    with pytest.raises(ValueError, match="loss must be one of opd, k1, k2, k3; got 'k4'"):
        registered("k4", "k4")
    with pytest.raises(ValueError, match="direction must be one of"):
        registered("both", Kind("both", "tail", 0.5))
    with pytest.raises(ValueError, match="newline_ids must be given"):
        registered("lines", "k3", gate=dg.DriftGate("span"))
    with pytest.raises(ValueError, match="already registered"):
        integration.register("gated_lsm", "k3")


@pytest.mark.parametrize("missing", ["the package", "a function", "the version"])
def test_a_missing_or_other_verl_is_named(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, integration.__name__)
    if missing == "the package":
        monkeypatch.setitem(sys.modules, "verl.trainer.distillation.losses", None)
    elif missing == "a function":
        monkeypatch.delattr(losses, "compute_topk_loss")
    else:
        monkeypatch.setattr("verl.__version__", "0.90.0")
    wanted = r"drift_gate.integrations.verl needs verl 0.9: pip install 'verl==0.9.\*'; got .+"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module(integration.__name__)


@pytest.fixture
def registered(monkeypatch):
    """`register` under a name that lasts for one test."""
    for name in ("DISTILLATION_LOSS_REGISTRY", "DISTILLATION_SETTINGS_REGISTRY"):
        monkeypatch.setattr(losses, name, dict(getattr(losses, name)))
    monkeypatch.setattr(integration, "MODES", dict(integration.MODES))

    def register(name, loss, **options):
        integration.register(f"test_{name}", loss, **options)
        return f"test_{name}"

    return register
