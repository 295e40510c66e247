"""Listed logits of an LM head without the others, and their gradients: K rows of it a row.

head_gather   z_nk = hidden_n . W[ids_nk] + bias[ids_nk]
weigh_words   grad_hidden_n = sum_k slope_nk W[ids_nk]
sum_words     grad_weight_v = sum over the entries (n, k) with ids_nk = v of slope_nk hidden_n
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .vocabulary import accumulator, bad_ids, words_at_once


def head_gather(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [N, K] int64 or int32
    valid: Tensor,  # [N] bool
) -> Tensor:
    """hidden . W[ids] + bias[ids], [N, K] in float32 (float64); 0 on invalid rows.

    Raises ValueError for an id outside [0, V) in a valid row on the CPU; elsewhere it gives NaN.
    """
    bad = bad_ids(ids, valid, weight.shape[0])
    unread = bad | ~valid[:, None]
    index = ids.masked_fill(unread, 0).long()
    dtype = accumulator(hidden)
    (n, k), width = ids.shape, hidden.shape[1]
    out = torch.zeros(n, k, dtype=dtype, device=hidden.device)
    step = max(1, words_at_once(hidden) // max(1, k * width))
    for i in range(0, n, step):
        at = slice(i, i + step)
        picked = weight.index_select(0, index[at].flatten()).to(dtype)
        torch.bmm(picked.view(-1, k, width), hidden[at].to(dtype)[:, :, None], out=out[at, :, None])
    if bias is not None:
        out += bias[index]
    return out.masked_fill_(unread, 0).masked_fill_(bad, torch.nan)


def weigh_words(
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [N, K]; outside [0, V): no word
    slope: Tensor,  # [N, K]
) -> Tensor:
    """sum_k slope_k W[ids_k], [N, H] in the dtype of W."""
    none = (ids < 0) | (ids >= weight.shape[0])
    slope = slope.masked_fill(none, 0).to(weight.dtype)
    return embedding_bag(ids.masked_fill(none, 0), weight, per_sample_weights=slope, mode="sum")


def sum_words(
    hidden: Tensor,  # [N, H]
    slope: Tensor,  # [N, K]
    starts: Tensor,  # [V + 1], from by_word
    order: Tensor,  # [N K], from by_word
) -> Tensor:
    """Row v: the sum of slope * hidden over the entries of word v; [V, H] like hidden."""
    rows = order.div(slope.shape[1], rounding_mode="floor")
    weights = slope.flatten()[order].to(hidden.dtype)
    bags = embedding_bag(rows, hidden, starts, per_sample_weights=weights, mode="sum")
    return bags[:-1]  # the last holds the entries without a word


def by_word(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Entries of ids [N, K] sorted by word: where each word's start [V + 1], and their order [N K].

    The entries of a word keep their order; those without a word come last.
    """
    flat = ids.flatten().to(torch.int64)
    flat = torch.where((flat < 0) | (flat >= vocab), vocab, flat)
    ordered, order = flat.sort(stable=True)
    words = torch.arange(vocab + 1, device=ids.device)
    return torch.searchsorted(ordered, words), order
