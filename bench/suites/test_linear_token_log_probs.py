"""`linear_token_log_probs`: log-probs of labels through the head; forward alone, one product."""

from __future__ import annotations

from drift_gate.bench import floors
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.linear import GRADIENTS, bare_gemms, head
from drift_gate.bench.peers import plain, sampled
from drift_gate.bench.peers.guard import Peer
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, forward, ours
from drift_gate.bench.truth import Expected, Outputs, Truth
from torch import Tensor
from torch.nn import functional

FORWARD = "log-prob"


def eager(work: Work):
    def compute(hidden: Tensor, weight: Tensor) -> Outputs:
        table = plain.log_probs(functional.linear(hidden, weight))
        return {"log_probs": plain.at(table, work.labels)}

    return compute


def drift_gate_log_probs(work: Work):
    function = ours("linear_token_log_probs")

    def compute(hidden: Tensor, weight: Tensor) -> Outputs:
        return {"log_probs": function(hidden, weight, work.labels)[0]}

    return forward(compute)


def of(peer: Peer) -> Implementation:
    def make(work: Work):
        function = peer.load(work.device)

        def compute(hidden: Tensor, weight: Tensor) -> Outputs:
            return {"log_probs": function(hidden, weight, work.labels)}

        return forward(compute)

    options = dict(temporaries=peer.temporaries, compiles=peer.compiles)
    return Implementation(peer.name, make, **options)


def truths(work: Work) -> dict[str, Truth]:
    return {"same": {"log_probs": Expected(work.now64)}}


SUITE = Suite(
    "linear_token_log_probs",
    (FORWARD,),
    lambda on_gpu: head(on_gpu, FORWARD),
    draw,
    lambda case: floors.linear(case, 1),
    truths,
    (
        *baseline(eager, forward),
        Implementation("drift_gate", drift_gate_log_probs, temporaries=2),
        bare_gemms(1),
        *map(of, sampled.FROM_HIDDEN),
    ),
    leaves=GRADIENTS,
)


def test_linear_token_log_probs(measured, benchmark):
    replay(measured, benchmark)
