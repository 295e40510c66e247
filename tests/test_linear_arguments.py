"""Bad input of the `linear_` forms: one clear error that names the argument."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.heads import FORMS, draw_head

import drift_gate as dg

EACH_FORM = pytest.mark.parametrize("form", FORMS)


def call(form, changes):
    problem = draw_head(form, 2, 9)
    hidden, head = changes.pop("hidden", problem.hidden), problem.head
    names = [field.name for field in dataclasses.fields(head)]
    head = dataclasses.replace(head, **{k: changes.pop(k) for k in names if k in changes})
    return problem.function(
        hidden, changes.pop("head", head), *problem.rest, **problem.options | changes
    )


@EACH_FORM
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(24)}, ValueError, r"hidden_states must be \[N, H\] or \[B, T, H\]"),
        ({"hidden": torch.zeros(2, 9, 24).long()}, TypeError, "hidden_states must be a floating"),
        ({"hidden": [1.0]}, TypeError, "hidden_states must be a torch.Tensor"),
        ({"head": 3}, TypeError, r"head must be a Head or its weight \[V, H\]; got int"),
        ({"weight": torch.zeros(211, 23)}, ValueError, r"head.weight must be \[V, H\] with H = 24"),
        ({"weight": torch.zeros(0, 24)}, ValueError, "V > 0"),
        ({"weight": torch.zeros(211, 24).double()}, TypeError, "dtype of hidden_states.*autocast"),
        (
            {"weight": torch.zeros(211, 24, device="meta")},
            ValueError,
            "head.weight must be on the device",
        ),
        ({"weight": 3}, TypeError, "head.weight must be a torch.Tensor"),
        ({"bias": torch.zeros(24)}, ValueError, r"head.bias must be \[V\] with V = 211"),
        ({"bias": torch.zeros(211).half()}, TypeError, "head.bias must have the dtype"),
        ({"softcap": 0}, ValueError, "head.softcap must be finite and greater than 0"),
        ({"softcap": "30"}, TypeError, "head.softcap must be a number"),
        ({"logit_scale": -1.0}, ValueError, "head.logit_scale must be"),
        ({"logit_scale": float("inf")}, ValueError, "head.logit_scale must be"),
        ({"temperature": 0}, ValueError, "temperature must be"),
        ({"chunk_size": 0}, ValueError, "head.chunk_size must be at least 1"),
        ({"chunk_size": 2.5}, TypeError, "head.chunk_size must be an int"),
        ({"logits_dtype": torch.bfloat16}, ValueError, "head.logits_dtype must be None or torch"),
        (
            {"logits_dtype": "float32"},
            ValueError,
            "head.logits_dtype must be None or torch.float32",
        ),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"gate": 1.0}, TypeError, "gate must be a DriftGate"),
        ({"reduction": "mean"}, ValueError, "reduction.mode must be one of"),
    ],
    ids=str,
)
def test_what_does_not_fit(form, changes, error, message):
    with pytest.raises(error, match=message):
        call(form, dict(changes))


@EACH_FORM
def test_labels(form):
    problem = draw_head(form, 2, 9)
    for labels, error, message in (
        (
            torch.zeros(2, 8).long(),
            ValueError,
            "labels must have the shape of hidden_states without",
        ),
        (torch.zeros(2, 9), TypeError, "labels must be int64 or int32"),
        (torch.full((2, 9), 211), ValueError, r"labels must lie in \[0, 211\)"),
    ):
        problem.rest[0] = labels
        with pytest.raises(error, match=message):
            problem.function(problem.hidden, problem.head, *problem.rest)


def test_lists_and_their_log_probs():
    problem = draw_head("topk", 2, 9)
    labels, old, ids, teacher = problem.rest
    head = problem.hidden, problem.weight
    with pytest.raises(ValueError, match="hidden_states with K for H"):
        dg.linear_topk_loss(*head, labels, old, ids[:, :8], teacher)
    with pytest.raises(ValueError, match="labels must be a tensor where log_probs are given"):
        dg.linear_topk_loss(*head, None, None, ids, teacher, gate=None, log_probs=old)
    with pytest.raises(ValueError, match="log_probs must have the shape of labels"):
        dg.linear_topk_loss(*head, labels, old, ids, teacher, log_probs=old[0])
    with pytest.raises(ValueError, match="at least 2 words"):
        dg.linear_topk_loss(*head, labels, old, ids[..., :1], teacher[..., :1])
    with pytest.raises(ValueError, match=r"lie in \[0, 211\)"):
        dg.linear_topk_loss(*head, labels, old, ids + 211, teacher, log_probs=old)


def test_the_teacher_s_head():
    problem = draw_head("full", 2, 9)
    labels, old, hidden, theirs = problem.rest
    weight, call = theirs.weight, dg.linear_full_loss
    head = problem.hidden, problem.weight, labels, old
    with pytest.raises(ValueError, match="teacher_hidden_states must have the leading shape"):
        call(*head, hidden[:, :8], weight)
    with pytest.raises(ValueError, match="teacher_head.weight must be"):
        call(*head, hidden, weight[:, :3])
    with pytest.raises(
        ValueError, match=r"head.weight and teacher_head.weight must have the same words"
    ):
        call(*head, hidden, weight[:200])
    with pytest.raises(ValueError, match="teacher_head.softcap"):
        call(*head, hidden, dg.Head(weight, softcap=-1.0))
    with pytest.raises(TypeError, match=r"teacher_head must be a Head or its weight \[V, H\]"):
        call(*head, hidden, None)
    with pytest.raises(ValueError, match="vocab_size must be between 1"):
        call(*head, hidden, weight, vocab_size=212)


def test_ids_of_gather_lse():
    problem = draw_head("opd", 2, 9, chunk_size=4)
    head = problem.hidden, problem.head
    with pytest.raises(ValueError, match="between 1 and V = 211"):
        dg.linear_gather_lse(*head, torch.zeros(2, 9, 0).long())
    ids = torch.zeros(2, 9, 2).long()
    ids[1, 0, 1] = 211
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 211\); got 211 at row 9, entry 1"):
        dg.linear_gather_lse(*head, ids)
