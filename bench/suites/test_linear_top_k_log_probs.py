"""`linear_top_k_log_probs`: the K likeliest words of every row through the head. Forward alone."""

from __future__ import annotations

from drift_gate.bench import floors
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.linear import GRADIENTS, bare_gemms, head
from drift_gate.bench.peers import plain
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, forward, ours
from drift_gate.bench.truth import Expected, Outputs, Truth
from torch import Tensor

TOP_K = "top K"


def eager(work: Work):
    def compute(hidden: Tensor, weight: Tensor) -> Outputs:
        return {"log_probs": plain.log_probs(hidden @ weight.T).topk(work.case.k).values}

    return compute


def drift_gate_lists(work: Work):
    function = ours("linear_top_k_log_probs")

    def compute(hidden: Tensor, weight: Tensor) -> Outputs:
        return {"log_probs": function(hidden, weight, work.case.k).log_probs}

    return forward(compute)


def truths(work: Work) -> dict[str, Truth]:
    """Of the checked rows."""
    log_p = work.logits64(work.checked).log_softmax(-1)
    return {"same": {"log_probs": Expected(log_p.topk(work.case.k).values, work.checked)}}


SUITE = Suite(
    "linear_top_k_log_probs",
    (TOP_K,),
    lambda on_gpu: head(on_gpu, TOP_K, k=64),
    draw,
    lambda case: floors.linear(case, 1),
    truths,
    (
        *baseline(eager, forward),
        Implementation("drift_gate", drift_gate_lists, temporaries=1),
        bare_gemms(1),
    ),
    leaves=GRADIENTS,
)


def test_linear_top_k_log_probs(measured, benchmark):
    replay(measured, benchmark)
