"""`top_k_log_probs`: the K likeliest words of every row and their log-probs. Forward alone.

How a teacher is scored. `torch.topk` of the whole logits, without log-probs, stands beside.

    drift-gate bench quick top_k_log_probs linear_top_k_log_probs

takes under a minute on a GPU.
"""

from __future__ import annotations

import torch
from drift_gate.bench import floors
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.inputs import Work, draw
from drift_gate.bench.peers import plain
from drift_gate.bench.replay import replay
from drift_gate.bench.runs import baseline, forward, ours
from drift_gate.bench.truth import Expected, Outputs, Truth
from torch import Tensor

TOP_K = "top K"


def eager(work: Work):
    """As trainers and engines write it: log-probs of all words, then the list."""

    def compute(logits: Tensor) -> Outputs:
        return {"log_probs": plain.log_probs(logits).topk(work.case.k).values}

    return compute


def listed_first(work: Work):
    """The list of the logits as they are, and a logsumexp."""

    def compute(logits: Tensor) -> Outputs:
        listed = logits.topk(work.case.k).values.float()
        return {"log_probs": listed - logits.float().logsumexp(-1, keepdim=True)}

    return forward(compute)


def topk_alone(work: Work):
    return forward(lambda logits: {"logits": torch.topk(logits, work.case.k).values})


def drift_gate_lists(work: Work):
    function = ours("top_k_log_probs")
    return forward(lambda logits: {"log_probs": function(logits, work.case.k).log_probs})


def truths(work: Work) -> dict[str, Truth]:
    """Of the checked rows."""
    log_p = work.logits64(work.checked).log_softmax(-1)
    return {"same": {"log_probs": Expected(log_p.topk(work.case.k).values, work.checked)}}


SUITE = Suite(
    "top_k_log_probs",
    (TOP_K,),
    lambda on_gpu: Case(TOP_K, 8192 if on_gpu else 1024, 151_936, "bfloat16", k=64),
    draw,
    floors.top_k,
    truths,
    (
        *baseline(eager, forward),
        Implementation("drift_gate", drift_gate_lists, temporaries=1),
        Implementation("torch.topk, then logsumexp", listed_first, temporaries=6),
        Implementation("torch.topk", topk_alone, "no log-probs: the list alone", "nothing"),
    ),
)


def test_top_k_log_probs(measured, benchmark):
    replay(measured, benchmark)
