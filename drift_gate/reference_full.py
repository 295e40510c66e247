"""The eager reference of the losses over the whole vocabulary; see `reference`.

p and q are the distributions of student and teacher at one position, [N, V] logits a row each.
"""

import math

import torch
from torch import Tensor

from .reference import scaled_logits, token_log_probs


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a (log a - log b) of each row, [N].

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
    """L [N] of the log-probs of student and teacher [N, V]."""
    if direction == "reverse":
        return kl(log_p, log_q)
    if direction == "forward":
        return kl(log_q, log_p)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def position_losses(
    logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    labels: Tensor | None,  # [N]
    valid: Tensor,  # [N]
    temperature: float,
    teacher_temperature: float,
    direction: str,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """L, log-prob of the label (0 without labels) and entropy of the student, [N] each.

    0 on invalid rows, which may hold anything.
    """
    known = labels is not None
    word = labels if labels is not None else torch.zeros_like(valid, dtype=torch.int64)
    log_probs, entropy = token_log_probs(logits, word, valid, temperature)
    student = torch.where(valid[:, None], logits, 0)
    teacher = torch.where(valid[:, None], teacher_logits, 0)
    log_p = scaled_logits(student, temperature).log_softmax(-1)
    log_q = scaled_logits(teacher, teacher_temperature).to(log_p.dtype).log_softmax(-1)
    losses = divergence(log_p, log_q.detach(), direction, beta)
    return (
        torch.where(valid, losses, 0),
        log_probs if known else torch.zeros_like(log_probs),
        entropy,
    )
