"""`linear_opd_loss`: the gated sampled-token loss from hidden states and head; three products."""

from __future__ import annotations

import torch
from drift_gate.bench import floors
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.linear import GRADIENTS, bare_gemms, head
from drift_gate.bench.names import OURS, WIDE, WIDE_WHOLE
from drift_gate.bench.peers import plain, sampled
from drift_gate.bench.peers.guard import Peer
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, finished, ours, train
from drift_gate.bench.truth import Truth, sampled_or_listed
from torch import Tensor
from torch.nn import functional

TRAIN = "forward and backward"


def eager(work: Work):
    rows = plain.Rows(work)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        table = plain.log_probs(functional.linear(hidden, weight))
        return rows.sampled(plain.at(table, work.labels))

    return loss


def drift_gate_loss(work: Work, **options):
    """options: of the head."""
    function, make = ours("linear_opd_loss"), ours("Head")
    arguments = work.labels, work.old, work.teacher

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return function(hidden, make(weight, **options), *arguments).loss

    return train(loss)


def wide(work: Work):
    return drift_gate_loss(work, logits_dtype=torch.float32)


def wide_whole(work: Work):
    return drift_gate_loss(work, logits_dtype=torch.float32, chunk_size=work.case.rows)


def gated(work: Work, function):
    rows = plain.Rows(work)
    return lambda hidden, weight: rows.sampled(function(hidden, weight, work.labels))


def cross_entropy(work: Work, function):
    return lambda hidden, weight: -function(hidden, weight, work.labels)


def liger_grpo(work: Work):
    function = sampled.liger_grpo(work.device)
    row_data = work.labels, work.teacher - work.old, work.old
    return train(lambda hidden, weight: function(hidden, weight, *row_data))


def _mean(peer: Peer) -> Implementation:
    note = "cross entropy alone: no clip, no gate"
    return finished(peer, cross_entropy, note, "cross entropy", ", mean")


def truths(work: Work) -> dict[str, Truth]:
    rows = plain.Rows(work, torch.float64)
    return {
        "same": sampled_or_listed(work, lambda now, lse, z: rows.sampled(now)),
        "clipped": sampled_or_listed(work, lambda now, lse, z: rows.clipped(now)),
        "cross entropy": sampled_or_listed(work, lambda now, lse, z: -now.mean()),
    }


SUITE = Suite(
    "linear_opd_loss",
    (TRAIN,),
    lambda on_gpu: head(on_gpu, TRAIN),
    draw,
    lambda case: floors.linear(case, 3) + floors.rows(case),
    truths,
    (
        *baseline(eager),
        Implementation(OURS, drift_gate_loss, temporaries=2),
        Implementation(WIDE, wide, temporaries=6),
        Implementation(WIDE_WHOLE, wide_whole, temporaries=6),
        bare_gemms(3),
        *(finished(p, gated, "log-prob; clip and gate eager") for p in sampled.FROM_HIDDEN),
        *map(_mean, sampled.MEANS_FROM_HIDDEN),
        Implementation("Liger fused linear GRPO", liger_grpo, "no gate, no dual clip", "clipped"),
    ),
    leaves=GRADIENTS,
)


def test_linear_opd_loss(measured, benchmark):
    replay(measured, benchmark)
