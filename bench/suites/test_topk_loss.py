"""`topk_loss`: distillation from the teacher's K likeliest words, from logits.

Works, forward and backward, gated by the sampled tokens' drift: LSM (reverse, renormalised), and
the truncated forward KL that verl and VeOmni compute.
"""

from __future__ import annotations

import torch
from drift_gate.bench import floors
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.names import COMPILED
from drift_gate.bench.peers import lists, plain
from drift_gate.bench.peers.guard import OtherWork, Peer
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, compiled, finished, train
from drift_gate.bench.truth import Truth, sampled_or_listed
from torch import Tensor

from drift_gate import topk_loss

LSM, TRUNCATED = "LSM", "truncated forward KL"
OPTIONS = {LSM: {}, TRUNCATED: dict(direction="forward", support="truncated")}


def position_losses(work: Work, listed: Tensor) -> Tensor:
    """From log-probs of the list: those of the full softmax serve LSM as the logits do."""
    loss = plain.lsm if work.case.what == LSM else plain.truncated_forward
    return loss(listed, work.log_q)


def eager(work: Work):
    """As trainers write it: log-probs of all words, then the list."""
    rows = plain.Rows(work)

    def loss(logits: Tensor) -> Tensor:
        table = plain.log_probs(logits)
        losses = position_losses(work, table.gather(-1, work.ids))
        return rows.gated(plain.at(table.detach(), work.labels), losses)

    return loss


def gathered_first(work: Work):
    """As NeMo-RL does since its PR 3314: K columns, and a detached logsumexp for the drift."""
    if work.case.what != LSM:
        raise OtherWork("needs the logsumexp's gradient")
    rows = plain.Rows(work)

    def loss(logits: Tensor) -> Tensor:
        with torch.no_grad():
            now = plain.at(logits, work.labels).float() - logits.float().logsumexp(-1)
        return rows.gated(now, plain.lsm(logits.gather(-1, work.ids).float(), work.log_q))

    return loss


def drift_gate_loss(inplace: bool):
    def make(work: Work):
        arguments = work.labels, work.old, work.ids, work.log_q
        options = OPTIONS[work.case.what] | dict(inplace_backward=inplace)
        return train(lambda logits: topk_loss(logits, *arguments, **options).loss)

    return make


def gated(work: Work, function):
    """A peer's log-probs of the list and of the label; divergence and gate eagerly."""
    rows = plain.Rows(work)
    ids = torch.cat([work.labels[:, None], work.ids], 1)

    def loss(logits: Tensor) -> Tensor:
        listed = function(logits, ids).float()
        return rows.gated(listed[:, 0].detach(), position_losses(work, listed[:, 1:]))

    return loss


def ungated(work: Work, function):
    """A peer's log-probs of the list and the divergence."""
    return lambda logits: position_losses(work, function(logits, work.ids).float()).mean()


def _of(peer: Peer) -> tuple[Implementation, Implementation]:
    return (
        finished(peer, gated, "log-probs of list and label; divergence and gate eager"),
        finished(peer, ungated, "log-probs of the list; no gate", "no gate", ", no gate"),
    )


def truths(work: Work) -> dict[str, Truth]:
    rows = plain.Rows(work, torch.float64)

    def losses(lse: Tensor, listed: Tensor) -> Tensor:
        return position_losses(work, listed - lse[:, None])

    return {
        "same": sampled_or_listed(
            work, lambda now, lse, z: rows.gated(now.detach(), losses(lse, z))
        ),
        "no gate": sampled_or_listed(work, lambda now, lse, z: losses(lse, z).mean()),
    }


def floor(case: Case) -> floors.Floor:
    """LSM has alpha = 0: its backward does not read."""
    row_data = floors.rows(case) + floors.topk_rows(case)
    listed = case.k + 1
    return floors.scan(case, listed) + floors.expand(case, listed, read=case.what != LSM) + row_data


SUITE = Suite(
    "topk_loss",
    (LSM, TRUNCATED),
    lambda on_gpu: Case(LSM, 8192 if on_gpu else 1024, 151_936, "bfloat16", k=64),
    draw,
    floor,
    truths,
    (
        *baseline(eager),
        Implementation("eager, gathered first", lambda work: train(gathered_first(work))),
        Implementation(
            f"{COMPILED}, gathered first",
            lambda work: train(compiled(gathered_first(work))),
            compiles=True,
        ),
        Implementation("drift_gate", drift_gate_loss(False), temporaries=4),
        Implementation("drift_gate, in place", drift_gate_loss(True), "", "same", 0, True),
        *(one for peer in lists.FROM_LOGITS for one in _of(peer)),
    ),
)


def test_topk_loss(measured, benchmark):
    replay(measured, benchmark)
