"""Row function of the teacher's top K: LSM over K listed logits of a row, and its slope."""

from __future__ import annotations

import torch
from drift_gate.bench import floors, internals
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw_rows
from drift_gate.bench.peers import plain
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, train
from drift_gate.bench.truth import Expected, Truth


def eager(work: Work):
    return lambda scores: plain.lsm(scores, work.log_q).mean()


def drift_gate_rows(work: Work):
    return train(lambda scores: internals.local_support_losses(scores, work.log_q).mean())


def truths(work: Work) -> dict[str, Truth]:
    scores = work.listed64.clone().requires_grad_()
    loss = plain.lsm(scores, work.log_q).mean()
    (grad,) = torch.autograd.grad(loss, scores)
    return {"same": {"loss": Expected(loss.detach()), "grad": Expected(grad)}}


SUITE = Suite(
    "topk_rows",
    ("LSM",),
    lambda on_gpu: Case("LSM", 8192, 0, "float32", k=64),
    draw_rows,
    floors.topk_rows,
    truths,
    (*baseline(eager), Implementation("drift_gate", drift_gate_rows)),
    leaves=("scores",),
)


def test_topk_rows(measured, benchmark):
    replay(measured, benchmark)
