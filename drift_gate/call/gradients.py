"""Gradients of the size of the logits: where they go, and how `expand` writes them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..parallel.words import Shard, own
from ..passes.backends import passes_of
from ..passes.memory import empty
from ..passes.rules import COEFFICIENT, SLOPE, TOKEN_LOSS


def expand(
    backend: str,
    logits: Tensor,  # [B, T, V]
    ids: Tensor,  # [N, K], counted from the first of all ranks' words
    maximum: Tensor | None,  # [N], from scan, as the next two; None where alpha is
    log_sum: Tensor | None,  # [N]
    gathered: Tensor | None,  # [N, K]
    valid: Tensor | None,  # [N]
    alpha: Tensor | None,  # [N]; None: 0, and so is gamma
    beta: Tensor,  # [N, K]
    scale: float,
    shard: Shard,
    inplace: bool,
    gamma: Tensor | None = None,  # [N]
) -> Tensor:
    """scale * ((alpha + gamma log softmax(z)) softmax(z) + sum_k beta_k onehot(ids_k)) of this
    rank's words."""
    if shard.group:
        ids = own(shard, ids, logits.shape[2])
    out = room_for(logits, inplace)
    passes_of(backend).expand(
        logits, ids, maximum, log_sum, gathered, valid, alpha, beta, scale, out, gamma
    )
    return written(logits, out, inplace)


def expand_labels(
    backend: str,
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [N], counted from the first of all ranks' words
    maximum: Tensor,  # [N], from scan, as the next two
    log_sum: Tensor,  # [N]
    gathered: Tensor,  # [N, 1]
    valid: Tensor | None,  # [N]
    slope: Tensor,  # [N]: d loss / d log p[label]
    scale: float,
    shard: Shard,
    inplace: bool,
) -> Tensor:
    """scale * slope * (onehot(label) - softmax(z)) of this rank's words."""
    if shard.group:
        labels = own(shard, labels, logits.shape[2])
    out = room_for(logits, inplace)
    passes_of(backend).expand_labels(
        logits, labels, maximum, log_sum, gathered, valid, slope, scale, out
    )
    return written(logits, out, inplace)


def room_for(logits: Tensor, inplace: bool) -> Tensor:
    """Where the gradient of the logits is to be written: the logits' own place, or a new one."""
    return logits.detach() if inplace else empty(logits.shape, logits.dtype, logits.device)


def written(logits: Tensor, out: Tensor, inplace: bool) -> Tensor:
    """The gradient that was written to `out`, the room for it."""
    if inplace:
        overwritten(logits)
    return out


def overwritten(x: Tensor | Sequence[Tensor]) -> None:
    """Tell autograd that x holds a gradient now: it then refuses whatever still needs x."""
    torch.autograd.graph.increment_version(x)


def row_gradient(table: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """dL/dx [N] of what the rows' losses are functions of, from those of loss and table."""
    of_loss, of_table = grads
    of_token = None if of_table is None else of_table[TOKEN_LOSS]
    slope, coefficient = table[SLOPE], table[COEFFICIENT]
    if of_loss is None:
        return torch.zeros_like(slope) if of_token is None else slope * of_token
    weight = coefficient * of_loss
    return slope * (weight if of_token is None else weight + of_token)
