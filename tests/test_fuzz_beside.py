"""What the fuzzer draws around a call: another loss of the same leaves, and logits whose rows share
memory."""

from __future__ import annotations

import inspect

import pytest
import torch

import drift_gate
from drift_gate.call import logits
from drift_gate.fuzz import run
from drift_gate.fuzz.evaluate import build, run_backend
from drift_gate.fuzz.functions import FUNCTIONS
from drift_gate.fuzz.verdict import faults

CPU = torch.device("cpu")
WRITERS = [
    name
    for name in FUNCTIONS
    if "inplace_backward" in inspect.signature(getattr(drift_gate, name)).parameters
]
SHARED = [
    {"rows": 3, "vocab": 5, "logits overlap": "expanded"},
    {"batch": "padded", "sequences": 2, "length": 3, "vocab": 5, "logits overlap": "windows"},
    {"batch": "padded", "sequences": 3, "vocab": 1, "logits overlap": "windows"},
]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("case", SHARED, ids=lambda case: case["logits overlap"])
def test_logits_that_overlap_are_drawn(name, case):
    """In place they are refused, which is a part of the verdict; else they are logits as any."""
    for inplace in (False, True):
        choices = {**case, "inplace_backward": inplace, "support": "truncated", "k": 1}
        problem = build(name, run.recorded(choices), ("torch",), CPU)
        assert logits.overlaps(problem.arguments["logits"]) == (case["vocab"] > 1)
        assert problem.refused == (inplace and case["vocab"] > 1)
        assert faults(problem)[0] == []


@pytest.mark.parametrize("name", WRITERS)
def test_a_gradient_over_logits_that_overlap_is_seen(monkeypatch, name):
    monkeypatch.setattr(logits, "overlaps", lambda x: False)
    case = {"function": name, "inplace_backward": True, "logits overlap": "expanded"}
    wrong = run.replay(case | {"rows": 3, "vocab": 5}, "torch", CPU)
    assert wrong is not None and "would be written over logits that overlap" in wrong


LEAVES = [name for name in FUNCTIONS if name not in ("gate_weights", "newline_spans")]


@pytest.mark.parametrize("name", LEAVES)
def test_a_loss_beside_adds_its_gradient(name):
    case = {"rows": 3, "vocab": 5, "mask": "a hole", "seed": 3}
    alone, both = (
        build(name, run.recorded(case | {"a loss beside": beside}), ("torch",), CPU)
        for beside in (False, True)
    )
    assert both.saved()["a loss beside"] and faults(both)[0] == []
    got, wanted = run_backend(both)[0], run_backend(alone)[0]
    assert got.keys() == wanted.keys()
    for key, x in got.items():
        assert torch.equal(x, wanted[key]) != key.startswith("grad "), key


def test_in_place_beside_another_loss(monkeypatch):
    """Autograd puts the sum elsewhere; the memory around the logits stays as it was."""
    case = {"function": "opd_loss", "rows": 3, "vocab": 5, "logits layout": "wide rows"}
    case |= {"inplace_backward": True, "a loss beside": True}
    assert run.replay(case, "torch", CPU) is None
