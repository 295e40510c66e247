"""`full_loss`: distillation from the teacher's logits over the whole vocabulary.

Works, forward and backward, gated: reverse and forward KL, JSD with beta = 1/2.
"""

from __future__ import annotations

import functools

import torch
from drift_gate.bench import floors
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.peers import plain, whole
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, train
from drift_gate.bench.truth import Truth, full_vocabulary
from torch import Tensor

from drift_gate import full_loss


def eager(work: Work):
    rows = plain.Rows(work)

    def loss(logits: Tensor) -> Tensor:
        table = plain.log_probs(logits)
        losses = plain.whole(table, plain.log_probs(work.teacher_logits), work.case.what)
        return rows.gated(plain.at(table.detach(), work.labels), losses)

    return loss


def drift_gate_loss(inplace: bool):
    def make(work: Work):
        arguments = work.labels, work.old, work.teacher_logits
        options = dict(direction=work.case.what, inplace_backward=inplace)
        return train(lambda logits: full_loss(logits, *arguments, **options).loss)

    return make


def liger(work: Work):
    function = whole.liger(work.device)
    return train(lambda logits: function(logits, work.teacher_logits, work.case.what))


def truths(work: Work) -> dict[str, Truth]:
    rows = plain.Rows(work, torch.float64)
    divergence = functools.partial(plain.whole, direction=work.case.what)
    return {
        "same": full_vocabulary(work, divergence, rows.gated),
        "no gate": full_vocabulary(work, divergence, lambda now, losses: losses.mean()),
    }


def floor(case: Case) -> floors.Floor:
    return floors.divergence(case, case.what) + floors.divergence_grad(case) + floors.rows(case)


SUITE = Suite(
    "full_loss",
    ("reverse", "forward", "jsd"),
    lambda on_gpu: Case("reverse", 8192 if on_gpu else 512, 151_936, "bfloat16"),
    functools.partial(draw, full_teacher=True),
    floor,
    truths,
    (
        *baseline(eager, temporaries=26),
        Implementation("drift_gate", drift_gate_loss(False), temporaries=4),
        Implementation("drift_gate, in place", drift_gate_loss(True), "", "same", 0, True),
        Implementation("Liger JSD", liger, "log-probs eager; no gate", "no gate", 20),
    ),
)


def test_full_loss(measured, benchmark):
    replay(measured, benchmark)
