"""What a teacher says of sampled tokens, and the LM heads of Hugging Face models."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..head import check_head, logits_of

# A model's head multiplies its logits by the first of these that its config has.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")


class HeadOptions(NamedTuple):
    """An LM head: `_asdict()` gives the `linear_` losses' keyword arguments."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def head_options(model: Any, dtype: torch.dtype) -> HeadOptions:
    """LM head of a transformers model, in the dtype of its hidden states (a no-op where equal).

    Softcap and scale are those of the model's text config. transformers caps what it has scaled,
    cap(scale x), and the losses scale what they have capped: with the cap divided by the scale
    both are the same.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = next((s for s in (getattr(config, name, None) for name in SCALES) if s is not None), 1)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None and scale == 1:  # Granite divides; HyperCLOVA X multiplies
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(head, "bias", None)
    return HeadOptions(
        head.weight.to(dtype),
        None if bias is None else bias.to(dtype),
        softcap / scale if softcap else None,
        float(scale),
    )


@torch.no_grad()
def head_topk(
    hidden_states: Tensor, head: HeadOptions, k: int, valid: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The K likeliest words of every valid position; logits exist a few rows at a time.

    Args:
        hidden_states: [B, T, H] or [N, H].
        head: of the same model.
        k: how many words; at most V.
        valid: the leading shape of hidden_states, not 0 where words are wanted.
        temperature: divides the logits.

    Returns:
        ids [..., K] int64, -1 where not valid, and log-probs [..., K] float32 (float64 for
        float64), -inf there: what `topk_loss` takes.

    Raises:
        ValueError, TypeError: k exceeds V; as `linear_token_log_probs`.
    """
    inputs = check_head(
        hidden_states, **head._asdict(), temperature=temperature, chunk_size=None, backend="torch"
    )
    student, size = inputs.student, inputs.scan_size
    if not 1 <= k <= student.vocab:
        raise ValueError(f"k must be between 1 and V = {student.vocab}; got {k}")
    n, hidden = len(inputs.hidden), inputs.hidden
    ids = torch.full((n, k), -1, device=hidden.device)
    log_probs = torch.full((n, k), -torch.inf, dtype=student.dtype, device=hidden.device)
    out = hidden.new_empty(size, student.vocab)
    for rows in torch.split(valid.reshape(-1).nonzero()[:, 0], size):
        z = logits_of(inputs.head, hidden[rows], out).to(student.dtype) * inputs.head.scale
        scores, ids[rows] = z.topk(k)
        log_probs[rows] = scores - z.logsumexp(-1, keepdim=True)
    return ids.view(*student.shape, k), log_probs.view(*student.shape, k)


def newline_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens whose text has a line break: what `newline_spans` takes."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if "\n" in text]
