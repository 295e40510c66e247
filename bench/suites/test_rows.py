"""Gate and row functions of sampled tokens: drift of blocks, gate, unit mean, loss, its slope."""

from __future__ import annotations

from drift_gate.bench import floors, internals
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw_rows
from drift_gate.bench.peers.plain import BLOCK, Rows
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, train
from drift_gate.bench.truth import Expected, Truth


def drift_gate_rows(work: Work):
    row_data = work.old, work.teacher, BLOCK
    return train(lambda now: internals.sampled_token_loss(now, *row_data))


def truths(work: Work) -> dict[str, Truth]:
    import torch

    now = work.now64.clone().requires_grad_()
    loss = Rows(work, torch.float64).sampled(now)
    (grad,) = torch.autograd.grad(loss, now)
    return {"same": {"loss": Expected(loss.detach()), "grad": Expected(grad)}}


SUITE = Suite(
    "rows",
    ("gate and loss",),
    lambda on_gpu: Case("gate and loss", 8192, 0, "float32"),
    draw_rows,
    floors.rows,
    truths,
    (
        *baseline(lambda work: Rows(work).sampled),
        Implementation("drift_gate", drift_gate_rows),
    ),
    leaves=("now",),
)


def test_rows(measured, benchmark):
    replay(measured, benchmark)
