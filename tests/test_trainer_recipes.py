"""The loss functions of docs/integrations/nemo_rl_and_slime.md, with tensors of the shapes that
NeMo-RL and slime give, beside their formulas written out. Neither project is installed."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import drift_gate as dg

PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations" / "nemo_rl_and_slime.md"
BATCH, LENGTH, VOCAB, K = 3, 9, 37, 5


@pytest.fixture
def page(monkeypatch):
    """What the page defines. Of the projects it imports two enumerations and Megatron's groups."""
    interfaces = ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType = Enum("LossType", ["TOKEN_LEVEL"])
    interfaces.LossInputType = Enum("LossInputType", ["LOGIT"])
    core = ModuleType("megatron.core")
    core.mpu = SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 1)
    for module in (interfaces, core):
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    space: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        exec(compile(block, PAGE.name, "exec"), space)
    return SimpleNamespace(**space)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def data():
    """A micro-batch of NeMo-RL: teachers' rows predict the next token, log-probs are of their own
    token, and the first of a sequence has none."""
    ids = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[:, :3], mask[0, 5], mask[1, 7:] = 0, 0, 0
    teacher = draw(BATCH, LENGTH, VOCAB, seed=2) * 2
    logits, words = teacher.topk(K)
    prev = draw(BATCH, LENGTH, seed=3) - 3
    return {
        "input_ids": ids, "token_mask": mask, "sample_mask": torch.tensor([1.0, 1.0, 0.0]),
        "teacher_topk_logits": logits, "teacher_topk_indices": words,
        "prev_logprobs": prev, "generation_logprobs": prev + 0.5 * draw(BATCH, LENGTH, seed=4),
    }  # fmt: skip


def nemo_losses(logits, data, kl_type, weight, zero_outside=False):
    """[B, S - 1] of its DistillationLossFn, and the mask."""
    words = data["teacher_topk_indices"][:, :-1]
    everything = logits.log_softmax(-1)[:, :-1]
    p = logits[:, :-1].gather(-1, words).log_softmax(-1)
    if zero_outside:
        p = everything.gather(-1, words)
    q = data["teacher_topk_logits"].log_softmax(-1)[:, :-1]
    forward, reverse = (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1)
    if zero_outside:
        rest = (everything.exp() * everything).sum(-1) - (p.exp() * p).sum(-1)
        reverse = reverse + rest + 100 * (1 - p.exp().sum(-1))
    mixed = weight * forward + (1 - weight) * reverse
    mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None]
    return {"forward": forward, "reverse": reverse, "mixed": mixed}[kl_type], mask


@pytest.mark.parametrize(
    "kl_type, zero_outside",
    [("forward", False), ("reverse", False), ("mixed", False), ("reverse", True), ("mixed", True)],
)
def test_nemo_rl_ungated(page, data, kl_type, zero_outside):
    logits = draw(BATCH, LENGTH, VOCAB, seed=5).requires_grad_()
    tokens = torch.tensor(40.0)  # of the global batch
    losses, mask = nemo_losses(logits, data, kl_type, 0.3, zero_outside)
    expected = (losses * mask).sum() / tokens
    (gradient,) = torch.autograd.grad(expected, logits)
    without = {name: x for name, x in data.items() if "logprobs" not in name}
    for given, gate in ((without, dg.DriftGate()), (data, None), (data, dg.DriftGate(tau=0.0))):
        loss, metrics = page.GatedDistillationLoss(kl_type, 0.3, zero_outside, gate=gate)(
            logits=logits, data=given, global_valid_seqs=torch.tensor(8.0),
            global_valid_toks=tokens,
        )  # fmt: skip
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient)
        assert metrics["loss"] == pytest.approx(expected.item()) and metrics["num_valid_samples"]


