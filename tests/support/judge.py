"""Run a loss on a backend, and hold it to the float64 truth by the eager error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import drift_gate as dg
from drift_gate.passes import native

from .numerics import assert_as_good_as
from .problems import per_token

FUSED = ("native", "torch") if native.instruction_set() else ("torch",)
"""Backends that run on this CPU."""
EACH_FUSED = pytest.mark.parametrize("backend", FUSED)
EACH_BACKEND = pytest.mark.parametrize("backend", [*FUSED, "reference"])
EACH_WIDE = pytest.mark.parametrize("backend", ["torch", "reference"])
"""Those that take float64."""
PER_TOKEN = ("token_loss", "log_probs", "gate", "drift", "entropy")
SIGNED_MEANS = ("drift_signed", "ppo_kl")


def metric_of(name: str, output: dg.LossOutput) -> Tensor:
    """A metric [1]. A mean of signed terms stands beside them [N + 1]: it is no more wrong than the
    worst of them, and how far their errors cancel in one order of summation is chance."""
    value = output.metrics[name].detach().reshape(1)
    return torch.cat([output.drift.flatten(), value]) if name in SIGNED_MEANS else value


def with_log_probs(triple: list[Tensor], truth: dg.LossOutput) -> list[Tensor]:
    """Differences in float64 beside the log-probs, whose digits they have: eager float64 is the
    truth itself, and allows for no error. Those of another dtype as they are."""
    if triple[0].dtype != torch.float64:
        return triple
    return [torch.cat([x, truth.log_probs.detach().cpu().reshape(-1)]) for x in triple]


def loss_and_grad(
    problem: Any,
    backend: str,
    upstream: Tensor | None = None,
    *,
    function: Callable[..., dg.LossOutput] = dg.opd_loss,
    **options: Any,
) -> tuple[dg.LossOutput, Tensor]:
    """A loss and the gradient of its logits; `upstream` weighs per-token losses."""
    original = problem.logits
    logits = torch.empty_strided(
        original.shape, original.stride(), dtype=original.dtype, device=original.device
    )
    logits.copy_(original).requires_grad_()
    _, *rest = problem.arguments()
    merged = {**problem.options, **options, "backend": backend, "return_entropy": True}
    result = function(logits, *rest, **merged)
    (grad,) = torch.autograd.grad(result.loss, logits, upstream)
    return result, grad


def assert_good(problem: Any, backend: str, *, device: Any = "cpu", **options: Any) -> None:
    """`opd_loss` of `backend` is as good as eager PyTorch's."""
    assert_same_budget(dg.opd_loss, problem, backend, device=device, **options)


def assert_same_budget(
    function: Callable[..., dg.LossOutput],
    problem: Any,
    backend: str,
    *,
    device: Any = "cpu",
    **options: Any,
) -> None:
    """Loss, per-token outputs, metrics and gradient are as good as eager PyTorch's."""
    upstream = None
    if per_token({**problem.options, **options}):
        shape = problem.logits.shape[:-1]
        upstream = torch.linspace(-1, 1, shape.numel()).view(shape)

    def run(p: Any, name: str, where: Any) -> tuple[dg.LossOutput, Tensor]:
        weight = None
        if upstream is not None:
            weight = upstream.to(where, torch.promote_types(p.logits.dtype, torch.float32))
        moved = p.to(torch.device(where))
        return loss_and_grad(moved, name, weight, function=function, **options)

    got, got_grad = run(problem, backend, device)
    eager, eager_grad = run(problem, "reference", "cpu")
    truth, truth_grad = run(problem.to(torch.float64), "reference", "cpu")
    for name in PER_TOKEN:
        triple = [getattr(x, name).detach().cpu().reshape(-1) for x in (got, eager, truth)]
        if name == "drift":
            triple = with_log_probs(triple, truth)
        assert_as_good_as(*triple, name=name)
    # A mean is no more wrong than the worst of its tokens; how far their errors cancel is chance.
    losses = (torch.cat([x.token_loss.flatten(), x.loss.flatten()]) for x in (got, eager, truth))
    assert_as_good_as(*(x.detach().cpu() for x in losses), name="loss")
    assert got.metrics.keys() == truth.metrics.keys()
    for name in truth.metrics:
        if name == "drift_noise":  # of these logits' dtype, which the truth has not
            x, y = (x.metrics[name].cpu() for x in (got, eager))
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-6, equal_nan=True)
            continue
        triple = [metric_of(name, x).cpu() for x in (got, eager, truth)]
        if name in SIGNED_MEANS:
            triple = with_log_probs(triple, truth)
        assert_as_good_as(*triple, name=name)
    assert_as_good_as(got_grad.cpu(), eager_grad, truth_grad, name="gradient")
