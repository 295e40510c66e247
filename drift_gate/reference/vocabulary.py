"""From logits to log-probs: z = logits / temperature, log p = z - logsumexp(z).

Tensors keep the caller's shapes: [..., V] over the words, [...] over the positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import TopKOutput


class Student(NamedTuple):
    """Where the student's logits come from."""

    shape: torch.Size
    """Of the positions: [B, T] or [N]."""
    dtype: torch.dtype
    """Of all results: float64 for float64 inputs, else float32."""
    device: torch.device
    logits: Callable[[Tensor, Tensor], Tensor]
    """Takes the masks `valid` and `live` [...] and gives logits [..., V]: 0 on rows that are not
    valid, which may hold anything, and without a gradient on rows that are not live."""
    rounded: torch.dtype
    """To which the logits are rounded."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def from_logits(logits: Tensor) -> Student:
    """The student of logits [..., V] that its model has produced."""

    def rows(valid: Tensor, live: Tensor) -> Tensor:
        moving = torch.where(live[..., None], logits, logits.detach())
        return torch.where(valid[..., None], moving, 0)

    dtype = accumulation_dtype(logits)
    return Student(logits.shape[:-1], dtype, logits.device, rows, logits.dtype)


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """z = logits / temperature, in the accumulation dtype."""
    return logits.to(accumulation_dtype(logits)) / temperature


def labelled(labels: Tensor, ignore_index: int | None) -> Tensor:
    """Rows whose label is not ignored."""
    if ignore_index is None:
        return torch.ones_like(labels, dtype=torch.bool)
    return labels != ignore_index


def label_log_probs(log_p: Tensor, labels: Tensor | None, valid: Tensor) -> Tensor:
    """log p of each label; 0 on rows that are not valid, or without labels."""
    if labels is None:
        return torch.zeros_like(log_p[..., 0]).detach()
    words = torch.where(valid, labels, 0).long()
    return torch.where(valid, log_p.gather(-1, words[..., None])[..., 0], 0)


def entropy(log_p: Tensor, valid: Tensor) -> Tensor:
    """H = -sum p log p of each row, detached; 0 on rows that are not valid."""
    log_p = log_p.detach()
    p = log_p.exp()
    terms = torch.where(p > 0, p * log_p, p)  # p log p -> 0; a NaN stays
    return torch.where(valid, -terms.sum(-1), 0)


def student_log_probs(
    student: Student,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`drift_gate.token_log_probs`."""
    valid = labelled(labels, ignore_index)
    log_p = scaled(student.logits(valid, valid), temperature).log_softmax(-1)
    log_probs = label_log_probs(log_p, labels, valid)
    return log_probs, entropy(log_p, valid) if return_entropy else None


def student_gather_lse(
    student: Student, ids: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`drift_gate.gather_lse`: z[ids] [..., K] and logsumexp(z) [...]; NaN for a row with +inf."""
    everything = torch.ones(student.shape, dtype=torch.bool, device=ids.device)
    z = scaled(student.logits(everything, everything), temperature)
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)  # apart: logsumexp's gradient loses its digits
    lse = (z - top).logsumexp(-1) + top[..., 0]
    ids = ids.long().clone()  # autograd saves no tensor made in inference mode
    return z.gather(-1, ids), torch.where(lse == torch.inf, torch.nan, lse)


def student_top_k(
    student: Student,
    k: int,
    *,
    temperature: float = 1.0,
    response_mask: Tensor | None = None,
) -> TopKOutput:
    """`drift_gate.top_k_log_probs`: a stable sort leaves equal logits in the order of their ids."""
    valid = torch.ones(student.shape, dtype=torch.bool, device=student.device)
    if response_mask is not None:
        valid = response_mask != 0
    logits = student.logits(valid, valid).detach()
    vocab = logits.shape[-1]
    ids = logits.sort(dim=-1, descending=True, stable=True).indices
    log_p = scaled(logits, temperature).log_softmax(-1)
    undefined = log_p.isnan().any(-1, keepdim=True)
    ids = torch.where(undefined, torch.arange(vocab, device=ids.device), ids)[..., :k]
    log_probs = log_p.gather(-1, ids)
    missing = ~valid[..., None] | (~undefined & (logits.gather(-1, ids) == -torch.inf))
    ids, log_probs = ids.masked_fill(missing, -1), log_probs.masked_fill(missing, -torch.inf)
    beyond = (0, max(k - vocab, 0))
    pad = torch.nn.functional.pad
    return TopKOutput(pad(ids, beyond, value=-1), pad(log_probs, beyond, value=-torch.inf))
