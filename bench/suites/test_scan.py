"""`scan`: log-prob and entropy of every row from one read of the logits. Forward alone.

Works: with the entropy, and without.
"""

from __future__ import annotations

from drift_gate.bench import floors, internals
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.peers import plain, sampled
from drift_gate.bench.peers.guard import LeftOut, OtherWork, Peer, load
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, forward
from drift_gate.bench.truth import Expected, Outputs, Truth
from torch import Tensor

BOTH, ALONE = "log-prob and entropy", "log-prob"


def eager(work: Work):
    def compute(logits: Tensor) -> Outputs:
        table = plain.log_probs(logits)
        found = {"log_probs": plain.at(table, work.labels)}
        return found | ({"entropy": plain.entropy(table)} if work.case.what == BOTH else {})

    return compute


def drift_gate_scan(work: Work):
    ids, both = work.labels[:, None], work.case.what == BOTH

    def compute(logits: Tensor) -> Outputs:
        log_probs, entropy = internals.scan(logits, ids, both)
        return {"log_probs": log_probs[:, 0]} | ({"entropy": entropy} if both else {})

    return forward(compute)


def trl(work: Work):
    if work.case.what != BOTH:
        raise OtherWork("in the other work with the entropy")
    function = load("trl.trainer.utils", "selective_log_softmax_and_entropy")

    def compute(logits: Tensor) -> Outputs:
        arguments = logits[None], work.labels[None]  # [B, T, V]
        log_probs, entropy = function(*arguments, entropy_requires_grad=False)
        return {"log_probs": log_probs[0], "entropy": entropy[0]}

    return forward(compute)


def of(peer: Peer) -> Implementation:
    """A peer's log-probs, which come without the entropy."""

    def make(work: Work):
        if work.case.what == BOTH and peer.overwrites:
            raise LeftOut("overwrites the logits that the entropy needs")
        function = peer.load(work.device)

        def compute(logits: Tensor) -> Outputs:
            found = {"log_probs": function(logits, work.labels)}
            if work.case.what == BOTH:
                found["entropy"] = plain.entropy(plain.log_probs(logits))
            return found

        return forward(compute)

    return Implementation(
        peer.name, make, "log-prob; the entropy, where asked for, eager", "same", peer.temporaries,
        peer.overwrites, peer.compiles,
    )  # fmt: skip


def truths(work: Work) -> dict[str, Truth]:
    return {"same": {"log_probs": Expected(work.now64), "entropy": Expected(work.entropy64)}}


SUITE = Suite(
    "scan",
    (BOTH, ALONE),
    lambda on_gpu: Case(BOTH, 8192 if on_gpu else 1024, 151_936, "bfloat16"),
    draw,
    lambda case: floors.scan(case, 1, with_entropy=case.what == BOTH),
    truths,
    (
        *baseline(eager, forward),
        Implementation("drift_gate", drift_gate_scan, temporaries=0),
        Implementation("TRL selective_log_softmax_and_entropy", trl),
        *map(of, sampled.FROM_LOGITS),
    ),
)


def test_scan(measured, benchmark):
    replay(measured, benchmark)
