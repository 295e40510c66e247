"""torch.compile: every public function is one graph, few graphs do for all lengths, and what runs
on a GPU is traced without one."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from support.calls import FUNCTIONS, LOSSES, leaves_of, step_of, tensors_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from drift_gate.passes.backends import triton_on_cpu

EACH_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.fixture(autouse=True)
def no_graphs_of_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results_of(function, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The value and its gradients."""
    leaves = leaves_of(name, [x.detach() for x in tensors])
    value = function(*leaves, *tensors[len(leaves) :])
    if not value.requires_grad:
        return [value]
    return [value, *torch.autograd.grad(value, leaves)]


@EACH_FUNCTION
@pytest.mark.parametrize(("dynamic", "step_size"), [(True, 1), (None, 7)])
def test_lengths_of_5_to_40_need_two_graphs_at_most(name, dynamic, step_size):
    step = step_of(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=dynamic)
    for length in range(5, 41, step_size):
        tensors = tensors_of(name, 2, length)
        got, expected = (results_of(f, name, tensors) for f in (compiled, step))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@EACH_FUNCTION
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_the_triton_route_is_traced_without_a_gpu(name, backend, monkeypatch):
    """Fake tensors of a CUDA device. To look for a package would end the trace: `find_spec` may
    not be called."""

    def found(*_):
        raise AssertionError("find_spec was called")

    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    options = {} if name == "gate_weights" else {"backend": backend}
    tensors = tensors_of(name, 2, 9)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    with FakeTensorMode(), torch.no_grad():
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in tensors]
        step = torch.compile(step_of(name, **options), backend=kept, fullgraph=True)
        assert step(*fakes).device.type == "cuda"
    (graph,) = graphs
    ops = [node for node in graph.graph.nodes if "drift_gate" in str(node.target)]
    assert len(ops) == 1 and "triton" in ops[0].args


@pytest.mark.skipif(TORCH < (2, 11), reason="aot_eager takes no fake tensors of a mode around it")
@pytest.mark.parametrize("name", LOSSES)
def test_the_backward_of_the_triton_route_is_traced_without_a_gpu(name):
    """By shapes alone: no kernel runs."""
    tensors = tensors_of(name, 2, 9)
    step = torch.compile(step_of(name, backend="triton"), backend="aot_eager", fullgraph=True)
    with triton_on_cpu(), FakeTensorMode():
        fakes = [torch.empty(x.shape, dtype=x.dtype) for x in tensors]
        _, *grads = results_of(step, name, fakes)
    for grad, leaf in zip(grads, tensors, strict=False):
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype
