"""`opd_loss`: the gated sampled-token loss from logits.

Works: forward and backward; forward alone, with the entropy.
"""

from __future__ import annotations

import torch
from drift_gate.bench import floors
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.peers import plain, sampled
from drift_gate.bench.peers.guard import OtherWork, Peer, load
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, finished, forward, train
from drift_gate.bench.truth import Expected, Outputs, Truth, sampled_or_listed
from torch import Tensor

from drift_gate import opd_loss

TRAIN, FORWARD = "forward and backward", "forward, with entropy"


def timed(work: Work, loss):
    """Forward and backward of a loss, or the outputs of the forward."""
    return train(loss) if work.case.what == TRAIN else forward(loss)


def eager_loss(work: Work):
    rows = plain.Rows(work)

    def loss(logits: Tensor) -> Tensor:
        return rows.sampled(plain.at(plain.log_probs(logits), work.labels))

    def outputs(logits: Tensor) -> Outputs:
        table = plain.log_probs(logits)
        now = plain.at(table, work.labels)
        return {"loss": rows.sampled(now), "log_probs": now, "entropy": plain.entropy(table)}

    return loss if work.case.what == TRAIN else outputs


def of_work(function):
    """`timed` where the work is not known until the run: by what the function returns."""

    def run(*leaves: Tensor) -> Outputs:
        value = function(*leaves)
        if isinstance(value, dict):
            return value
        (grad,) = torch.autograd.grad(value, leaves)
        return {"loss": value.detach(), "grad": grad}

    return run


def drift_gate_loss(inplace: bool):
    def make(work: Work):
        arguments = work.labels, work.old, work.teacher

        def loss(logits: Tensor) -> Tensor:
            return opd_loss(logits, *arguments, inplace_backward=inplace).loss

        def outputs(logits: Tensor) -> Outputs:
            found = opd_loss(logits, *arguments, return_entropy=True)
            return {"loss": found.loss, "log_probs": found.log_probs, "entropy": found.entropy}

        if work.case.what == TRAIN:
            return train(loss)
        if inplace:
            raise OtherWork("nothing to overwrite in a forward")
        return forward(outputs)

    return make


def gated(work: Work, function):
    """A peer's log-probs; clip and gate eagerly."""
    only_training(work)
    rows = plain.Rows(work)
    return lambda logits: rows.sampled(function(logits, work.labels))


def trl_both(work: Work):
    """TRL's log-prob and entropy from one read, the forward alone; clip and gate eagerly."""
    if work.case.what != FORWARD:
        raise OtherWork("forward and backward go through its log-prob")
    function, rows = (
        load("trl.trainer.utils", "selective_log_softmax_and_entropy"),
        plain.Rows(work),
    )

    def outputs(logits: Tensor) -> Outputs:
        now, entropy = function(logits[None], work.labels[None])  # [B, T, V]
        return {"loss": rows.sampled(now[0]), "log_probs": now[0], "entropy": entropy[0]}

    return forward(outputs)


def cross_entropy(work: Work, function):
    """A peer's mean log-prob."""
    only_training(work)
    return lambda logits: -function(logits, work.labels)


def only_training(work: Work) -> None:
    if work.case.what != TRAIN:
        raise OtherWork("its forward alone is in the suite scan")


def _mean(peer: Peer) -> Implementation:
    note = "cross entropy alone: no clip, no gate"
    return finished(peer, cross_entropy, note, "cross entropy", ", mean")


def truths(work: Work) -> dict[str, Truth]:
    rows = plain.Rows(work, torch.float64)
    same = sampled_or_listed(work, lambda now, lse, listed: rows.sampled(now))
    if work.case.what != TRAIN:
        del same["grad"]
        same |= {"log_probs": Expected(work.now64), "entropy": Expected(work.entropy64)}
        return {"same": same}
    plainly = sampled_or_listed(work, lambda now, lse, listed: -now.mean())
    return {"same": same, "cross entropy": plainly}


def floor(case: Case) -> floors.Floor:
    once = floors.scan(case, 1, with_entropy=case.what != TRAIN) + floors.rows(case)
    return once + floors.expand(case, 1) if case.what == TRAIN else once


def live(work: Work) -> int:
    """Rows that PPO does not clip: the backward reads those alone."""
    now = work.now64.clone().requires_grad_()
    (slope,) = torch.autograd.grad(plain.Rows(work, torch.float64).sampled(now), now)
    return int((slope != 0).sum())


SUITE = Suite(
    "opd_loss",
    (TRAIN, FORWARD),
    lambda on_gpu: Case(TRAIN, 8192 if on_gpu else 1024, 151_936, "bfloat16"),
    draw,
    floor,
    truths,
    (
        *baseline(eager_loss, of_work),
        Implementation("drift_gate", drift_gate_loss(False), temporaries=4),
        Implementation("drift_gate, in place", drift_gate_loss(True), "", "same", 0, True),
        Implementation(
            "TRL selective_log_softmax_and_entropy",
            trl_both,
            "clip and gate eager",
            temporaries=4,
        ),
        *(finished(p, gated, "log-prob; clip and gate eager") for p in sampled.FROM_LOGITS),
        *map(_mean, sampled.MEANS_FROM_LOGITS),
    ),
    live=live,
)


def test_opd_loss(measured, benchmark):
    replay(measured, benchmark)
