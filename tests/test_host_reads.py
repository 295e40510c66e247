"""How often the host waits for a GPU, counted without one: reads of values on the Triton route.

Tensors of the meta device stand in for those of a GPU. They have no values, so every operation that
hands a value, or a shape that depends on values, to Python is seen on its way; kernels are not
launched. `test_gpu.py` holds a device to the same with torch's own debug mode.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import drift_gate.kernels
import pytest
import torch
from drift_gate.bench.internals import HAS_TRITON
from support.calls import FUNCTIONS, TOP_K, arguments_of
from torch.utils._python_dispatch import TorchDispatchMode

import drift_gate as dg
from drift_gate.call import op as ops
from drift_gate.losses import weights
from drift_gate.passes import backends

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="the Triton route")

LINEAR = tuple(name for name in FUNCTIONS if name.startswith("linear_"))
UNLABELLED = "gather_lse", "linear_gather_lse", "gate_weights", *TOP_K
LABELLED = tuple(name for name in FUNCTIONS if name not in UNLABELLED)
ROWS = 2, 20


class Reads(TorchDispatchMode):
    """Operations that make the host wait for values, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags)
        if op.overloadpacket is torch.ops.aten.index:  # by numbers: their shape is known
            tags = {i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)}
        away = any(isinstance(x, torch.Tensor) and x.is_meta for x in args)
        if away and str(kwargs.get("device")) == "cpu":
            self.found.append(str(op))
            ones = torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return ones.view(args[0].shape)
        if tags and away:
            self.found.append(str(op))
            if op is torch.ops.aten._local_scalar_dense.default:
                return 1
        return op(*args, **kwargs)


