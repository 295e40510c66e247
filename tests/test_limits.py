"""The ends of what arguments may be: sizes, tau, drifts, devices, autograd's rules, threads."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.judge import EACH_BACKEND, EACH_FUSED, assert_good, assert_same_budget, loss_and_grad
from support.problems import draw, draw_topk
from torch import Tensor

import drift_gate as dg
from drift_gate import DriftGate, full_loss, opd_loss, topk_loss

AGGREGATES = ("mean", "mean_abs", "rms", "max_abs")


def losses(logits: Tensor, **options: Any) -> dict[str, Callable[[], dg.LossOutput]]:
    """Each loss over these logits, with a gate."""
    shape = logits.shape[:-1]
    labels = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    old, k = torch.full(shape, -1.0, device=logits.device), min(2, logits.shape[-1])
    ids = torch.arange(k, device=logits.device).expand(*shape, k)
    q = torch.full((*shape, k), -1.0, device=logits.device)
    support = {"support": "truncated"} if k == 1 else {}
    teacher = logits.detach() * 0.5
    return {
        "opd_loss": lambda: opd_loss(logits, labels, old, old + 0.1, **options),
        "topk_loss": lambda: topk_loss(logits, labels, old, ids, q, **support, **options),
        "full_loss": lambda: full_loss(logits, labels, old, teacher, **options),
    }


def each_loss(logits: Tensor, **options: Any) -> list[tuple[str, dg.LossOutput]]:
    return [(name, call()) for name, call in losses(logits, **options).items()]


# Sizes.


@pytest.mark.parametrize("name", ["opd_loss", "topk_loss", "full_loss"])
def test_rows_more_than_2_to_the_31_elements_apart(name: str) -> None:
    """The storage is reserved and, between the rows, never touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = storage.as_strided((3, 5), (2**30, 1))
    near = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    far.copy_(near)
    assert torch.equal(losses(far)[name]().token_loss, losses(near)[name]().token_loss)


