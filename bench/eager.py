"""The losses to beat, as trainers write them in eager PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def block_numbers(lengths: list[int], block_size: int) -> Tensor:
    """Number of each row's fixed block, [N], in packed sequences of these lengths."""
    blocks, first = [], 0
    for length in lengths:
        blocks.append(first + torch.arange(length) // block_size)
        first += -(-length // block_size)
    return torch.cat(blocks)


def drift_weights(drift: Tensor, mask: Tensor, blocks: Tensor, tau: float = 1.0) -> Tensor:
    """Gate of each row with unit mean over the valid ones.

    drift [N] in nats, 0 where invalid; mask [N] float; blocks [N], numbers below N.
    """
    zeros = torch.zeros_like(drift)
    count = zeros.index_add(0, blocks, mask).clamp(min=1)
    signed_mean = zeros.index_add(0, blocks, drift) / count
    gate = torch.exp(-tau * signed_mean.abs())[blocks] * mask
    return gate / (gate.sum() / mask.sum())


def row_loss(
    log_probs: Tensor, old: Tensor, teacher: Tensor, mask: Tensor, blocks: Tensor
) -> Tensor:
    """Gated PPO loss of each row, [N]: clip 0.2, dual clip 3."""
    with torch.no_grad():
        weights = drift_weights((old - log_probs) * mask, mask, blocks)
    advantage = teacher - old
    ratio = (log_probs - old).clamp(-20, 20).exp()
    clipped = torch.max(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    dual = torch.min(-advantage * 3.0, clipped)
    return weights * torch.where(advantage < 0, dual, clipped) * mask


def loss(
    logits: Tensor,  # [N, V], any float dtype
    labels: Tensor,  # [N] int64, in [0, V) on invalid rows too
    old: Tensor,  # [N] float32, as the next two
    teacher: Tensor,
    mask: Tensor,
    blocks: Tensor,  # [N] int64
) -> Tensor:
    """Token mean of the gated sampled-token loss, scalar."""
    log_probs = logits.float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    return row_loss(log_probs, old, teacher, mask, blocks).sum() / mask.sum()


def support_losses(entries: Tensor, teacher: Tensor) -> Tensor:
    """LSM of each row, [N]: reverse KL, both softmaxed over the teacher's words.

    entries [N, K]: the student's log-probs of these words, or logits; teacher [N, K] log-probs.
    """
    log_p, log_q = entries.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def support_loss(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, K] int64
    teacher: Tensor,  # [N, K]
    labels: Tensor,  # [N]
    old: Tensor,  # [N] float32
    blocks: Tensor,  # [N] int64
) -> Tensor:
    """Token mean of the gated LSM, scalar."""
    log_probs = logits.float().log_softmax(-1)
    losses = support_losses(log_probs.gather(-1, ids), teacher)
    with torch.no_grad():
        drift = old - log_probs.gather(-1, labels[:, None])[:, 0]
        weights = drift_weights(drift, torch.ones_like(drift), blocks)
    return (weights * losses).mean()


def support_loss_ungated(logits: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    """Token mean of LSM, scalar."""
    return support_losses(logits.float().log_softmax(-1).gather(-1, ids), teacher).mean()


def support_loss_gather_first(logits: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
    """The same from the K logits alone, as the normaliser cancels."""
    return support_losses(logits.gather(-1, ids).float(), teacher).mean()


def full_losses(
    logits: Tensor,  # [N, V]
    teacher: Tensor,  # [N, V]
    direction: str,
    beta: float = 0.5,
) -> Tensor:
    """Divergence over all words of each row, [N], from float32 (or float64) logits."""
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    if direction == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if direction == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.lerp(p, q, beta).log()
    own, other = (p * (log_p - log_m)).sum(-1), (q * (log_q - log_m)).sum(-1)
    return (1 - beta) * own + beta * other


def full_loss(logits: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """Token mean of the divergence over all words, scalar."""
    return full_losses(logits.float(), teacher.float(), direction).mean()