@contextlib.contextmanager
def on_no_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    """Tensors of the meta device take the Triton route, to the launches and no further."""
    for module in pkgutil.iter_modules(drift_gate.kernels.__path__):
        found = importlib.import_module(f"drift_gate.kernels.{module.name}")
        if hasattr(found, "launch") and module.name != "launch":
            monkeypatch.setattr(found, "launch", lambda *args, **options: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # asks for the device
    monkeypatch.setattr(weights, "resolve", lambda *_: "triton")  # takes no name of a backend

    def eagerly(op: ops.Op, x: Any) -> Any:  # meta tensors would be traced
        return ops._Eager.apply(op, x, *[x[i] for i in op.leaves_at])

    monkeypatch.setattr(ops.Op, "__call__", eagerly)
    with backends.triton_on_cpu(), Reads() as reads:
        yield reads


def away(x: Any) -> Any:
    """On the meta device; floating-point tensors require gradients."""
    if isinstance(x, dg.Head):
        return dg.Head(away(x.weight), away(x.bias), x.softcap)
    if x is None:
        return None
    x = x.to("meta")
    return x.requires_grad_() if x.is_floating_point() else x


def reads_of(name: str, monkeypatch: pytest.MonkeyPatch, chunk: int | None = None, **options: Any):
    """How often the host reads in the forward, and in the backward, of a call."""
    first, *rest = map(away, arguments_of(name, *ROWS))
    if name.startswith("linear_"):
        head = rest[0]
        rest[0] = dg.Head(head.weight, head.bias, chunk_size=chunk)
    if name in TOP_K:
        rest.append(3)
    if name != "gate_weights":
        options["backend"] = "triton"
    if options.get("response_mask") is True:
        options["response_mask"] = torch.ones(ROWS, dtype=torch.bool, device="meta")
    with on_no_device(monkeypatch) as reads:
        found = getattr(dg, name)(first, *rest, **options)
        value = found.loss if isinstance(found, dg.LossOutput) else found[0]
        forward = len(reads.found)
        if value.requires_grad:
            value.sum().backward()
            assert first.grad.shape == first.shape
    return forward, len(reads.found) - forward


def test_reads_are_seen():
    x, mask = torch.ones(1, device="meta"), torch.ones(1, dtype=torch.bool, device="meta")
    for read in (
        lambda: x.item(),
        lambda: float(x),
        lambda: bool(mask),
        lambda: mask.all().item(),
        lambda: x.cpu(),
        lambda: x.to("cpu", torch.float64),
        lambda: x.nonzero(),
        lambda: x[mask],
        lambda: x.masked_select(mask),
        lambda: torch.equal(x, x),
        lambda: x.unique(),
    ):
        reads = Reads()
        with contextlib.suppress(NotImplementedError, RuntimeError), reads:  # there is no value
            read()
        assert len(reads.found) == 1, reads.found
    with Reads() as reads:
        x[torch.zeros(1, dtype=torch.int64, device="meta")].to(torch.float64).cumsum(0)
        torch.ones(3).tolist()
    assert not reads.found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("chunk", [None, 8])
def test_nothing_is_read_where_no_row_is_left_out(name, chunk, monkeypatch):
    """With `ignore_index=None` and no mask: such a call can be captured in a CUDA graph."""
    if chunk and name not in LINEAR:
        pytest.skip("has no chunks")
    options = {"ignore_index": None} if name in LABELLED else {}
    if chunk and name.endswith("_loss"):
        options["gate"] = dg.DriftGate(block_size=4)
    assert reads_of(name, monkeypatch, chunk, **options) == (0, 0)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("chunk", [None, 8])
def test_one_read_tells_which_rows_are_valid(name, chunk, monkeypatch):
    """And none where the logits are there: invalid rows are left out by the kernels."""
    if chunk and name not in LINEAR:
        pytest.skip("has no chunks")
    masked = name.endswith("_loss") or name in ("gate_weights", *TOP_K)
    options = {"response_mask": True} if masked else {}
    if chunk and name.endswith("_loss"):
        options["gate"] = dg.DriftGate(block_size=4)
    expected = (0, 0)
    if name == "linear_top_k_log_probs":
        expected = (1, 0)
    if name in LINEAR and name in LABELLED:
        expected = (1, 0) if name.endswith("_loss") else (1, 1)  # the logits are made again
    assert reads_of(name, monkeypatch, chunk, **options) == expected


@pytest.mark.parametrize("name", [name for name in LINEAR if name.endswith("_loss")])
def test_losses_of_tokens(name, monkeypatch):
    """`reduction="none"`: the logits are made again in the backward, of rows with a gradient."""
    again = 0 if name == "linear_topk_loss" else 1  # LSM: not even then
    for chunk in (None, 8):
        options = dict(gate=None, reduction="none", chunk=chunk)
        assert reads_of(name, monkeypatch, ignore_index=None, **options) == (0, again)
        assert reads_of(name, monkeypatch, response_mask=True, **options) == (1, again)


@pytest.mark.parametrize("support", ["truncated", "tail"])
@pytest.mark.parametrize("chunk", [None, 8])
def test_lists_that_need_the_whole_softmax(support, chunk, monkeypatch):
    """Rows whose list has no support are known to the device alone. Where blocks end is read."""
    gates = dg.DriftGate("token"), dg.DriftGate(block_size=4)
    for gate, expected in zip(gates, (0, 1 if chunk else 0), strict=True):
        options = dict(support=support, direction="forward", gate=gate, ignore_index=None)
        assert reads_of("linear_topk_loss", monkeypatch, chunk, **options) == (expected, 0)


def test_rows_at_which_the_drift_is_measured(monkeypatch):
    """How many there are at most, shapes say; but not of spans."""
    for gate, expected in (
        (dg.DriftGate(sample_every=3), 0),
        (dg.DriftGate("sequence", sample_every=8), 0),
        (dg.DriftGate("span", sample_every=3), 1),
    ):
        spans = torch.zeros(ROWS, dtype=torch.int64, device="meta")
        options = {"gate": gate, "span_ids": spans if gate.granularity == "span" else None}
        for name, once in (("topk_loss", 0), ("linear_topk_loss", expected)):
            assert reads_of(name, monkeypatch, ignore_index=None, **options) == (once, 0)
            masked = {"response_mask": True, **options}
            assert reads_of(name, monkeypatch, **masked) == (name.startswith("linear"), 0)


def test_borders_of_sequences_and_spans_are_read_where_chunks_end_at_them(monkeypatch):
    spans = torch.zeros(ROWS, dtype=torch.int64, device="meta")
    gate = dg.DriftGate("span")
    for chunk, expected in ((None, 0), (8, 1)):
        options = dict(gate=gate, span_ids=spans, ignore_index=None)
        assert reads_of("linear_opd_loss", monkeypatch, chunk, **options) == (expected, 0)
