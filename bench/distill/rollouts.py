"""Rollouts: what the student wrote, and what it and the teacher thought of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from drift_gate import linear_token_log_probs, newline_spans

from .models import Pair, head_of, hidden_states, logits_of

ROWS = 2048  # whose teacher logits exist at a time


class Rollouts(NamedTuple):
    """A buffer that is sampled once and trained on for several epochs. P prompt, R response."""

    tokens: Tensor  # [B, P + R] int64, prompts padded on the left, responses on the right
    mask: Tensor  # [B, P + R] bool, False on padding
    response_mask: Tensor  # [B, R] bool
    spans: Tensor  # [B, R] int64 ids of newline spans
    old_log_probs: Tensor  # [B, R] float32: the training model's, before its first step
    teacher_log_probs: Tensor  # [B, R] float32, of the sampled tokens
    teacher_topk_ids: Tensor  # [B, R, K] int64
    teacher_topk_log_probs: Tensor  # [B, R, K] float32

    @property
    def labels(self) -> Tensor:
        """Sampled tokens, [B, R]."""
        return self.tokens[:, -self.response_mask.shape[1] :]

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator[Rollouts]:
        """All responses once, `size` at a time, in the generator's order."""
        order = torch.randperm(len(self.tokens), generator=generator).to(self.tokens.device)
        for rows in order.split(size):
            yield Rollouts(*(field[rows] for field in self))


@torch.no_grad()
def score(
    pair: Pair,
    prompts: tuple[Tensor, Tensor],  # tokens and mask, [B, P]
    responses: tuple[Tensor, Tensor],  # tokens and mask, [B, R]
    *,
    newlines: list[int],
    top_k: int,
    temperature: float,
    backend: str,
) -> Rollouts:
    """Rollouts from responses: old log-probs, the teacher's log-probs and its likeliest words."""
    tokens, mask = (torch.cat(both, 1) for both in zip(prompts, responses, strict=True))
    labels, response_mask = responses
    hidden = hidden_states(pair.student, tokens, mask, labels.shape[1])
    options = dict(temperature=temperature, backend=backend)
    old, _ = linear_token_log_probs(hidden, head_of(pair.student), labels, **options)
    teacher = _teacher_scores(pair, tokens, mask, labels, top_k, temperature)
    spans = newline_spans(labels, newlines, response_mask=response_mask)
    return Rollouts(tokens, mask, response_mask, spans, old * response_mask, *teacher)


def _teacher_scores(
    pair: Pair, tokens: Tensor, mask: Tensor, labels: Tensor, top_k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the labels [B, R], then ids and log-probs of the likeliest words [B, R, K].

    Words beyond the student's head, which some families pad differently, have no share.
    """
    hidden = hidden_states(pair.teacher, tokens, mask, labels.shape[1])
    words = head_of(pair.student).weight.shape[0]
    sampled, ids, listed = [], [], []
    for rows, label in zip(
        hidden.flatten(0, 1).split(ROWS), labels.flatten().split(ROWS), strict=True
    ):
        log_probs = (logits_of(pair.teacher, rows)[:, :words] / temperature).log_softmax(-1)
        sampled.append(log_probs.gather(-1, label[:, None])[:, 0])
        likeliest = log_probs.topk(min(top_k, words))
        ids.append(likeliest.indices)
        listed.append(likeliest.values)
    shape = labels.shape
    return (
        torch.cat(sampled).view(shape),
        torch.cat(ids).view(*shape, -1),
        torch.cat(listed).view(*shape, -1),
    )
