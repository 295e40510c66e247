"""Listed logits of a head without the others: K rows of the head for each row.

    gather    z_k = scale * cap(hidden . W[ids_k] + bias[ids_k])
    scatter   with x_k = dL/d(hidden . W[ids_k] + bias[ids_k]):
              grad_hidden = sum_k x_k W[ids_k],  grad_weight[v] = sum over ids = v of x hidden

No [N, V] logits and no dense product: N K H multiplications in each. Where K is a good part of V a
CPU scatters by two dense products, of x as [N, V] and head or hidden states: it reads and adds rows
of H numbers one by one at an eighth of the rate of a product, or less.
"""

from typing import Any

import torch
from torch import Tensor

from ..parallel.words import from_owners, own
from .check import HeadInputs
from .chunks import chunks, take
from .sums import Needs, Sums, finish_sums

WORDS_OF_AN_ENTRY = 8  # whose part in the products takes as long as an entry's in the sparse sums


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
    backend: str,
    head: HeadInputs,
    ids: Tensor,
    valid: Tensor,
    gathered: Tensor,
    beta: Tensor,
    needs: Needs,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias from beta = dL/dz [N, K]; gathered: z [N, K].

    valid [N]: rows whose beta is not 0; the others may hold anything. Words are summed in a fixed
    order: the entries of a word by row.
    """
    weight = head.weight
    if head.shard.group:
        ids = own(head.shard, ids, weight.shape[0])
    if weight.is_cpu and backend != "triton" and products_are_faster(weight.shape[0], ids.shape[1]):
        return _by_products(head, ids, valid, gathered, beta, needs, backend)
    slope = torch.where(valid[:, None], _slope(head, gathered, beta), 0)
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


def _slope(head: HeadInputs, gathered: Tensor, beta: Tensor) -> Tensor:
    """dL/d(hidden . W[ids] + bias[ids]) from dL/dz."""
    scale, softcap = head.rule.scale, head.rule.softcap
    slope = beta if scale == 1 else beta * scale
    if softcap:  # what has no gradient may be NaN
        steep = 1 - (gathered / (scale * softcap)).square()
        slope = torch.where(beta != 0, slope * steep, 0)
    return slope


def products_are_faster(vocab: int, k: int) -> bool:
    """Whether dense products with a head of V words are, where a row lists K of them.

    Measured with 64 and 1,024 numbers a word; in bfloat16 at 1,024 they still are at 30 K words.
    """
    return vocab <= WORDS_OF_AN_ENTRY * k


def _by_products(
    head: HeadInputs,
    ids: Tensor,
    valid: Tensor,
    gathered: Tensor,
    beta: Tensor,
    needs: Needs,
    backend: str,
) -> list[Tensor | None]:
    """`scatter` from dL/d(hidden W^T + bias) as [C, V], a chunk of rows at a time."""
    weight, sums = head.weight, Sums(head, needs, False, backend)
    for rows in chunks(valid, head.rule.chunk_size) or []:
        listed = take(ids, rows).long()
        slope = _slope(head, take(gathered, rows), take(beta, rows)).to(weight.dtype)
        if head.shard.group:  # -1: another rank's
            slope, listed = slope.masked_fill(listed < 0, 0), listed.clamp(min=0)
        gradient = slope.new_zeros(len(slope), weight.shape[0]).scatter_add_(1, listed, slope)
        sums.add(rows, take(head.hidden, rows), gradient)
    leaves = head.hidden, weight, head.bias
    dtypes = [weight.dtype if x is None else x.dtype for x in leaves]
    found = finish_sums(sums.finish(), beta.new_ones(()), dtypes, backend)
    return [x if need else None for x, need in zip(found, needs, strict=True)]
