"""Rollouts of a transformers model, and the log-probs that any such model gives them."""

import torch
from torch import Tensor

from drift_gate import linear_token_log_probs
from drift_gate.integrations.teacher import head_of


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], max_new_tokens: int) -> tuple[Tensor, ...]:
    """Token ids, attention mask and response mask, [B, L] each; prompts are padded on the left."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    given, seen = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    ids = model.generate(given, attention_mask=seen, do_sample=True, max_new_tokens=max_new_tokens)
    is_end = ids[:, given.shape[1] :] == tokenizer.eos_token_id
    written = (is_end.cumsum(1) - is_end.long() == 0).long()  # to the first end token, inclusive
    response = torch.cat([torch.zeros_like(seen), written], 1)
    return ids, torch.cat([seen, written], 1), response


def hidden_states(model, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, L - 1, H]: row t predicts token t + 1."""
    return model.base_model(ids, attention_mask=attention_mask).last_hidden_state[:, :-1]


@torch.no_grad()
def score(model, ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Log-probs [B, L - 1] of the tokens after the first; no [tokens, vocabulary] tensor exists."""
    hidden = hidden_states(model, ids, attention_mask)
    return linear_token_log_probs(hidden, head_of(model, hidden.dtype), ids[:, 1:])[0]
