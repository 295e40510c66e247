"""torch.library's opcheck of every op that a loss has, and of its backward."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from support.calls import WITHOUT_GRADIENT, leaves_of, step_of, tensors_of
from support.judge import FUSED
from support.problems import move
from torch.library import opcheck

from drift_gate import DriftGate, losses
from drift_gate.call.op import Op, flatten

CALLS: list[tuple[str, dict[str, Any]]] = [
    ("opd_loss", {"reduction": "seq-mean-token-mean"}),
    ("opd_loss", {"gate": None, "return_entropy": True}),
    ("topk_loss", {}),
    ("topk_loss", {"support": "tail", "direction": "jsd", "return_entropy": True}),
    ("full_loss", {"direction": "jsd", "return_entropy": True}),
    ("full_loss", {"direction": "forward", "ignore_index": 20, "vocab_size": 20, "gate": None}),
    ("gate_weights", {}),
    ("token_log_probs", {"return_entropy": True}),
    ("gather_lse", {}),
    ("linear_opd_loss", {}),
    ("linear_opd_loss", {"reduction": "none"}),
    ("linear_topk_loss", {"support": "truncated"}),
    ("linear_topk_loss", {"support": "tail", "reduction": "none"}),
    ("topk_loss", {"support": "truncated", "zero_outside_topk": True, "gate": None}),
    ("linear_topk_loss", {"support": "truncated", "zero_outside_topk": True}),
    ("linear_topk_loss", {}),
    ("linear_topk_loss", {"gate": DriftGate(sample_every=3), "return_entropy": True}),
    ("topk_loss", {"gate": DriftGate(sample_every=3)}),
    ("linear_full_loss", {}),
    ("linear_full_loss", {"reduction": "none"}),
    ("linear_token_log_probs", {}),
    ("linear_gather_lse", {}),
    ("top_k_log_probs", {"response_mask": torch.ones(2, 9)}),
    ("linear_top_k_log_probs", {}),
]
SETTINGS = [*((backend, torch.bfloat16) for backend in FUSED), ("torch", torch.float64)]
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
EACH_CALL = pytest.mark.parametrize(("name", "options"), CALLS, ids=str)


@pytest.fixture(autouse=True)
def nan_is_nan(monkeypatch):
    """opcheck takes NaN, which a drift is where it is not measured, for a difference."""
    same = functools.partial(torch.testing.assert_close, equal_nan=True)
    monkeypatch.setattr(torch.testing, "assert_close", same)


def ops() -> dict[str, Op]:
    """All that the modules of the losses have."""
    found = {}
    for module in pkgutil.iter_modules(losses.__path__):
        values = vars(importlib.import_module(f"{losses.__name__}.{module.name}")).values()
        found |= {x.name: x for x in values if isinstance(x, Op)}
    return found


def called(
    name: str, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> tuple[Op, Any]:
    """The op that a function calls, and its inputs."""
    calls: list[tuple[Op, Any]] = []
    original = Op.__call__

    def record(op: Op, x: Any) -> Any:
        calls.append((op, x))
        return original(op, x)

    monkeypatch.setattr(Op, "__call__", record)
    tensors = [move(x, dtype).clone() for x in tensors_of(name, 2, 9)]
    leaves_of(name, tensors)
    step_of(name, **options)(*tensors)
    ((op, x),) = calls
    return op, x


def test_the_calls_have_every_op(monkeypatch):
    seen = {called(*call, torch.float32, monkeypatch)[0].name for call in CALLS}
    assert seen == ops().keys()


@EACH_CALL
@pytest.mark.parametrize(("backend", "dtype"), SETTINGS, ids=str)
def test_opcheck(name, options, backend, dtype, monkeypatch):
    chosen = {} if name == "gate_weights" else {"backend": backend}
    op, x = called(name, options | chosen, dtype, monkeypatch)
    # A compiler is given no graph that returns what the backward is to overwrite, as the last of
    # the checks would; test_tracing.py compiles the graphs that the losses make.
    opcheck(op.library, tuple(flatten(x)), test_utils=CHECKS[: 3 if op.hands_out else 4])


@EACH_CALL
@pytest.mark.parametrize(("backend", "dtype"), SETTINGS, ids=str)
def test_opcheck_of_the_backward(name, options, backend, dtype, monkeypatch):
    if name in WITHOUT_GRADIENT:
        op, _ = called(name, options, dtype, monkeypatch)
        assert not op.differentiable  # and has none
        return
    op, x = called(name, options | {"backend": backend}, dtype, monkeypatch)
    backward = getattr(torch.ops.drift_gate, f"{op.name}_backward").default
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in flatten(x)]
    outputs = op.library(*values)
    kept = [outputs[i] for i in op.kept_outputs]
    grads = [torch.ones_like(y) for y in outputs[: op.grads]]
    needs = [getattr(x, leaf) is not None for leaf in op.differentiable]
    opcheck(backward, (*values, kept, grads, needs))
