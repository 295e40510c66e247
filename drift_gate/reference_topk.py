"""Eager reference of the teacher top-K losses: LSM (arXiv 2603.25562) and its relatives.

Dense over the K listed words, differentiable, any dtype up to float64; see `reference`.
"""

import torch
from torch import Tensor

from .batch import Batch, Sizes
from .outputs import LossOutput
from .reference import finish, mean, scaled_logits
from .reference_full import divergence
from .topk_lists import Kind, Lists


def with_tail(log_p: Tensor) -> Tensor:
    """[N, K + 1]: a bucket with the rest of the mass, at least the dtype's epsilon."""
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    return torch.cat([log_p, rest.clamp(min=torch.finfo(log_p.dtype).eps).log()], -1)


def supported(
    z: Tensor, log_p: Tensor, teacher: Tensor, present: Tensor, support: str
) -> tuple[Tensor, Tensor]:
    """log p and log q of student and teacher on the support, -inf where a word is missing.

    z and log_p [N, K] are the student's listed logits, and log-probs over the vocabulary.
    """
    z, log_p, teacher = (x.masked_fill(~present, -torch.inf) for x in (z, log_p, teacher))
    if support == "renormalized":
        return z.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p, teacher) if support == "truncated" else (with_tail(log_p), with_tail(teacher))


def topk_loss(
    batch: Batch,
    logits: Tensor,
    lists: Lists,
    kind: Kind,
    loss_agg_mode: str,
    sizes: Sizes,
    return_entropy: bool,
    log_probs: Tensor | None = None,
) -> LossOutput:
    """`drift_gate.topk_loss` on checked arguments; logits [..., V].

    log_probs: the labels' log-probs [N] where the caller has them.
    """
    (words, teacher, present, without), (direction, support, beta) = lists, kind
    valid = batch.valid
    rows = logits.reshape(-1, logits.shape[-1])
    z = scaled_logits(torch.where(valid[:, None], rows, 0), batch.temperature)
    here = present & valid[:, None]
    log_p = z.log_softmax(-1)
    listed = torch.where(here, words, 0).long()
    picked, log_p_k = z.gather(1, listed), log_p.gather(1, listed)
    # Rows without any entry are not valid; one entry keeps their softmax defined.
    safe = here | ~valid[:, None]
    student, q = supported(picked, log_p_k, torch.where(here, teacher, 0), safe, support)
    loss = torch.where(valid, divergence(student, q, direction, beta), 0)

    given = log_probs is not None
    if log_probs is None:
        labels = torch.zeros_like(valid, dtype=torch.int64) if batch.ids is None else batch.ids
        labels = torch.where(valid, labels, 0).long()
        log_probs = log_p.gather(1, labels[:, None])[:, 0].detach()
        if batch.ids is None:
            log_probs = torch.zeros_like(log_probs)
    log_probs = torch.where(valid, log_probs, 0)
    entropy = None
    if return_entropy:
        p = log_p.exp()
        terms = torch.where(p > 0, p * log_p, p)  # p log p -> 0; a NaN stays
        entropy = torch.where(valid, -terms.sum(-1), 0).detach()
    result = finish(batch, log_probs, entropy, loss, loss_agg_mode, sizes)
    masses = log_p_k.exp().masked_fill(~here, 0)
    if (batch.ids is not None and not given) or support != "renormalized" or return_entropy:
        result.metrics["student_mass"] = mean(masses.sum(-1).detach(), valid)
    result.metrics["teacher_mass"] = mean(teacher.exp().masked_fill(~here, 0).sum(-1), valid)
    overlap = torch.minimum(student.exp(), q.exp()).sum(-1)
    result.metrics["overlap"] = mean(overlap.detach(), valid)
    result.metrics["without_support"] = without
    return result
