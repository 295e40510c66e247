"""Arguments of the reference by name, in float64, and its comparison with a formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drift_gate import DriftGate, LossOutput

from .problems import draw, draw_topk

GATE = DriftGate(block_size=8)
B, T, V, K = 3, 40, 30, 5


def sampled() -> dict[str, Any]:
    """Arguments of `reference.opd_loss` by name; drifts that reach the clips, holes in the mask."""
    problem = draw(B, T, V, drift=1.0, masked=0.3).to(torch.float64)
    names = "logits", "labels", "old_log_probs", "teacher_log_probs"
    return dict(zip(names, problem.arguments(), strict=True)) | problem.options


def listed() -> dict[str, Any]:
    """Arguments of `reference.topk_loss` by name, without a gate."""
    problem = draw_topk(B, T, V, k=K, teacher_share=0.9).to(torch.float64)
    names = "logits", "labels", "old_log_probs", "teacher_topk_ids", "teacher_topk_log_probs"
    return dict(zip(names, problem.arguments(), strict=True)) | {"gate": None}


def log_probs_of(arguments: dict[str, Any]) -> Tensor:
    log_p = arguments["logits"].log_softmax(-1)
    return log_p.gather(-1, arguments["labels"][..., None])[..., 0]


def with_leaf(arguments: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    leaf = arguments["logits"].clone().requires_grad_()
    return arguments | {"logits": leaf}, leaf


def assert_loss(output: LossOutput, arguments: dict[str, Any], expected: Tensor) -> None:
    """Loss and gradient are those of an expression of the same logits."""
    torch.testing.assert_close(output.loss, expected)
    (got,) = torch.autograd.grad(output.loss, arguments["logits"])
    torch.testing.assert_close(got, torch.autograd.grad(expected, arguments["logits"])[0])


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()
