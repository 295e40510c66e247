"""Responses of a causal LM to prompts, many at a time, by nucleus sampling."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

SHRINK = 0.75  # finished rows leave the cache when fewer than this share are still written


class Nucleus(NamedTuple):
    """How a word is drawn."""

    temperature: float = 1.0
    top_p: float = 0.9

    def draw(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Words [B] from logits [B, V] and one uniform number a row, [B], in [0, 1).

        The likeliest words whose mass reaches top_p are kept, and the noise is looked up in their
        cumulative mass: policies that nearly agree draw nearly the same words from it.
        """
        masses, words = (logits.float() / self.temperature).softmax(-1).sort(-1, descending=True)
        total = masses.cumsum(-1)
        last = (total < self.top_p).sum(-1, keepdim=True).clamp(max=total.shape[-1] - 1)
        wanted = noise[:, None] * total.gather(-1, last)
        place = torch.searchsorted(total, wanted, right=True)
        return words.gather(-1, torch.minimum(place, last))[:, 0]


def pad_left(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, P] and their mask [B, P], False on padding."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    lengths = torch.tensor([len(ids) for ids in prompts])
    return tokens, torch.arange(width) >= width - lengths[:, None]


@torch.no_grad()
def respond(
    model: PreTrainedModel,
    tokens: Tensor,  # [B, P] int64, padded on the left
    mask: Tensor,  # [B, P] bool
    *,
    most: int,
    ends: list[int],  # ids that end a response
    pad: int,
    nucleus: Nucleus,
    generator: torch.Generator,  # of the CPU, so that every device draws the same numbers
) -> tuple[Tensor, Tensor]:
    """Responses [B, R] with R <= most, and their mask [B, R]: up to and with the first end."""
    device = tokens.device
    noise = torch.rand(most, len(tokens), generator=generator).to(device)
    stop = torch.tensor(ends, device=device)
    out = torch.full((len(tokens), most), pad, device=device)
    written = torch.zeros_like(out, dtype=torch.bool)
    rows = torch.arange(len(tokens), device=device)  # of `out`, that the cache holds
    alive = torch.ones_like(rows, dtype=torch.bool)
    cache, positions = DynamicCache(config=model.config), mask.long().cumsum(-1) - 1
    inputs, positions = tokens, positions.clamp(min=0)
    for t in range(most):
        logits = model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        word = nucleus.draw(logits[:, -1], noise[t, rows])
        out[rows[alive], t] = word[alive]
        written[rows[alive], t] = True
        alive = alive & ~torch.isin(word, stop)
        left = int(alive.sum())
        if not left:
            break
        if left < SHRINK * len(rows):
            kept = alive.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, word, mask, positions = rows[kept], word[kept], mask[kept], positions[kept]
            alive = alive[kept]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        inputs, positions = word[:, None], positions[:, -1:] + 1
    length = int(written.any(0).sum())
    return out[:, :length], written[:, :length]
