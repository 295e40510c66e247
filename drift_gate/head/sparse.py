"""Listed logits of a head without the others: K rows of the head for each row.

    gather    z_k = scale * cap(hidden . W[ids_k] + bias[ids_k])
    scatter   with x_k = dL/d(hidden . W[ids_k] + bias[ids_k]):
              grad_hidden = sum_k x_k W[ids_k],  grad_weight[v] = sum over ids = v of x hidden

No [N, V] logits and no dense product: N K H multiplications in each.
"""

from typing import Any

import torch
from torch import Tensor

from ..parallel.words import from_owners, own
from .check import HeadInputs
from .sums import Needs


def gather(run: Any, head: HeadInputs, ids: Tensor, valid: Tensor) -> Tensor:
    """z [N, K] of hidden [N, H] at ids [N, K], in float32 (float64); 0 on invalid rows."""
    shard, rule = head.shard, head.rule
    words = head.weight.shape[0]
    local = own(shard, ids, words).clamp(min=0) if shard.group else ids
    z: Tensor = run.head_gather(head.hidden, head.weight, head.bias, local, valid)
    if rule.softcap:
        z = z.div_(rule.softcap).tanh_().mul_(rule.softcap)
    z = z.mul_(rule.scale)
    return from_owners(z, ids, shard, words) if shard.group else z


def scatter(
    run: Any,
    head: HeadInputs,
    ids: Tensor,
    valid: Tensor,
    gathered: Tensor,
    beta: Tensor,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias from beta = dL/dz [N, K]; gathered: z [N, K].

    Words are summed in a fixed order: the entries of a word by row.
    """
    weight, rule = head.weight, head.rule
    if head.shard.group:
        ids = own(head.shard, ids, weight.shape[0])
    slope = beta * rule.scale
    if rule.softcap:
        slope = slope * (1 - (gathered / (rule.scale * rule.softcap)).square())
    read = valid[:, None] & (beta != 0)  # what has no gradient may be NaN
    slope = torch.where(read, slope, 0).contiguous()
    ids = torch.where(slope == 0, weight.shape[0], ids)  # no word
    grads: list[Tensor | None] = [None, None, None]
    if needs.hidden:
        grads[0] = run.weigh_words(weight, ids, slope)
    if needs.weight or needs.bias:
        entries = run.by_word(ids, weight.shape[0])
    if needs.weight:
        grads[1] = run.sum_words(head.hidden, slope, *entries)
    if needs.bias and head.bias is not None:
        ones = torch.ones_like(head.hidden[:, :1], dtype=slope.dtype)
        grads[2] = run.sum_words(ones, slope, *entries)[:, 0].to(head.bias.dtype)
    return grads
