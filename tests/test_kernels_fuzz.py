"""The fuzzer on kernels: shrunk cases of what it found there, and a few problems of every function.

Bounds are exact, padding and uninitialised memory hold NaN; a GPU checks values alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import KERNELS

from drift_gate import full_loss, token_log_probs
from drift_gate.fuzz import run
from drift_gate.fuzz.functions import FUNCTIONS

# By what they once showed.
FOUND = {
    "a gate that is NaN, where no mean is asked for, in the other micro-batches": {
        "function": "opd_loss",
        "batch": "padded",
        "sequences": 3,
        "length": 2,
        "seed": 5,
        "normalize": "none",
        "drift": "nan",
        "micro-batches": 3,
    },
    "words outside the list, which the teacher rules out": {
        "function": "topk_loss",
        "rows": 3,
        "vocab": 33,
        "special": "-inf words",
        "support": "truncated",
        "zero_outside_topk": True,
    },
    "and through a head": {
        "function": "linear_topk_loss",
        "rows": 3,
        "vocab": 33,
        "softcap": 5.0,
        "chunk size": 2,
        "direction": "mixed",
        "support": "truncated",
        "zero_outside_topk": True,
    },
    "weights whose squares are none of float32's": {
        "function": "linear_topk_loss",
        "batch": "packed",
        "sequences": 3,
        "length 2": 5,
        "vocab": 5,
        "seed": 9379,
        "temperature": 2.0,
        "bias": True,
        "softcap": 0.5,
        "labels": "any",
        "ignored labels": True,
        "mask": "late",
        "tau": 30.0,
        "normalize": "none",
        "drift": "1e30",
        "log_probs": True,
    },
    "row data that is a column was read as if contiguous": {
        "function": "opd_loss",
        "rows": 2,
        "no gate": True,
        "strided old_log_probs": True,
    },
    "labels that are a column were read as if contiguous, in the backward": {
        "function": "token_log_probs",
        "rows": 2,
        "strided row data": True,
    },
    "and of a head": {
        "function": "linear_token_log_probs",
        "rows": 2,
        "strided row data": True,
    },
    "metrics of NaN weights": {"function": "opd_loss", "special": "-inf row"},
    "a NaN counted as clipped": {
        "function": "opd_loss",
        "special": "-inf row",
        "estimator": "k1",
        "no gate": True,
        "no old log-probs": True,
    },
    "the overlap of a NaN": {
        "function": "topk_loss",
        "special": "-inf row",
        "no gate": True,
        "no old log-probs": True,
    },
    "an infinite forward KL of a mass that float32 loses": {
        "function": "topk_loss",
        "vocab": 17,
        "seed": 200,
        "logits": "wide",
        "special": "-inf words",
        "no gate": True,
        "no old log-probs": True,
        "support": "truncated",
        "k": 17,
        "direction": "forward",
    },
    "a JSD over log 2, of logits whose products with 1 / temperature round": {
        "function": "full_loss",
        "batch": "packed",
        "sequences": 3,
        "vocab": 11,
        "logits": "offset",
        "temperature": 0.05,
        "ignored labels": True,
        "no gate": True,
        "teacher": "far",
        "direction": "jsd",
    },
}


# Options that change what kernels do to memory, by turns.
OPTIONS: dict[str, list[Any]] = {
    "vocab": [17, 1, 65, 8],
    "dtype": ["bfloat16", "float32", "float16"],
    "rows": [3, 1, 5],
    "logits layout": ["wide rows", "off a boundary"],
    "mask": ["some", "a hole", "absent"],
    "tiles": ["small"],
    "programs": [1, 9],
    "inplace_backward": [True, False],
    "return_entropy": [False, True],
    "teacher layout": ["aligned wide rows", "off a boundary"],
    "row weights": ["some 0", "absent"],
    "ratio": ["block", "span", "token"],
    "words in any place again": [True, False],
}


def judge(case: dict[str, Any], device: torch.device) -> None:
    choices = dict(case)
    problem = run.build(choices.pop("function"), run.recorded(choices), ("triton",), device)
    run.judge(problem)


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND.keys())
def test_what_was_found_stays_fixed(kernels_on_cpu: torch.device, case: dict[str, Any]) -> None:
    judge(case, kernels_on_cpu)


@pytest.mark.skipif(KERNELS != "interpret", reason="asks the interpreter for each address")
@pytest.mark.parametrize("function", ["token_log_probs", "full_loss"])
def test_rows_that_are_not_valid_are_not_loaded(
    kernels_on_cpu: torch.device, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    from drift_gate.fuzz import interpreter

    logits = torch.randn(1, 3, 100)
    labels = torch.tensor([[5, -100, 7]])
    forbidden = range(logits[0, 1].data_ptr(), logits[0, 2].data_ptr())

    class WithoutTheRow(interpreter.Extents):
        def outside(self, addresses: Any) -> Any:
            inside_row = (addresses >= forbidden.start) & (addresses < forbidden.stop)
            return super().outside(addresses) | inside_row

    monkeypatch.setattr(interpreter, "Extents", WithoutTheRow)
    if function == "token_log_probs":
        token_log_probs(logits, labels, backend="triton")
    else:
        full_loss(logits, labels, None, logits.clone(), gate=None, backend="triton")
    with pytest.raises(interpreter.KernelFault):
        token_log_probs(logits, torch.tensor([[5, 6, 7]]), backend="triton")


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f.endswith(("loss", "lse"))])
def test_memory(kernels_on_cpu: torch.device, function: str) -> None:
    turns = {name: itertools.cycle(values) for name, values in OPTIONS.items()}
    for seed in range(3 if KERNELS == "interpret" else 1):  # the emulator compiles each
        drawn = {name: next(turn) for name, turn in turns.items()}
        judge({"function": function, "seed": seed, **drawn}, kernels_on_cpu)
