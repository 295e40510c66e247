"""What a teacher says of sampled tokens; `head_of`, the LM heads of transformers models."""

from typing import Any

import torch
from torch import Tensor

from ..head.check import take_head
from ..head.logits import logits_of, new_buffer
from ..options import Head
from .heads import head_of

__all__ = ["head_of", "head_topk", "newline_token_ids"]


@torch.no_grad()
def head_topk(
    hidden_states: Tensor, head: Head | Tensor, k: int, valid: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The K likeliest words of every valid position; logits exist a few rows at a time.

    Args:
        hidden_states: [B, T, H] or [N, H].
        head: of the same model, see `head_of`.
        k: how many words; at most V.
        valid: the leading shape of hidden_states, not 0 where words are wanted.
        temperature: divides the logits.

    Returns:
        ids [..., K] int64, -1 where not valid, and log-probs [..., K] float32 (float64 for
        float64), -inf there: what `topk_loss` takes.

    Raises:
        ValueError, TypeError: k exceeds V; as `linear_token_log_probs`.
    """
    inputs, student, _ = take_head(hidden_states, head, temperature, "torch")
    size, scale = inputs.rule.scan_size, inputs.rule.scale
    if not 1 <= k <= student.vocab:
        raise ValueError(f"k must be between 1 and V = {student.vocab}; got {k}")
    n, hidden = len(inputs.hidden), inputs.hidden
    ids = torch.full((n, k), -1, device=hidden.device)
    log_probs = torch.full((n, k), -torch.inf, dtype=student.dtype, device=hidden.device)
    out = new_buffer(inputs, size)
    for rows in torch.split(valid.reshape(-1).nonzero()[:, 0], size):
        z = logits_of(inputs, hidden[rows], out).to(student.dtype) * scale
        scores, ids[rows] = z.topk(k)
        log_probs[rows] = scores - z.logsumexp(-1, keepdim=True)
    return ids.view(*student.shape, k), log_probs.view(*student.shape, k)


def newline_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens whose text has a line break: what `newline_spans` takes."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if "\n" in text]
