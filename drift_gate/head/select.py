"""`select` of the logits that a head makes, a chunk of rows at a time."""

from typing import Any

import torch
from torch import Tensor

from .check import HeadInputs
from .chunks import longest, put, take
from .logits import logits_of, new_buffer
from .scan import parts_of


def select_head(
    run: Any, head: HeadInputs, k: int, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and logits [N, K], log_sum [N] of this rank's words; valid None: all rows."""
    n = len(head.hidden)
    parts = parts_of(valid, n, head.rule.scan_size)
    buffer = new_buffer(head, longest(parts))
    dtype = torch.promote_types(buffer.dtype, torch.float32)
    ids = torch.full((n, k), -1, dtype=torch.int64, device=buffer.device)
    results = (
        ids,
        buffer.new_full((n, k), -torch.inf, dtype=dtype),
        buffer.new_zeros(n, dtype=dtype),
    )
    for rows in parts:
        logits = logits_of(head, take(head.hidden, rows), buffer)
        found = run.select(logits[None], k, None, head.rule.scale)
        for result, part in zip(results, found, strict=True):
            put(result, rows, part)
    return results
