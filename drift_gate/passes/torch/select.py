"""The K words of each row that have the largest logits, and the row's sum of exponentials.

Of words with equal logits those with the smaller ids come first, inside the list and at its end:
`torch.topk` leaves it open which of them it takes.
"""

import torch
from torch import Tensor

from .vocabulary import accumulator, joined, scan, walk, words_at_once

NOTHING = -1


def select(
    logits: Tensor,  # [B, T, V], any float dtype, any strides
    k: int,
    valid: Tensor | None,  # [N] bool, N = B * T; None: all rows
    scale: float,  # 1 / temperature
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids [N, K] int64, logits [N, K], log_sum [N] as `scan` has it).

    Logits are as they are given, in float32 (float64), largest first. Entries without a word have
    the id -1 and the logit -inf: those beyond V, of invalid rows (which are not read), and of words
    whose logit is -inf. The lists of a row whose log_sum is not finite mean nothing.
    """
    ids, values = largest(logits, k, valid)
    label = ids.new_zeros(len(ids), 1)
    return ids, values, scan(logits, label, valid, scale, False)[3]


@torch.no_grad()
def largest(logits: Tensor, k: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`select` without the sums."""
    batch, length, vocab = logits.shape
    n, kept = batch * length, min(k, vocab)
    ids = torch.full((n, k), NOTHING, dtype=torch.int64, device=logits.device)
    values = logits.new_full((n, k), -torch.inf, dtype=accumulator(logits))
    (x,) = joined(logits)
    for b, rows, at in walk(x, valid, max(1, words_at_once(x) // vocab)):
        ids[at, :kept], values[at, :kept] = _largest_of(x[b, rows], kept)
    return ids, values


def _largest_of(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of rows [C, V]: every word above the K-th largest logit, and the first of those at it."""
    vocab = x.shape[1]
    border = x.topk(k).values[:, -1:]
    wide = 3 * vocab > torch.iinfo(torch.int32).max
    word = torch.arange(vocab, device=x.device, dtype=torch.int64 if wide else torch.int32)
    order = torch.where(x > border, word, torch.where(x == border, word + vocab, word + 2 * vocab))
    ids = order.topk(k, largest=False).values.sort().values.long() % vocab
    values, place = x.gather(1, ids).sort(descending=True, stable=True)
    return ids.gather(1, place).masked_fill_(values == -torch.inf, NOTHING), values.to(
        accumulator(x)
    )
