"""`linear_full_loss`: divergence over all words, from hidden states and heads of both models.

Works, forward and backward, gated: reverse and forward KL, JSD with beta = 1/2. Four products.
"""

from __future__ import annotations

import functools

import torch
from drift_gate.bench import floors
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.linear import GRADIENTS, bare_gemms, head
from drift_gate.bench.names import OURS, WIDE
from drift_gate.bench.peers import plain, whole
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, ours, train
from drift_gate.bench.truth import Truth, full_vocabulary
from torch import Tensor
from torch.nn import functional


def eager(work: Work):
    rows = plain.Rows(work)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        table = plain.log_probs(functional.linear(hidden, weight))
        with torch.no_grad():
            teacher = functional.linear(work.teacher_hidden, work.teacher_weight)
            log_q = plain.log_probs(teacher)
        losses = plain.whole(table, log_q, work.case.what)
        return rows.gated(plain.at(table.detach(), work.labels), losses)

    return loss


def drift_gate_loss(work: Work, **options):
    """options: of both heads."""
    function, make = ours("linear_full_loss"), ours("Head")
    teacher = work.teacher_hidden, make(work.teacher_weight, **options)
    arguments = work.labels, work.old, *teacher

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        head = make(weight, **options)
        return function(hidden, head, *arguments, direction=work.case.what).loss

    return train(loss)


def wide(work: Work):
    return drift_gate_loss(work, logits_dtype=torch.float32)


def liger(work: Work):
    function = whole.liger_linear(work.device)
    teacher = work.teacher_hidden, work.teacher_weight, work.labels, work.case.what
    return train(lambda hidden, weight: function(hidden, weight, *teacher))


def trl(work: Work):
    function = whole.trl_linear(work.device)
    teacher = work.teacher_hidden, work.teacher_weight, work.case.what
    return train(lambda hidden, weight: function(hidden, weight, *teacher).mean())


def truths(work: Work) -> dict[str, Truth]:
    rows = plain.Rows(work, torch.float64)
    divergence = functools.partial(plain.whole, direction=work.case.what)
    return {
        "same": full_vocabulary(work, divergence, rows.gated),
        "no gate": full_vocabulary(work, divergence, lambda now, losses: losses.mean()),
    }


NO_GATE = "no gate, which needs the labels' log-probs"
SUITE = Suite(
    "linear_full_loss",
    ("reverse", "forward", "jsd"),
    lambda on_gpu: head(on_gpu, "reverse")._replace(rows=8192 if on_gpu else 256),
    functools.partial(draw, full_teacher=True),
    lambda case: floors.linear(case, 3, teacher=True) + floors.rows(case),
    truths,
    (
        *baseline(eager, temporaries=26),
        Implementation(OURS, drift_gate_loss, temporaries=4),
        Implementation(WIDE, wide, temporaries=10),
        bare_gemms(3),
        Implementation("Liger fused linear JSD", liger, NO_GATE, "no gate", 20),
        Implementation("TRL ChunkedDivergenceFunction", trl, NO_GATE, "no gate", 8),
    ),
    leaves=GRADIENTS,
)


def test_linear_full_loss(measured, benchmark):
    replay(measured, benchmark)
