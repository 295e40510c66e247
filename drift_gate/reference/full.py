"""Divergences of student and teacher over the whole vocabulary.

p and q are the distributions of student and teacher at one position, [..., V] over the words.

    "reverse"  KL(p || q)
    "forward"  KL(q || p)
    "jsd"      beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
               (generalised JSD, arXiv 2306.13649, weighed as in TRL)
    "mixed"    beta KL(q || p) + (1 - beta) KL(p || q)       (NeMo-RL's mixed_kl_weight)
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..outputs import LossOutput
from .batch import Batch
from .vocabulary import Student, label_log_probs, scaled

ENDS: dict[tuple[str, float], str] = {
    ("jsd", 0): "forward",  # the limits of jsd / beta and jsd / (1 - beta), as TRL has them
    ("jsd", 1): "reverse",
    ("mixed", 0): "reverse",
    ("mixed", 1): "forward",
}


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a (log a - log b) of each row.

    A word with a = 0 contributes 0, and one with b = 0 < a infinity.
    """
    ratio = torch.where(log_a == -torch.inf, 0, log_a - log_b)
    return torch.where(ratio == torch.inf, ratio, log_a.exp() * ratio).sum(-1)


def log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log m = log(beta q + (1 - beta) p); 0 at words where both are 0, which no sum counts."""
    neither = (log_p == -torch.inf) & (log_q == -torch.inf)
    p = torch.where(neither, 0, log_p) + math.log1p(-beta)
    q = torch.where(neither, 0, log_q) + math.log(beta)
    return torch.logaddexp(q, p)


def divergence(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> Tensor:
    """L of each row."""
    direction = ENDS.get((direction, beta), direction)
    if direction == "reverse":
        return kl(log_p, log_q)
    if direction == "forward":
        return kl(log_q, log_p)
    if direction == "mixed":
        return beta * kl(log_q, log_p) + (1 - beta) * kl(log_p, log_q)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def student_full_loss(
    student: Student,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_logits: Tensor,  # [..., V']
    *,
    direction: str = "reverse",
    beta: float = 0.5,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
    **common: Any,
) -> LossOutput:
    """`drift_gate.full_loss`; only the first `vocab_size` words of both exist."""
    batch = Batch(student, labels, old_log_probs, **common)
    words = slice(vocab_size)
    log_p = batch.scaled_logits()[..., words].log_softmax(-1)
    teacher = torch.where(batch.valid[..., None], teacher_logits.detach()[..., words], 0)
    temperature = batch.temperature if teacher_temperature is None else teacher_temperature
    log_q = scaled(teacher, temperature).to(log_p.dtype).log_softmax(-1)
    losses = torch.where(batch.valid, divergence(log_p, log_q, direction, beta), 0)
    return batch.finish(losses, log_p, label_log_probs(log_p, labels, batch.valid))
