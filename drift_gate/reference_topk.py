"""Eager reference of the teacher top-K losses: LSM (arXiv 2603.25562) and its relatives.

Dense over the K listed words, differentiable, any dtype up to float64; see `reference`.
"""

import torch
from torch import Tensor

from .batch import Batch, Sizes
from .outputs import LossOutput
from .reference import finish, mean, scaled_logits
from .topk_lists import Kind, Lists


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) of [N, K] masses, with 0 log 0 = 0."""
    return torch.where(p > 0, p * (p.where(p > 0, 1).log() - q.where(p > 0, 1).log()), p).sum(-1)


def divergence(p: Tensor, q: Tensor, direction: str, beta: float) -> Tensor:
    """Of student masses p and teacher masses q, [N, K] each, to [N]."""
    if direction == "reverse":
        return kl(p, q)
    if direction == "forward":
        return kl(q, p)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def with_tail(p: Tensor) -> Tensor:
    """[N, K + 1]: a bucket with the rest of the mass, at least the dtype's epsilon."""
    rest = (1 - p.sum(-1, keepdim=True)).clamp(min=torch.finfo(p.dtype).eps)
    return torch.cat([p, rest], -1)


def supported(
    z: Tensor, teacher: Tensor, present: Tensor, log_sum: Tensor | None, support: str
) -> tuple[Tensor, Tensor]:
    """Student and teacher masses p and q on the support, 0 where a word is missing.

    z [N, K] are the student's listed logits, log_sum [N] their logsumexp over the vocabulary.
    """
    z = z.masked_fill(~present, -torch.inf)
    teacher = teacher.masked_fill(~present, -torch.inf)
    if support == "renormalized":
        return z.softmax(-1), teacher.softmax(-1)
    assert log_sum is not None
    p, q = (z - log_sum[:, None]).exp(), teacher.exp()
    return (p, q) if support == "truncated" else (with_tail(p), with_tail(q))


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
    picked = z.gather(1, torch.where(here, words, 0).long())
    log_p = z.log_softmax(-1)
    # Rows without any entry are not valid; one entry keeps their softmax defined.
    safe = here | ~valid[:, None]
    p, q = supported(picked, torch.where(here, teacher, 0), safe, z.logsumexp(-1), support)
    loss = torch.where(valid, divergence(p, q, direction, beta), 0)

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
        terms = torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0)
        entropy = torch.where(valid, -terms.sum(-1), 0).detach()
    result = finish(batch, log_probs, entropy, loss, loss_agg_mode, sizes)
    listed = log_p.gather(1, torch.where(here, words, 0).long()).exp().masked_fill(~here, 0)
    if (batch.ids is not None and not given) or support != "renormalized" or return_entropy:
        result.metrics["student_mass"] = mean(listed.sum(-1).detach(), valid)
    result.metrics["teacher_mass"] = mean(teacher.exp().masked_fill(~here, 0).sum(-1), valid)
    result.metrics["overlap"] = mean(torch.minimum(p, q).sum(-1).detach(), valid)
    result.metrics["without_support"] = without
    return result
