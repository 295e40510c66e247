"""On-policy distillation with rollout reuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from drift_gate import DriftGate, opd_loss, token_log_probs

from . import task
from .model import Model, respond

ROLLOUT = 128  # responses sampled at once, one a prompt
MINIBATCH = 32  # responses of an optimiser step
EPOCHS = 2  # times that a rollout is used
LEARNING_RATE = 5e-4  # at its height, after WARMUP rollouts; it then falls to 0
WARMUP = 10


class Step(NamedTuple):
    """Means over the optimiser steps of one rollout."""

    loss: float
    drift: float
    """|drift| in nats."""
    gate: float
    """Raw gate exp(-tau |a|), before the unit mean; 1 without a gate."""


def distill(
    student: Model,
    teacher: Model,
    *,
    gate: DriftGate | None,
    steps: int,
    seed: int,
    backend: str = "auto",
) -> Iterator[Step]:
    """Train the student in place, and yield after each of `steps` rollouts.

    The seed fixes the prompts and, as far as the students agree, the responses.
    """
    device = next(student.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    sample = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1 - step / steps)
    )
    for _ in range(steps):
        prompts = task.prompts(task.draw_pairs(ROLLOUT, draw, held_out=False)).to(device)
        labels = respond(student, prompts, sample)
        tokens = torch.cat([prompts, labels[:, :-1]], 1)
        with torch.no_grad():
            old, teachers = (
                token_log_probs(model(tokens, task.PROMPT - 1), labels, backend=backend)[0]
                for model in (student, teacher)
            )
        rollout = tokens, labels, old, teachers, task.response_mask(labels)
        metrics = [
            _update(student, optimizer, part, gate, backend)
            for _ in range(EPOCHS)
            for part in zip(*(x.split(MINIBATCH) for x in rollout), strict=True)
        ]
        schedule.step()
        yield Step(*torch.stack(metrics).mean(0).tolist())


def _update(
    student: Model,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
    gate: DriftGate | None,
    backend: str,
) -> Tensor:
    """One optimiser step on (tokens [B, T], labels, old and teacher log-probs, mask [B, RESPONSE]).

    Returns loss, mean |drift| and mean raw gate, [3].
    """
    tokens, labels, old, teachers, mask = batch
    out = opd_loss(
        student(tokens, task.PROMPT - 1),
        labels,
        old,
        teachers,
        gate=gate,
        response_mask=mask,
        inplace_backward=True,
        backend=backend,
    )
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    shown = out.metrics["drift_abs"], out.metrics["gate_mean_raw"]
    return torch.stack([out.loss.detach(), *shown])
