"""Run a loss on a backend, and hold it to the float64 truth by the eager error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import drift_gate as dg

from .numerics import assert_as_good_as
from .problems import Problem

PER_TOKEN = ("token_loss", "log_probs", "gate", "drift", "entropy")


def loss_and_grad(
    problem: Problem, backend: str, upstream: Tensor | None = None, **options: Any
) -> tuple[dg.LossOutput, Tensor]:
    """`opd_loss` and the gradient of its logits; `upstream` weighs per-token losses."""
    original = problem.logits
    logits = torch.empty_strided(
        original.shape, original.stride(), dtype=original.dtype, device=original.device
    )
    logits.copy_(original).requires_grad_()
    _, *rest = problem.arguments()
    merged = {**problem.options, **options, "backend": backend, "return_entropy": True}
    result = dg.opd_loss(logits, *rest, **merged)
    (grad,) = torch.autograd.grad(result.loss, logits, upstream)
    return result, grad


def assert_good(problem: Problem, backend: str, *, device: Any = "cpu", **options: Any) -> None:
    """Loss, per-token outputs, metrics and gradient of `backend` are as good as eager PyTorch's."""
    upstream = None
    if {**problem.options, **options}.get("loss_agg_mode") == "none":
        upstream = torch.linspace(-1, 1, problem.labels.numel()).view(problem.labels.shape)

    def run(p: Problem, name: str, where: Any) -> tuple[dg.LossOutput, Tensor]:
        weight = None if upstream is None else upstream.to(where, p.old_log_probs.dtype)
        return loss_and_grad(p.to(torch.device(where)), name, weight, **options)

    got, got_grad = run(problem, backend, device)
    eager, eager_grad = run(problem, "reference", "cpu")
    truth, truth_grad = run(problem.to(torch.float64), "reference", "cpu")
    for name in ("loss", *PER_TOKEN):
        triple = (getattr(x, name).detach() for x in (got, eager, truth))
        assert_as_good_as(*(x.cpu().reshape(-1) for x in triple), name=name)
    assert got.metrics.keys() == truth.metrics.keys()
    for name, value in truth.metrics.items():
        assert_as_good_as(
            got.metrics[name].cpu()[None], eager.metrics[name][None], value[None], name=name
        )
    assert_as_good_as(got_grad.cpu(), eager_grad, truth_grad, name="gradient")
