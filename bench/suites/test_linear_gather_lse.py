"""`linear_gather_lse`: K entries and the logsumexp of every row through the head, differentiable.

The loss over them is their mean, so that both reach the backward: three products.
"""

from __future__ import annotations

from drift_gate.bench import floors
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.linear import GRADIENTS, bare_gemms, head
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, ours, train
from drift_gate.bench.truth import Truth, sampled_or_listed
from torch import Tensor
from torch.nn import functional

TRAIN = "forward and backward"


def loss_of(z: Tensor, lse: Tensor) -> Tensor:
    return (lse[:, None] - z).mean()


def eager(work: Work):
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = functional.linear(hidden, weight).float()
        return loss_of(logits.gather(-1, work.ids), logits.logsumexp(-1))

    return loss


def drift_gate_loss(work: Work):
    function = ours("linear_gather_lse")
    return train(lambda hidden, weight: loss_of(*function(hidden, weight, work.ids)))


def truths(work: Work) -> dict[str, Truth]:
    return {"same": sampled_or_listed(work, lambda now, lse, z: loss_of(z, lse))}


SUITE = Suite(
    "linear_gather_lse",
    (TRAIN,),
    lambda on_gpu: head(on_gpu, TRAIN, k=64),
    draw,
    lambda case: floors.linear(case, 3),
    truths,
    (
        *baseline(eager),
        Implementation("drift_gate", drift_gate_loss, temporaries=2),
        bare_gemms(3),
    ),
    leaves=GRADIENTS,
)


def test_linear_gather_lse(measured, benchmark):
    replay(measured, benchmark)
