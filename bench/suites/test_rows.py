"""Gate and row functions of sampled tokens: drift of blocks, gate, unit mean, loss, its slope."""

from __future__ import annotations

from drift_gate.bench import floors
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw_rows
from drift_gate.bench.peers.plain import BLOCK, Rows
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import backend, baseline, train
from drift_gate.bench.truth import Expected, Truth
from torch import Tensor

from drift_gate import rows


def drift_gate_rows(work: Work):
    n, chosen = work.case.rows, backend(work.now)
    valid = work.old == work.old

    def loss(now: Tensor) -> Tensor:
        blocks, _ = rows.row_blocks(
            now.detach(), work.old, valid, None, None, n, "block", BLOCK, "mean", False, chosen
        )
        return rows.sampled_token(
            now, work.old, work.teacher, valid, blocks, None, n, 1.0, "batch", "ppo",
            0.2, 0.2, 3.0, None, 1.0, "tokens", False, chosen,
        )[0]  # fmt: skip

    return train(loss)


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
