"""Inputs of the losses, drawn from a seed: what trainers pass, and its borders."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Problem:
    """Arguments of `opd_loss`; row data has the shape of labels."""

    logits: Tensor  # [B, T, V] or [N, V]
    labels: Tensor
    old_log_probs: Tensor
    teacher_log_probs: Tensor
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logits, self.labels, self.old_log_probs, self.teacher_log_probs

    def to(self, target: torch.device | torch.dtype) -> Problem:
        """On another device; or with logits and log-probs in another dtype."""
        options = {name: move(value, target) for name, value in self.options.items()}
        return Problem(*(move(x, target) for x in self.arguments()), options)


def move(x: Any, target: torch.device | torch.dtype) -> Any:
    """Tensors to a device, or those of floating point to a dtype, also in a `Head` or a
    `Reduction`; anything else as it is."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        moved = {f.name: move(getattr(x, f.name), target) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **moved)
    if not isinstance(x, Tensor):
        return x
    if isinstance(target, torch.dtype) and not x.is_floating_point():
        return x
    return x.detach().to(target)


def per_token(options: dict[str, Any]) -> bool:
    """Whether the loss is the per-token losses."""
    reduction = options.get("reduction")
    return getattr(reduction, "mode", reduction) == "none"


def log_probs_of(logits: Tensor, labels: Tensor) -> Tensor:
    """float32 log-prob of each label; ignored labels get that of word 0."""
    picked = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).long()[..., None])
    return picked[..., 0]


def peaked_logits(*shape: int, generator: torch.Generator, spread: float = 2.0) -> Tensor:
    """Logits like a model's: noise, and one word a row that takes much of the mass."""
    logits = torch.randn(*shape, generator=generator) * spread
    winner = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
    lift = 12 * torch.rand(*shape[:-1], 1, generator=generator)
    return logits.scatter_add(-1, winner, lift)


def draw(
    *shape: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    drift: float = 0.3,
    masked: float = 0.0,
    **options: Any,
) -> Problem:
    """Logits [*shape]; the old policy `drift` away, the teacher farther; a share masked."""
    generator = torch.Generator().manual_seed(seed)
    logits = peaked_logits(*shape, generator=generator).to(dtype)
    p = logits.float().softmax(-1)
    u = torch.rand(*shape[:-1], 1, generator=generator)
    labels = (p.cumsum(-1) < u).sum(-1).clamp(max=shape[-1] - 1)
    noise = torch.randn(*shape, generator=generator)
    old = log_probs_of(logits + drift * noise, labels)
    teacher = log_probs_of(logits + torch.randn(*shape, generator=generator), labels)
    if masked:
        options["response_mask"] = torch.rand(*shape[:-1], generator=generator) >= masked
    return Problem(logits, labels, old, teacher, options)


@dataclasses.dataclass
class TopkProblem:
    """Arguments of `topk_loss`; the teacher's lists are [..., K]."""

    logits: Tensor
    labels: Tensor | None
    old_log_probs: Tensor | None
    ids: Tensor
    teacher: Tensor
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.labels, self.old_log_probs, self.ids, self.teacher

    def to(self, target: torch.device | torch.dtype) -> TopkProblem:
        """As `Problem.to`."""
        options = {name: move(value, target) for name, value in self.options.items()}
        return TopkProblem(*(move(x, target) for x in self.arguments()), options)


def draw_topk(*shape: int, k: int, teacher_share: float = 1.0, **options: Any) -> TopkProblem:
    """As `draw`; the teacher, some way from the student, lists its K likeliest words.

    `teacher_share` scales the listed masses: below 1 the list surely leaves some out.
    """
    problem = draw(*shape, **options)
    generator = torch.Generator().manual_seed(11)
    teacher = problem.logits.float() + torch.randn(*shape, generator=generator)
    log_q, ids = teacher.log_softmax(-1).topk(k)
    log_q = log_q + math.log(teacher_share)
    return TopkProblem(
        problem.logits, problem.labels, problem.old_log_probs, ids, log_q, problem.options
    )