def test_an_expanded_row_is_more_than_2_to_the_31_elements() -> None:
    """[16,384, 151,936] logits in 300 kB: one row, expanded, of which two are not ignored."""
    row = torch.randn(151_936, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = row.expand(16_384, -1)
    assert logits.numel() > 2**31
    labels = torch.full((16_384,), -100)
    labels[0] = labels[-1] = 5
    log_probs, _ = dg.token_log_probs(logits, labels)
    expected = row.float().log_softmax(-1)[5]
    torch.testing.assert_close(log_probs[[0, -1]], expected.expand(2), rtol=1e-6, atol=1e-6)
    assert log_probs[1:-1].eq(0).all()


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    logits = torch.empty(shape, requires_grad=True)
    for name, result in each_loss(logits):
        assert result.loss == 0, name
        (grad,) = torch.autograd.grad(result.loss, logits)
        assert grad.shape == shape
        assert all(torch.isfinite(value) for value in result.metrics.values()), name


def test_all_ignored_gives_0_whatever_the_logits_hold() -> None:
    logits = torch.full((2, 3, 5), torch.nan, requires_grad=True)
    for name, result in each_loss(logits, response_mask=torch.zeros(2, 3)):
        assert result.loss == 0, name
        (grad,) = torch.autograd.grad(result.loss, logits)
        assert grad.eq(0).all(), name


@EACH_FUSED
def test_one_row(backend) -> None:
    assert_good(draw(1, 50), backend)


def test_one_word() -> None:
    """It has mass 1: no loss of it has a gradient, nor a drift but the old policy's."""
    logits = torch.tensor([[3.0], [-1e4]], requires_grad=True)
    for name, result in each_loss(logits):
        assert result.log_probs.eq(0).all(), name
        (grad,) = torch.autograd.grad(result.loss, logits)
        torch.testing.assert_close(grad, torch.zeros(2, 1), rtol=0, atol=1e-6, msg=name)


@EACH_FUSED
def test_a_million_words(backend) -> None:
    assert_good(draw(2, 1_048_576), backend)


@pytest.mark.parametrize("granularity", ["block", "token", "sequence"])
def test_a_sequence_of_65537_rows(granularity: str) -> None:
    """More than 2^16 rows in one sequence, against the formula in a few lines."""
    rows = 65_537
    generator = torch.Generator().manual_seed(0)
    new, old = (-torch.rand(1, rows, generator=generator) for _ in range(2))
    gate = dg.gate_weights(new, old, DriftGate(granularity))
    drift = (old.double() - new.double())[0]
    size = {"block": 64, "token": 1, "sequence": rows}[granularity]
    a = torch.stack([block.mean().abs() for block in drift.split(size)])
    g = torch.exp(-a).repeat_interleave(size)[:rows]
    torch.testing.assert_close(gate.weights[0].double(), g / g.mean(), rtol=1e-6, atol=1e-6)
    assert gate.block_ids.max() + 1 == math.ceil(rows / size)


# Values.


@EACH_BACKEND
def test_tau_0_weighs_all_alike_and_a_large_one_the_best_block(backend: str) -> None:
    problem = draw(2, 20, 9, drift=1.0)
    flat = opd_loss(*problem.arguments(), gate=DriftGate(tau=0), backend=backend)
    assert flat.gate.eq(1).all()
    gate = DriftGate("token", tau=1e6)
    sharp = opd_loss(*problem.arguments(), gate=gate, backend=backend)
    best = sharp.drift.abs() == sharp.drift.abs().min()
    assert sharp.gate[best].item() == pytest.approx(40)
    assert sharp.gate[~best].lt(1e-6).all()


@pytest.mark.parametrize("aggregate", AGGREGATES)
@EACH_FUSED
def test_a_drift_of_1e30(aggregate: str, backend) -> None:
    problem = draw(4, 8, 9)
    problem.old_log_probs[1] = 1e30
    gate = DriftGate("sequence", aggregate=aggregate)
    result, grad = loss_and_grad(problem, backend, gate=gate, estimator="k1")
    assert result.gate[1].eq(0).all() and grad[1].eq(0).all()
    assert result.gate[[0, 2, 3]].gt(0.5).all() and grad.isfinite().all()
    assert result.loss.isfinite()


@EACH_BACKEND
@pytest.mark.parametrize("estimator", ["importance", "ppo", "k3"])
def test_a_log_ratio_beyond_20_is_held_and_has_no_slope(estimator: str, backend: str) -> None:
    problem = draw(1, 6, 9)
    gap = torch.tensor([[25.0, -25.0, 0.1, 30.0, -30.0, -0.1]])
    now, _ = dg.token_log_probs(problem.logits, problem.labels)
    problem.old_log_probs = now + gap
    problem.teacher_log_probs = now + gap if estimator == "k3" else now + gap - 1
    result, grad = loss_and_grad(problem, backend, gate=None, estimator=estimator)
    held = gap[0].abs() > 20
    assert grad[0, held].eq(0).all() and result.loss.isfinite()
    assert grad[0, ~held].abs().amax(-1).gt(0).all()


@EACH_FUSED
def test_a_tail_without_mass_is_held_at_epsilon(backend) -> None:
    problem = draw_topk(3, 4, k=4)  # the list is the vocabulary: nothing is left
    result, grad = loss_and_grad(problem, backend, function=topk_loss, support="tail")
    assert result.loss.isfinite() and grad.isfinite().all()
    assert_same_budget(topk_loss, problem, backend, support="tail", direction="reverse")


# Devices and autograd.


@pytest.mark.parametrize("name", ["labels", "old_log_probs", "teacher_log_probs", "response_mask"])
def test_devices_that_differ_are_refused(name: str) -> None:
    problem = draw(2, 3, 5)
    arguments = dict(
        zip(
            ("logits", "labels", "old_log_probs", "teacher_log_probs"),
            problem.arguments(),
            strict=True,
        ),
        response_mask=torch.ones(2, 3),
    )
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the device of labels|logits"):
        opd_loss(**arguments)


@pytest.mark.parametrize("name", ["opd_loss", "topk_loss", "full_loss"])
def test_double_backward_is_refused_by_every_loss(name: str) -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    result = losses(logits)[name]()
    (grad,) = torch.autograd.grad(result.loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        torch.autograd.grad(grad.sum(), logits)


@pytest.mark.parametrize("name", ["opd_loss", "topk_loss", "full_loss"])
def test_a_second_backward_gives_the_same_and_in_place_is_refused(name: str) -> None:
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    result = losses(leaf)[name]()
    first, second = (torch.autograd.grad(result.loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    logits = (leaf * 1.0).detach().requires_grad_()
    result = losses(logits, inplace_backward=True)[name]()
    (grad,) = torch.autograd.grad(result.loss, logits, retain_graph=True)
    assert torch.equal(grad, first)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.loss, logits)


def test_inputs_that_get_no_gradient_may_require_it_in_every_loss() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    old, teacher = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True)
    q, ids = torch.zeros(2, 3, 2, requires_grad=True), torch.tensor([0, 1]).expand(2, 3, 2)
    for result in (
        topk_loss(logits, labels, old, ids, q),
        full_loss(logits, labels, old, teacher),
    ):
        result.loss.backward()
    assert logits.grad is not None
    assert old.grad is None and teacher.grad is None and q.grad is None


# Configurations and threads.


def test_a_gate_is_the_same_after_copies_and_pickles() -> None:
    gate = DriftGate("span", 7, 0.5, "rms", "sequence")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(gate, protocol)) == gate
    assert copy.deepcopy(gate) == gate and hash(copy.copy(gate)) == hash(gate)


def test_every_loss_from_several_threads_and_backward_from_another() -> None:
    logits = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0))

    def run(name: str) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        result = losses(leaf)[name]()
        done: list[Tensor] = []
        backward = threading.Thread(
            target=lambda: done.extend(torch.autograd.grad(result.loss, leaf))
        )
        backward.start()
        backward.join()
        return result.loss.detach(), done[0]

    names = list(losses(logits)) * 3
    alone = {name: run(name) for name in set(names)}
    together: list[tuple[Tensor, Tensor] | None] = [None] * len(names)

    def work(i: int) -> None:
        together[i] = run(names[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for name, result in zip(names, together, strict=True):
        assert result is not None
        assert all(torch.equal(a, b) for a, b in zip(alone[name], result, strict=True)), name


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["opd_loss", "topk_loss", "full_loss"])
def test_a_stream_of_the_callers(name: str) -> None:
    """Forward and backward on another stream than the default one, while that one is busy."""
    logits = torch.randn(2, 30, 5000, device="cuda")
    leaf = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(losses(leaf)[name]().loss, leaf)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 1e-3
    with torch.cuda.stream(stream):
        leaf = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(losses(leaf)[name]().loss, leaf)
    stream.synchronize()
    assert torch.equal(grad, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["topk_loss", "full_loss"])
def test_a_cuda_graph_replays_with_new_logits(name: str) -> None:
    logits = torch.randn(2, 30, 5000, device="cuda").requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(losses(logits)[name]().loss, logits)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.copy_(torch.randn_like(logits))
    graph.replay()
    assert torch.equal(captured, step())
