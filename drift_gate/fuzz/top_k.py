"""Problems of the functions that list a row's likeliest words."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import linear_gather_lse, linear_top_k_log_probs
from ..options import Head, as_head
from .choices import Choices
from .options import MASK_DTYPES, Arguments, Asked, Student
from .shapes import spread_rows
from .values import draw_mask

NOT_ASKED = {"ids": -1.0, "log_probs": -math.inf, "of_ids": -math.inf, "missing": 1.0}
"""What the rows hold that were not asked for."""


def top_k(choose: Choices, student: Student) -> Asked:
    words = student.vocab
    longest = min(words, choose.longest)
    lengths = [k for k in (2, 1, 5, 17, 65, longest) if k <= longest]
    more = [words + 3] if words <= choose.longest else []
    arguments: Arguments = student.arguments | {"k": choose("k", (*lengths, *more))}
    mask = draw_mask(choose, student.shape)
    if mask is None:
        return Asked(arguments, torch.ones(student.shape.lead, dtype=torch.bool))
    given = mask.to(MASK_DTYPES[choose("mask dtype", tuple(MASK_DTYPES))])
    arguments["response_mask"] = spread_rows(choose, given, choose.flag("strided row data"))
    return Asked(arguments, mask)


class ThroughHead(NamedTuple):
    """Which of two words is the likelier may hang on how a product is rounded: judged are the
    log-probs of the words that are listed, whichever they are."""

    log_probs: Tensor
    of_ids: Tensor
    """The log-probs [..., K] that `linear_gather_lse` has of them; -inf where missing."""
    missing: Tensor
    """[..., K] int64: 1 where no word is listed."""
    words: Tensor
    """[...] int64: different words in a row."""


def through_head(
    hidden_states: Tensor, head: Head | Tensor, k: int, *, response_mask: Any = None, **options: Any
) -> ThroughHead:
    """`linear_top_k_log_probs`."""
    found = linear_top_k_log_probs(hidden_states, head, k, response_mask=response_mask, **options)
    vocab = as_head(head).weight.shape[0]
    ids = found.ids[..., :vocab]
    z, lse = linear_gather_lse(hidden_states, head, ids.clamp(min=0), **options)
    of_ids = (z - lse[..., None]).detach().masked_fill(ids < 0, -torch.inf)
    of_ids = torch.nn.functional.pad(of_ids, (0, max(k - vocab, 0)), value=-torch.inf)
    ordered = found.ids.sort(-1).values
    new = (ordered[..., 1:] != ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    words = new.sum(-1) + (ordered[..., 0] >= 0)
    return ThroughHead(found.log_probs, of_ids, (found.ids < 0).long(), words)
