"""Problems for `full_loss`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from drift_gate import full_loss

from .judge import loss_and_grad
from .problems import draw

DIRECTIONS = ["reverse", "forward", "jsd"]
EACH_DIRECTION = pytest.mark.parametrize("direction", DIRECTIONS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
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

        def move(x: Any) -> Any:
            integer = isinstance(x, Tensor) and not x.is_floating_point()
            keep = isinstance(target, torch.dtype) and integer
            return x if keep or not isinstance(x, Tensor) else x.detach().to(target)

        options = {name: move(value) for name, value in self.options.items()}
        return FullProblem(*map(move, self.arguments()), options)


def draw_full(*shape: int, **options: Any) -> FullProblem:
    """As `draw`; the teacher some way from the student, shifted by a constant."""
    problem = draw(*shape, **options)
    generator = torch.Generator().manual_seed(11)
    teacher = problem.logits.float() + torch.randn(*shape, generator=generator) + 3
    teacher = teacher.to(problem.logits.dtype)
    return FullProblem(
        problem.logits, problem.labels, problem.old_log_probs, teacher, problem.options
    )


def losses(problem: FullProblem, backend: str = "torch", **options: Any) -> tuple[Any, Tensor]:
    """The ungated per-token losses and the gradient of their sum."""
    options = {"gate": None, "loss_agg_mode": "none", **options}
    upstream = torch.ones(problem.logits.shape[:-1])
    upstream = upstream.to(torch.promote_types(problem.logits.dtype, torch.float32))
    return loss_and_grad(problem, backend, upstream, function=full_loss, **options)
