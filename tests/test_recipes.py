"""docs/recipes.md runs, and what it writes out is what verl computes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_docs import blocks
from torch import Tensor

import drift_gate as dg


class Logprob(NamedTuple):
    """vLLM's, of a word."""

    logprob: float
    rank: int


def prompt_logprobs_of(logits: Tensor, tokens: Tensor, k: int) -> list[dict[int, Logprob] | None]:
    """As vLLM has them: the token itself first, then the k likeliest, which may have it again."""
    found: list[dict[int, Logprob] | None] = [None]
    for row, token in zip(logits.log_softmax(-1).tolist(), tokens[1:].tolist(), strict=True):
        ranked = sorted(range(len(row)), key=lambda word: -row[word])
        listed = dict.fromkeys([token, *ranked[:k]])
        found.append({word: Logprob(row[word], ranked.index(word) + 1) for word in listed})
    return found


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page has defined at its end."""
    code = blocks("recipes.md", "python")
    assert len(code) == 7
    space: dict[str, Any] = {"prompt_logprobs_of": prompt_logprobs_of}
    for block in code:
        exec(compile(block, "recipes.md", "exec"), space)
    return space


def test_the_recipes_run(page: dict[str, Any]) -> None:
    """Each compares with its formula; the lists of the first are those that an engine gives."""
    ids, log_q = page["teacher_lists"](page["engine"][0], page["K"])
    assert ids.dtype == torch.int32 and ids.shape == log_q.shape == (page["T"], page["K"] + 1)
    assert torch.equal(ids[:, 0].long(), page["labels"][0])  # row t predicts token t + 1
    short = ids[:, -1] == -1  # the token was among the K likeliest
    assert (log_q[short, -1] == -torch.inf).all() and not short.all()


def test_an_engine_s_list_off_by_one_is_another_loss(page: dict[str, Any]) -> None:
    """The recipe's comparison can fail."""
    lists = [page["teacher_lists"](x, page["K"]) for x in page["engine"]]
    ids, log_q = map(torch.stack, zip(*lists, strict=True))
    student, labels = page["student"].detach(), page["labels"]
    right, late = (
        dg.topk_loss(student, labels, None, ids.roll(n, 1), log_q.roll(n, 1), gate=None).loss
        for n in (0, 1)
    )
    assert not torch.isclose(right, late, rtol=1e-3)


@pytest.fixture(scope="module")
def rollout_weights() -> Any:
    """verl's importance weights of trainer over engine."""
    pytest.importorskip("support.verl_loading", reason="needs verl: drift-gate[verl]")
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    def weights(log_ratio: Tensor, mask: Tensor, threshold: float | str) -> Tensor:
        found, _ = compute_rollout_correction_weights(
            log_ratio, mask, rollout_is="token", rollout_is_threshold=threshold
        )
        return found

    return weights


@pytest.mark.parametrize("threshold", [2.0, "0.5_2.0"], ids=["TIS", "IcePop"])
def test_truncated_importance_weights_are_verl_s(
    page: dict[str, Any], rollout_weights: Any, threshold: Any
) -> None:
    """min(p_trainer / p_engine, C), or 0 outside of [1 / C, C]; and through its PPO loss."""
    from support.verl_loading import MODULE  # noqa: F401
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig, PolicyLossConfig

    mask, old, labels = page["mask"], page["old"], page["labels"]
    log_ratio = old - page["engine_log_probs"]
    theirs = rollout_weights(log_ratio, mask.float(), threshold)
    ratio = log_ratio.exp()
    ours = ratio.clamp(max=2.0) if threshold == 2.0 else ratio * ((ratio >= 0.5) & (ratio <= 2.0))
    torch.testing.assert_close(theirs, torch.where(mask, ours, 0))
    assert (ratio > 2.0).any() and (ratio < 0.5).any()

    student = page["student"].detach().requires_grad_()
    advantages = page["advantages"]
    found = dg.opd_loss(
        student, labels, old, None, advantages=advantages, row_weights=ours, response_mask=mask,
        gate=None, clip=dg.Clip(0.2, 0.28),
    ).loss  # fmt: skip
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="token-mean",
        policy_loss=PolicyLossConfig(), clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0,
    )  # fmt: skip
    now = student.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected, _ = core_algos.compute_policy_loss_vanilla(
        old, now, advantages, mask, config=config, rollout_is_weights=theirs
    )
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss", ["gspo", "cispo"])
def test_gspo_and_cispo_are_verl_s(page: dict[str, Any], loss: str) -> None:
    """`opd_loss` beside verl's own functions, without this package's in between."""
    pytest.importorskip("support.verl_loading", reason="needs verl: drift-gate[verl]")
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig, PolicyLossConfig

    mask, old, labels = (page[x] for x in ("mask", "old", "labels"))
    student = page["student"].detach().requires_grad_()
    # Two sequences whose ratios have moved as their advantages ask, and are clipped; one other.
    moved = ((page["now"] - old) * mask).sum(-1, keepdim=True).sign()
    advantages = (moved * torch.tensor([[1.5], [0.5], [-1.0]])).expand(old.shape)
    form = {"gspo": {"ratio": "sequence"}, "cispo": {"estimator": "cispo"}}[loss]
    low, high = {"gspo": (0.01, 0.02), "cispo": (0.1, 0.28)}[loss]
    found = dg.opd_loss(
        student, labels, old, None, advantages=advantages, response_mask=mask, gate=None,
        clip=dg.Clip(low, high, dual=None), reduction="seq-mean-token-mean", **form,
    ).loss  # fmt: skip
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        loss_agg_mode="seq-mean-token-mean", policy_loss=PolicyLossConfig(loss_mode=loss),
        clip_ratio_low=low, clip_ratio_high=high,
    )  # fmt: skip
    now = student.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    expected, metrics = core_algos.get_policy_loss_fn(loss)(
        old, now, advantages, mask, loss_agg_mode="seq-mean-token-mean", config=config
    )
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert 0 < metrics["actor/pg_clipfrac"] < 1
