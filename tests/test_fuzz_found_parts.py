"""What `drift-gate fuzz` found over ranks and micro-batches, shrunk, stays fixed."""

from __future__ import annotations

from support.found import CPU, each

from drift_gate.fuzz import run

# Shrunk cases, by what they once showed.
FOUND = {
    "a shard of likeliest words that are all NaN": {
        "function": "top_k_log_probs",
        "vocab": 3,
        "dtype": "bfloat16",
        "special": "nan",
        "ranks": 3,
    },
    "T of sequences cut over ranks": {
        "function": "opd_loss",
        "batch": "padded",
        "length": 9,
        "vocab": 3,
        "reduction": "seq-mean-token-sum-norm",
        "ranks": 3,
        "ranks share": "positions",
    },
    "an invalid row beside a NaN on another rank": {
        "function": "topk_loss",
        "batch": "padded",
        "sequences": 2,
        "length": 5,
        "vocab": 5,
        "special": "nan",
        "mask": "some",
        "ranks": 2,
    },
    "a rank whose every drift is infinite": {
        "function": "topk_loss",
        "batch": "padded",
        "sequences": 2,
        "vocab": 5,
        "granularity": "token",
        "drift": "infinite",
        "ranks": 2,
        "seed": 2,
    },
    "a rank whose every drift is infinite, of a head": {
        "function": "linear_topk_loss",
        "batch": "padded",
        "sequences": 2,
        "vocab": 5,
        "granularity": "token",
        "drift": "infinite",
        "support": "truncated",
        "ranks": 2,
        "seed": 3,
    },
    "a micro-batch whose every drift is infinite": {
        "function": "topk_loss",
        "batch": "padded",
        "sequences": 2,
        "vocab": 5,
        "granularity": "token",
        "drift": "infinite",
        "micro-batches": 2,
        "seed": 2,
    },
    "a mean gate of exp(-1e30), whose digits its logarithm lost": {
        "function": "gate_weights",
        "batch": "padded",
        "sequences": 2,
        "length": 3,
        "seed": 1,
        "granularity": "sequence",
        "drift": "1e30",
        "ranks": 2,
    },
    "a rank without rows beside a mean gate of exp(-1e30)": {
        "function": "linear_topk_loss",
        "batch": "padded",
        "mask": "some",
        "drift": "1e30",
        "ranks": 2,
    },
    "gates of sequences cut over ranks, from log-probs that counted padding words": {
        "function": "linear_full_loss",
        "batch": "padded",
        "length": 3,
        "vocab": 3,
        "granularity": "token",
        "normalize": "sequence",
        "vocab_size": True,
        "ranks": 3,
        "ranks share": "positions",
    },
    "more sequences than rows, of which most are empty, cut over ranks": {
        "function": "gate_weights",
        "batch": "packed",
        "sequences": 70,
        "ranks": 2,
        "ranks share": "positions",
    },
    "span ids of sequences cut over ranks, which float64 merged": {
        "function": "gate_weights",
        "batch": "padded",
        "sequences": 3,
        "length": 4,
        "granularity": "span",
        "span ids": 1 << 62,
        "ranks": 2,
        "ranks share": "positions",
    },
    "no gate, and sequences cut over ranks": {
        "function": "linear_topk_loss",
        "rows": 3,
        "a weight as head": True,
        "no gate": True,
        "ranks": 3,
    },
    "a row of weight 0 that holds a NaN, in micro-batches": {
        "function": "full_loss",
        "batch": "padded",
        "special": "-inf row",
        "row weights": "some 0",
        "micro-batches": 1,
    },
}


@each(FOUND)
def test_what_was_found_stays_fixed(case, backend):
    assert run.replay(case, backend, CPU) is None
