"""What a teacher says of sampled tokens; `head_of`, the LM heads of transformers models."""

from typing import Any

from .heads import head_of

__all__ = ["head_of", "newline_token_ids"]


def newline_token_ids(tokenizer: Any) -> list[int]:
    """Ids of the tokens whose text has a line break: what `newline_spans` takes."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, text in enumerate(texts) if "\n" in text]
