"""`linear_topk_loss`: distillation from the teacher's top K, from hidden states and head.

Works, forward and backward, gated: LSM, one product and a sparse backward; LSM with the current
log-probs supplied, no product at all; LSM whose gate measures the drift at every 8th position, one
product with those rows; the truncated forward KL that VeOmni computes.
"""

from __future__ import annotations

import torch
from drift_gate.bench import floors
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.linear import GRADIENTS, bare_gemms, head
from drift_gate.bench.peers import lists, plain
from drift_gate.bench.peers.guard import OtherWork
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, ours, train
from drift_gate.bench.truth import Truth, sampled_or_listed
from torch import Tensor
from torch.nn import functional

from drift_gate import DriftGate

LSM, GIVEN, TRUNCATED = "LSM", "LSM, log-probs given", "truncated forward KL"
SAMPLED, EVERY = "LSM, drift at every 8th", 8
OPTIONS = {
    LSM: {},
    GIVEN: {},
    SAMPLED: dict(gate=DriftGate(sample_every=EVERY)),
    TRUNCATED: dict(direction="forward", support="truncated"),
}


def position_losses(work: Work, listed: Tensor) -> Tensor:
    loss = plain.truncated_forward if work.case.what == TRUNCATED else plain.lsm
    return loss(listed, work.log_q)


def every(work: Work) -> int:
    """The gate's `sample_every`."""
    return EVERY if work.case.what == SAMPLED else 1


def eager(work: Work):
    rows = plain.Rows(work)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        table = plain.log_probs(functional.linear(hidden, weight))
        losses = position_losses(work, table.gather(-1, work.ids))
        return rows.gated(plain.at(table.detach(), work.labels), losses, every(work))

    return loss


def drift_gate_loss(work: Work):
    function = ours("linear_topk_loss")
    arguments = work.labels, work.old, work.ids, work.log_q
    options = dict(OPTIONS[work.case.what])
    if work.case.what == GIVEN:
        options["log_probs"] = work.now64.float()
    return train(lambda hidden, weight: function(hidden, weight, *arguments, **options).loss)


def veomni(gate: bool):
    def make(work: Work):
        if work.case.what != TRUNCATED:
            raise OtherWork("computes the truncated forward KL alone")
        function, rows = lists.veomni(work.device), plain.Rows(work)

        def loss(hidden: Tensor, weight: Tensor) -> Tensor:
            losses, now = function(hidden, weight, work.labels, work.ids, work.log_q)
            return rows.gated(now.detach(), losses) if gate else losses.mean()

        return train(loss)

    return make


def truths(work: Work) -> dict[str, Truth]:
    rows = plain.Rows(work, torch.float64)

    def losses(lse: Tensor, listed: Tensor) -> Tensor:
        return position_losses(work, listed - lse[:, None])

    return {
        "same": sampled_or_listed(
            work, lambda now, lse, z: rows.gated(now.detach(), losses(lse, z), every(work))
        ),
        "no gate": sampled_or_listed(work, lambda now, lse, z: losses(lse, z).mean()),
    }


def floor(case: Case) -> floors.Floor:
    products = {LSM: 1, GIVEN: 0, SAMPLED: 1 / EVERY, TRUNCATED: 3}[case.what]
    return floors.linear(case, products) + floors.rows(case) + floors.topk_rows(case)


SUITE = Suite(
    "linear_topk_loss",
    (LSM, GIVEN, SAMPLED, TRUNCATED),
    lambda on_gpu: head(on_gpu, LSM, k=64),
    draw,
    floor,
    truths,
    (
        *baseline(eager),
        Implementation("drift_gate", drift_gate_loss, temporaries=2),
        bare_gemms(3),
        Implementation(
            "VeOmni chunk_topk_distill", veomni(True), "gate eager", "same", temporaries=6
        ),
        Implementation(
            "VeOmni chunk_topk_distill, no gate", veomni(False), "no gate", "no gate", 6
        ),
    ),
    leaves=GRADIENTS,
)


def test_linear_topk_loss(measured, benchmark):
    replay(measured, benchmark)
