"""`expand`: from the coefficients of a row to the gradient in the logits.

Works: dense, alpha softmax and one entry (sampled tokens: one read, one write); sparse, alpha = 0
and K entries (LSM: one write).
"""

from __future__ import annotations

import torch
from drift_gate.bench import floors, internals
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.peers.guard import OtherWork, load
from drift_gate.bench.peers.sampled import hopper_only
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, forward
from drift_gate.bench.truth import Expected, Outputs, Truth, gradient
from torch import Tensor

DENSE, SPARSE = "dense, one entry", "sparse, K entries"


def coefficients(work: Work) -> tuple[Tensor, Tensor, Tensor]:
    """alpha [N], ids [N, K], beta [N, K] float64, of the size that a mean loss gives."""
    n = work.case.rows
    if work.case.what == DENSE:
        slope = (work.teacher.double() - work.now64) / n
        return slope, work.labels[:, None], -slope[:, None]
    beta = work.listed64.softmax(-1) - work.log_q.double().softmax(-1)
    return torch.zeros_like(work.now64), work.ids, beta / n


def eager(work: Work):
    alpha, ids, beta = coefficients(work)
    alpha, beta = alpha.float()[:, None], beta.float()

    def compute(logits: Tensor) -> Outputs:
        if work.case.what == DENSE:
            grad = logits.float().softmax(-1) * alpha
        else:
            grad = torch.zeros_like(logits, dtype=torch.float32)
        return {"grad": grad.scatter_add(1, ids, beta).to(logits.dtype)}

    return compute


def drift_gate_expand(inplace: bool):
    def make(work: Work):
        alpha, ids, beta = coefficients(work)
        expand = internals.expansion(work.logits, ids, alpha.float(), beta.float(), inplace)
        return forward(lambda logits: {"grad": expand(logits)})

    return make


def quack(work: Work):
    if work.case.what != DENSE:
        raise OtherWork("has no sparse backward")
    function = load("quack.cross_entropy", "cross_entropy_bwd")
    hopper_only(work.device)
    upstream, lse = coefficients(work)[0].float(), work.lse64.float()
    return forward(lambda logits: {"grad": function(logits, work.labels, upstream, lse)})


def truths(work: Work) -> dict[str, Truth]:
    return {"same": {"grad": Expected(gradient(work, *coefficients(work)), work.checked)}}


def floor(case: Case) -> floors.Floor:
    dense = case.what == DENSE
    return floors.expand(case, 1 if dense else case.k, read=dense)


SUITE = Suite(
    "expand",
    (DENSE, SPARSE),
    lambda on_gpu: Case(DENSE, 8192 if on_gpu else 1024, 151_936, "bfloat16", k=64),
    draw,
    floor,
    truths,
    (
        *baseline(eager, forward, temporaries=10),
        Implementation("drift_gate", drift_gate_expand(False), temporaries=4),
        Implementation("drift_gate, in place", drift_gate_expand(True), "", "same", 0, True),
        Implementation("quack cross_entropy backward", quack, temporaries=4),
    ),
)


def test_expand(measured, benchmark):
    replay(measured, benchmark)