def test_nemo_rl_forward_without_the_rest_is_refused(page, data):
    loss = page.GatedDistillationLoss("forward", zero_outside_topk=True)
    with pytest.raises(ValueError, match="zero_outside_topk"):
        loss(draw(BATCH, LENGTH, VOCAB), data, torch.tensor(8.0), torch.tensor(40.0))


def test_nemo_rl_gated_with_importance_weights(page, data):
    logits = draw(BATCH, LENGTH, VOCAB, seed=5).requires_grad_()
    gate = dg.DriftGate(block_size=2, tau=0.7)
    losses, mask = nemo_losses(logits, data, "mixed", 0.5)
    log_probs = logits.detach().log_softmax(-1)[:, :-1]
    now = log_probs.gather(-1, data["input_ids"][:, 1:, None])[..., 0]
    weights = dg.gate_weights(
        now, data["prev_logprobs"][:, 1:], gate, response_mask=mask.bool()
    ).weights
    ratio = (data["prev_logprobs"] - data["generation_logprobs"])[:, 1:].exp().clamp(max=1.2)
    assert weights[mask > 0].std() > 0.2 and (ratio == 1.2).any() and (ratio < 1.2).any()
    expected = (losses * mask * weights * ratio).sum() / 40
    loss, metrics = page.GatedDistillationLoss(gate=gate, is_cap=1.2)(
        logits, data, torch.tensor(8.0), torch.tensor(40.0)
    )
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(found, wanted)
    assert metrics["gate_min"] < 1 < metrics["gate_max"]


@pytest.mark.parametrize("tau", [0.0, 0.7])
def test_slime(page, tau):
    """Three samples packed, padding behind them, a masked token inside a response."""
    total, response = [6, 9, 5], [3, 6, 2]
    length, temperature = sum(total) + 4, 0.8
    logits = draw(1, length, VOCAB, seed=6).float().requires_grad_()
    generator = torch.Generator().manual_seed(7)
    tokens = [torch.randint(VOCAB, (n,), generator=generator) for n in total]
    masks = [torch.ones(n, dtype=torch.int) for n in response]
    masks[1][2] = 0
    batch = {
        "total_lengths": total, "response_lengths": response, "unconcat_tokens": tokens,
        "loss_masks": masks,
        "log_probs": [draw(n, seed=n).float() - 3 for n in response],
        "teacher_log_probs": [draw(n, seed=10 + n).float() - 3 for n in response],
    }  # fmt: skip

    def sum_of_sample_mean(x):
        parts = zip(x.split(response), masks, strict=True)
        return sum((part * mask).sum() / mask.sum() for part, mask in parts)

    page_gate = dg.DriftGate(block_size=2, tau=tau)
    page.gated_opd.__globals__["GATE"] = page_gate
    args = SimpleNamespace(rollout_temperature=temperature)
    expected, weights, now = 0, [], []
    for i, (n, r) in enumerate(zip(total, response, strict=True)):
        end = sum(total[: i + 1])
        rows = logits[0, end - r - 1 : end - 1] / temperature
        now.append(rows.log_softmax(-1).gather(-1, tokens[i][n - r :, None])[:, 0])
    width = max(response)
    padded = [torch.nn.utils.rnn.pad_sequence(x, True) for x in (now, batch["log_probs"], masks)]
    weights = dg.gate_weights(
        padded[0].detach(), padded[1], page_gate, response_mask=padded[2]
    ).weights
    assert weights.shape == (3, width)
    for i, mask in enumerate(masks):
        old, teacher = batch["log_probs"][i], batch["teacher_log_probs"][i]
        ratio, advantage = (now[i] - old).exp(), teacher - old
        losses = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
        losses = torch.where(advantage < 0, torch.minimum(losses, -3 * advantage), losses)
        expected = expected + (losses * weights[i, : len(mask)] * mask).sum() / mask.sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    loss, metrics = page.gated_opd(args, batch, logits, sum_of_sample_mean)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient)
    assert (metrics["gate_min"] < 0.9) == (tau > 0)
