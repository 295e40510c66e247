"""What fails, fails clearly: the message names the argument, what it was and what it should be."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import draw

from drift_gate import (
    Clip,
    DriftGate,
    Reduction,
    gate_weights,
    gather_lse,
    opd_loss,
    token_log_probs,
)

SPAN = DriftGate("span")
BORDERS = torch.tensor([0, 5])


def call(**changes):
    problem = draw(2, 5, 7)
    names = ("logits", "labels", "old_log_probs", "teacher_log_probs")
    arguments = dict(zip(names, problem.arguments(), strict=True)) | changes
    positional = [arguments.pop(name) for name in names]
    return opd_loss(*positional, **arguments)


BAD = [
    # shapes
    ({"logits": torch.rand(7)}, ValueError, r"logits must be \[N, V\] or \[B, T, V\]; got .*\[7\]"),
    ({"logits": torch.rand(2, 5, 0)}, ValueError, "logits must have at least one word"),
    ({"logits": torch.rand(2, 4, 7)}, ValueError, r"labels must have the shape .*\[2, 4\]"),
    ({"labels": torch.ones(5, dtype=torch.int64)}, ValueError, r"labels must have the shape"),
    ({"old_log_probs": torch.rand(2, 4)}, ValueError, r"old_log_probs .*\[2, 5\]; got \[2, 4\]"),
    ({"teacher_log_probs": torch.rand(2, 6)}, ValueError, "teacher_log_probs must have the shape"),
    ({"response_mask": torch.ones(5)}, ValueError, "response_mask must have the shape"),
    ({"cu_seqlens": BORDERS}, ValueError, "labels must be packed"),
    ({"cu_seqlens": BORDERS[:1]}, ValueError, r"cu_seqlens must be \[B \+ 1\]"),
    ({"gate": SPAN, "span_ids": torch.ones(5).long()}, ValueError, "span_ids must have the shape"),
    ({"reduction": Reduction(batch_num_tokens=torch.ones(2))}, ValueError,
     "reduction.batch_num_tokens must be one number"),
    # memory layout
    ({"logits": torch.rand(2, 7, 5).mT}, ValueError, "contiguous in their last dimension.*copies"),
    # types
    ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor; got list"),
    ({"logits": torch.ones(2, 5, 7).int()}, TypeError, "logits must be a floating-point tensor"),
    ({"labels": torch.rand(2, 5)}, TypeError, "labels must be int64 or int32; got torch.float32"),
    ({"old_log_probs": torch.ones(2, 5).int()}, TypeError, "old_log_probs must be a floating"),
    ({"teacher_log_probs": [0.0]}, TypeError, "teacher_log_probs must be a torch.Tensor"),
    ({"response_mask": True}, TypeError, "response_mask must be a torch.Tensor"),
    ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens must be a torch.Tensor; got list"),
    ({"gate": SPAN, "span_ids": torch.rand(2, 5)}, TypeError, "span_ids must be int64 or int32"),
    ({"gate": "block"}, TypeError, "gate must be a DriftGate, .*; got str"),
    ({"temperature": "1"}, TypeError, "temperature must be a number; got str"),
    ({"reduction": Reduction(batch_num_tokens="8")}, TypeError,
     "reduction.batch_num_tokens must be a number"),
    # options
    ({"estimator": "k4"}, ValueError, "estimator must be one of ppo, .*; got 'k4'"),
    ({"reduction": "mean"}, ValueError, "reduction.mode must be one of token-mean, .*'mean'"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, .*; got 'cuda'"),
    ({"backend": "triton"}, ValueError, 'backend "triton" needs tensors on a CUDA device; got cpu'),
    ({"temperature": 0}, ValueError, "temperature must be finite and greater than 0; got 0"),
    ({"temperature": math.nan}, ValueError, "temperature must be finite"),
    ({"clip": Clip(low=-0.1)}, ValueError, "clip.low must be finite and at least 0"),
    ({"clip": Clip(high=math.inf)}, ValueError, "clip.high must be finite"),
    ({"clip": Clip(dual=1.0)}, ValueError, "clip.dual must be finite and greater than 1"),
    ({"clip": Clip(advantage=0)}, ValueError, "clip.advantage must be finite and greater than 0"),
    ({"reduction": Reduction(dp_size=0)}, ValueError,
     "reduction.dp_size must be finite and greater than 0"),
    ({"reduction": Reduction(dp_size=2)}, ValueError,
     "reduction.batch_num_tokens must be given where .*dp_size > 1"),
    ({"reduction": Reduction("seq-mean-token-sum", dp_size=2)}, ValueError,
     "reduction.global_batch_size must be given where .*dp_size > 1"),
    # combinations
    ({"old_log_probs": None}, ValueError, "old_log_probs must be a tensor where a gate is used"),
    ({"teacher_log_probs": None}, ValueError,
     "teacher_log_probs must be a tensor where no advantages are given; got None"),
    ({"teacher_log_prob_min": -9.0, "advantages": torch.rand(2, 5)}, ValueError,
     "teacher_log_prob_min goes with teacher_log_probs; got advantages as well"),
    ({"gate": SPAN}, ValueError, "span_ids must be given with gate granularity"),
    ({"span_ids": torch.ones(2, 5).long()}, ValueError, "span_ids are used with gate granularity"),
    # values, on the CPU
    ({"labels": torch.full((2, 5), 7)}, ValueError, r"labels must lie in \[0, 7\).*got 7 at"),
    ({"labels": torch.full((2, 5), -1)}, ValueError, r"ignore_index \(-100\); got -1 at index"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_opd_loss(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_packed_batches():
    problem = draw(10, 7)
    for borders in ([1, 10], [0, 9], [0, 6, 5, 10]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to 10"):
            opd_loss(*problem.arguments(), cu_seqlens=torch.tensor(borders))
    borders = torch.tensor([0, 4, 10])
    with pytest.raises(ValueError, match="reduction.loss_scale_factor must be given"):
        opd_loss(*problem.arguments(), cu_seqlens=borders, reduction="seq-mean-token-sum-norm")
    expected = opd_loss(*problem.arguments(), cu_seqlens=borders).loss
    one_row = [x[None] for x in problem.arguments()]  # as verl packs: [1, N]
    assert torch.equal(opd_loss(*one_row, cu_seqlens=borders).loss, expected)


def test_devices():
    meta = torch.device("meta")
    for name in ("labels", "old_log_probs", "teacher_log_probs"):
        problem = draw(2, 5, 7)
        setattr(problem, name, getattr(problem, name).to(meta))
        with pytest.raises(ValueError, match=f"{name} must be on the device of .*cpu; got meta"):
            opd_loss(*problem.arguments())
    for name in ("response_mask", "cu_seqlens"):
        with pytest.raises(ValueError, match=f"{name} must be on the device of labels, cpu"):
            call(**{name: torch.ones(2, 5, dtype=torch.int64, device=meta).squeeze()[0][:5]}
                 if name == "cu_seqlens" else {name: torch.ones(2, 5, device=meta)})  # fmt: skip


def test_validate_is_accepted_and_changes_nothing_on_the_cpu():
    assert torch.equal(call(validate=True).loss, call().loss)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": "row"}, ValueError, "granularity must be one of token, .*; got 'row'"),
        ({"aggregate": "median"}, ValueError, "aggregate must be one of mean, .*'median'"),
        ({"normalize": None}, ValueError, "normalize must be one of batch, .*; got None"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1; got 0"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int; got 64.0"),
        ({"tau": -1.0}, ValueError, "tau must be finite and at least 0; got -1.0"),
        ({"tau": math.inf}, ValueError, "tau must be finite"),
        ({"tau": math.nan}, ValueError, "tau must be finite"),
        ({"tau": "1"}, TypeError, "tau must be a number; got '1'"),
    ],
)
def test_drift_gate(options, error, message):
    with pytest.raises(error, match=message):
        DriftGate(**options)


def test_gate_weights():
    new = -torch.rand(2, 5)
    with pytest.raises(ValueError, match="old_log_probs must have the shape of log_probs"):
        gate_weights(new, new[:, :4])
    with pytest.raises(TypeError, match="log_probs must be a floating-point tensor"):
        gate_weights(new.int(), new)
    with pytest.raises(ValueError, match=r"log_probs must be \[B, T\] or \[N\]"):
        gate_weights(new[None], new[None])
    with pytest.raises(TypeError, match="gate must be a DriftGate; got NoneType"):
        gate_weights(new, new, None)
    with pytest.raises(ValueError, match="span_ids must be given"):
        gate_weights(new, new, SPAN)


def test_gather_lse():
    logits = torch.rand(2, 5, 7)
    with pytest.raises(ValueError, match="between 1 and V = 7 words a row; got K = 8"):
        gather_lse(logits, torch.zeros(2, 5, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="got K = 0"):
        gather_lse(logits, torch.zeros(2, 5, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="ids must have the shape of logits with K for V"):
        gather_lse(logits, torch.zeros(2, 4, 3, dtype=torch.int64))
    for outside in (7, -1):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, 7\); got {outside} at"):
            gather_lse(logits, torch.full((2, 5, 1), outside))


def test_token_log_probs():
    logits = torch.rand(5, 7)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 7\)"):
        token_log_probs(logits, torch.full((5,), 9))
    log_probs, _ = token_log_probs(logits, torch.full((5,), 9), ignore_index=9)
    assert (log_probs == 0).all()
    with pytest.raises(ValueError, match="labels must have the shape"):
        token_log_probs(logits, torch.zeros(4, dtype=torch.int64))
