"""Problems for `full_loss`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from drift_gate import full_loss
from drift_gate.choices import FULL_DIRECTIONS

from .judge import loss_and_grad
from .problems import draw, move

EACH_DIRECTION = pytest.mark.parametrize("direction", FULL_DIRECTIONS)
INF, NAN = float("inf"), float("nan")


@dataclasses.dataclass
class FullProblem:
    """Arguments of `full_loss`."""

    logits: Tensor
    labels: Tensor | None
    old_log_probs: Tensor | None
    teacher: Tensor
    options: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.labels, self.old_log_probs, self.teacher

    def to(self, target: torch.device | torch.dtype) -> FullProblem:
        """On another device, or in another float dtype."""

        options = {name: move(value, target) for name, value in self.options.items()}
        return FullProblem(*(move(x, target) for x in self.arguments()), options)


def draw_full(*shape: int, **options: Any) -> FullProblem:
    """As `draw`; the teacher some way from the student, shifted by a constant."""
    problem = draw(*shape, **options)
    generator = torch.Generator().manual_seed(11)
    teacher = problem.logits.float() + torch.randn(*shape, generator=generator) + 3
    teacher = teacher.to(problem.logits.dtype)
    return FullProblem(
        problem.logits, problem.labels, problem.old_log_probs, teacher, problem.options
    )


def losses(problem: FullProblem, backend: str = "auto", **options: Any) -> tuple[Any, Tensor]:
    """The ungated per-token losses and the gradient of their sum."""
    options = {"gate": None, "reduction": "none", **options}
    upstream = torch.ones(problem.logits.shape[:-1])
    upstream = upstream.to(torch.promote_types(problem.logits.dtype, torch.float32))
    return loss_and_grad(problem, backend, upstream, function=full_loss, **options)
