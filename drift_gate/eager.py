"""The gated sampled-token loss, as trainers write it in eager PyTorch.

What `drift-gate check` and the benchmarks measure memory and time beside.
"""

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
