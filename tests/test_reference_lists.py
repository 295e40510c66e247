"""The reference's options for lists and vocabularies against the formulas of those who use them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.formulas import B, K, T, V, assert_loss, listed, sampled, with_leaf
from torch import Tensor

from drift_gate import reference


def nemo_rl(arguments: dict[str, Any], kind: str, weight: float, zero_outside: bool) -> Tensor:
    """NeMo-RL's DistillationLossFn, its mean over all positions.

    The student is softmaxed over the vocabulary where zero_outside_topk, else over the list.
    """
    ids, log_p = arguments["teacher_topk_ids"], arguments["logits"].log_softmax(-1)
    teacher = arguments["teacher_topk_log_probs"].log_softmax(-1)
    student = log_p.gather(-1, ids)
    if not zero_outside:
        student = arguments["logits"].gather(-1, ids).log_softmax(-1)
    forward = (teacher.exp() * (teacher - student)).sum(-1)
    reverse = (student.exp() * (student - teacher)).sum(-1)
    if zero_outside:
        rest = (log_p.exp() * log_p).sum(-1) - (student.exp() * student).sum(-1)
        reverse = reverse + rest + 100 * (1 - student.exp().sum(-1))
    per_token = {"reverse": reverse, "mixed": weight * forward + (1 - weight) * reverse}[kind]
    return per_token.mean()


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_mixed_kl_is_nemo_rls(weight: float):
    arguments, _ = with_leaf(listed())
    output = reference.topk_loss(**arguments, direction="mixed", beta=weight)
    assert_loss(output, arguments, nemo_rl(arguments, "mixed", weight, False))


@pytest.mark.parametrize("kind", ["reverse", "mixed"])
def test_zero_outside_topk_is_nemo_rls(kind: str):
    arguments, _ = with_leaf(listed())
    output = reference.topk_loss(
        **arguments, direction=kind, beta=0.3, support="truncated", zero_outside_topk=True
    )
    assert_loss(output, arguments, nemo_rl(arguments, kind, 0.3, True))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("support", ["truncated", "tail"])
def test_the_least_log_prob_of_a_list_is_verls(direction: str, support: str):
    """log_prob_min_clamp: both are clamped before the divergence; masses are told as they were."""
    arguments, _ = with_leaf(listed())
    output = reference.topk_loss(
        **arguments, direction=direction, support=support, log_prob_floor=-3.0
    )
    student = arguments["logits"].log_softmax(-1).gather(-1, arguments["teacher_topk_ids"])
    teacher = arguments["teacher_topk_log_probs"]
    masses = student.exp().sum(-1).mean(), teacher.exp().sum(-1).mean()
    assert (student < -3).any() and (teacher < -3).any()
    student, teacher = student.clamp(min=-3.0), teacher.clamp(min=-3.0)
    if support == "tail":
        eps = torch.finfo(torch.float64).eps
        student, teacher = (
            torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).clamp(min=eps).log()], -1)
            for x in (student, teacher)
        )
    a, b = (student, teacher) if direction == "reverse" else (teacher, student)
    assert_loss(output, arguments, (a.exp() * (a - b)).sum(-1).mean())
    torch.testing.assert_close(output.metrics["student_mass"], masses[0].detach())
    torch.testing.assert_close(output.metrics["teacher_mass"], masses[1])


def test_the_teachers_temperature_softens_its_list():
    arguments, _ = with_leaf(listed())
    output = reference.topk_loss(**arguments, teacher_temperature=2.0, temperature=0.5)
    student = (2 * arguments["logits"]).gather(-1, arguments["teacher_topk_ids"]).log_softmax(-1)
    teacher = (arguments["teacher_topk_log_probs"] / 2).log_softmax(-1)
    assert_loss(output, arguments, (student.exp() * (student - teacher)).sum(-1).mean())


@pytest.mark.parametrize("support", ["renormalized", "truncated", "tail"])
def test_a_word_listed_twice_counts_once(support: str):
    """The first present entry; as the list without the others, whose ids are -1."""
    arguments, leaf = with_leaf(listed())
    ids = arguments["teacher_topk_ids"].clone()
    log_q = arguments["teacher_topk_log_probs"].clone()
    ids[0, :, 3] = ids[0, :, 1]
    ids[1, :, 4] = ids[1, :, 2]
    log_q[1, :, 2] = -torch.inf  # so the second one is the first that is present
    ids[2, 0, 1:] = ids[2, 0, 0]
    mask = torch.ones(B, T)
    mask[0, :5] = 0  # whose repeats are not counted
    lists = {"teacher_topk_ids": ids, "teacher_topk_log_probs": log_q, "response_mask": mask}
    output = reference.topk_loss(**arguments | lists, support=support)
    assert output.metrics["duplicate_words"] == (T - 5) + (K - 1)

    once = ids.clone()
    once[0, :, 3] = -1
    once[2, 0, 1:] = -1
    expected = reference.topk_loss(
        **arguments | lists | {"teacher_topk_ids": once}, support=support
    )
    assert expected.metrics.pop("duplicate_words") == 0
    output.metrics.pop("duplicate_words")
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(x.loss, leaf)[0] for x in (output, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_jsd_is_trls_to_its_ends(beta: float):
    """GKDTrainer.generalized_jsd_loss: F.kl_div(x, y) is KL(y || x), so 0 is the forward KL."""
    arguments, _ = with_leaf(sampled())
    generator = torch.Generator().manual_seed(4)
    teacher_logits = torch.randn(B, T, V, dtype=torch.float64, generator=generator)
    output = reference.full_loss(
        arguments["logits"], arguments["labels"], None, teacher_logits, gate=None,
        direction="jsd", beta=beta,
    )  # fmt: skip
    student, teacher = arguments["logits"].log_softmax(-1), teacher_logits.log_softmax(-1)

    def kl(of: Tensor, against: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(against, of, reduction="none", log_target=True)

    if beta == 0:
        words = kl(teacher, student)
    elif beta == 1:
        words = kl(student, teacher)
    else:
        mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
        words = beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)
    assert_loss(output, arguments, words.sum() / (B * T))


def test_jsd_nears_its_ends():
    """L / beta at 0 and L / (1 - beta) at 1 are the KLs that stand there."""
    arguments = sampled()
    teacher_logits = arguments["logits"] + arguments["logits"].flip(1) / 4

    def loss(direction: str, beta: float) -> Tensor:
        return reference.full_loss(
            arguments["logits"], None, None, teacher_logits, gate=None, direction=direction,
            beta=beta,
        ).loss  # fmt: skip

    for end, near, direction in ((0, 1e-9, "forward"), (1, 1 - 1e-9, "reverse")):
        torch.testing.assert_close(loss("jsd", end), loss(direction, 0.5), rtol=0, atol=0)
        limit = loss("jsd", near) / min(near, 1 - near)
        torch.testing.assert_close(limit, loss(direction, 0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("direction", ["jsd", "mixed"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ends_are_finite_where_one_kl_is(direction: str, beta: float):
    """The teacher rules out a word of the student: "reverse" is infinite, "forward" is not."""
    student = torch.zeros(1, 3, dtype=torch.float64)
    teacher = torch.tensor([[0.0, 1.0, -torch.inf]], dtype=torch.float64)
    options = {"gate": None, "direction": direction, "beta": beta}
    out = reference.full_loss(student, None, None, teacher, **options)
    forward = beta == 0 if direction == "jsd" else beta == 1
    assert out.loss.isfinite() if forward else out.loss == torch.inf
