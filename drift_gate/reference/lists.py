"""Divergences over the words that the teacher lists: LSM (arXiv 2603.25562) and its relatives.

An entry of a list is missing where its id is -1 or its log-prob -inf, and where an entry before it
lists the same word. The log p and log q of a row's K entries, -inf where missing, are those

    "renormalized"  of softmaxes over the list
    "truncated"     of the full softmax                                    (verl, VeOmni)
    "tail"          the same, and a bucket with the rest of either mass    (TRL)
"""

from typing import Any

import torch
from torch import Tensor

from ..outputs import LossOutput
from .batch import Batch
from .full import divergence, kl
from .gate import mean
from .vocabulary import Student, label_log_probs

LOG_NOTHING = -100.0
"""log q of a word to which the teacher gives no mass: NeMo-RL's `log_infinitesimal`."""


def repeated(ids: Tensor, present: Tensor) -> Tensor:
    """Which entries [..., K] list a word that an entry before them lists already."""
    out = torch.zeros_like(present)
    for k in range(ids.shape[-1]):
        same = (ids[..., :k] == ids[..., k, None]) & present[..., :k]
        out[..., k] = same.any(-1) & present[..., k]
    return out


def with_tail(log_p: Tensor) -> Tensor:
    """[..., K + 1]: and a bucket with the rest of the mass, at least the dtype's epsilon."""
    rest = 1 - log_p.exp().sum(-1, keepdim=True)
    return torch.cat([log_p, rest.clamp(min=torch.finfo(log_p.dtype).eps).log()], -1)


def without_words(log_p: Tensor, words: Tensor, here: Tensor) -> Tensor:
    """What the words that are not listed add to the reverse KL if the teacher rules them out.

    NeMo-RL's zero_outside_topk: sum over them of p (log p - LOG_NOTHING), from all words less those
    listed. log_p [..., V] is the student's, here [..., K] says which entries count.
    """
    listed = log_p.gather(-1, words).masked_fill(~here, -torch.inf)
    rest = 1 - listed.exp().sum(-1)
    return (
        kl(log_p, torch.zeros_like(log_p))
        - kl(listed, torch.zeros_like(listed))
        - LOG_NOTHING * rest
    )


def student_topk_loss(
    student: Student,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_topk_ids: Tensor,  # [..., K]
    teacher_topk_log_probs: Tensor,  # [..., K]
    *,
    direction: str = "reverse",
    support: str = "renormalized",
    beta: float = 0.5,
    teacher_temperature: float | None = None,
    log_prob_floor: float | None = None,
    zero_outside_topk: bool = False,
    log_probs: Tensor | None = None,
    **common: Any,
) -> LossOutput:
    """`drift_gate.topk_loss`.

    Args:
        teacher_temperature: divides the teacher's log-probs on the renormalised support; the others
            would need its whole distribution.
        log_prob_floor: on the other supports the least log-prob of a listed word, of student and
            teacher (verl's log_prob_min_clamp); the bucket is what the raised masses leave.
        zero_outside_topk: for the truncated support: the teacher has all of its mass on the list,
            and the student's words outside count (NeMo-RL).
        log_probs: the labels' current log-probs, where the caller has them.

    Where the support is renormalised, rows at which no drift is measured are not known beyond
    their list: log-prob (unless it is the caller's) and entropy are NaN, and the student's mass is
    that of the others.
    """
    renormalized = support == "renormalized"
    assert renormalized or teacher_temperature is None
    assert log_prob_floor is None or not renormalized
    assert not zero_outside_topk or (support == "truncated" and direction in ("reverse", "mixed"))
    batch = Batch(student, labels, old_log_probs, **common)
    teacher = teacher_topk_log_probs.detach().to(student.dtype)
    present = (teacher_topk_ids != -1) & (teacher != -torch.inf)
    without_support = (batch.valid & ~present.any(-1)).sum()
    batch.valid = valid = batch.valid & present.any(-1)
    repeats = repeated(teacher_topk_ids, present) & valid[..., None]
    here = present & ~repeats & valid[..., None]  # entries that count

    z = batch.scaled_logits()
    log_p = z.log_softmax(-1)
    words = torch.where(here, teacher_topk_ids, 0).long()
    listed = log_p.gather(-1, words)
    missing = valid[..., None] & ~here  # rows that are not valid keep one: a softmax needs some
    p_k = (z.gather(-1, words) if renormalized else listed).masked_fill(missing, -torch.inf)
    q_k = torch.where(here, teacher, 0).masked_fill(missing, -torch.inf)
    if renormalized:
        p_k = p_k.log_softmax(-1)
        q_k = (q_k / (teacher_temperature or 1.0)).log_softmax(-1)
    if zero_outside_topk:
        q_k = q_k.log_softmax(-1)
    if log_prob_floor is not None:
        p_k, q_k = (torch.where(here, x.clamp(min=log_prob_floor), x) for x in (p_k, q_k))
    if support == "tail":
        p_k, q_k = with_tail(p_k), with_tail(q_k)
    losses = divergence(p_k, q_k, direction, beta)
    if zero_outside_topk:
        outside = without_words(log_p, words, here)
        losses = losses + (outside if direction == "reverse" else (1 - beta) * outside)
    losses = torch.where(valid, losses, 0)

    known = batch.measured if renormalized else valid
    if log_probs is None:
        now = label_log_probs(log_p, labels, valid).masked_fill(valid & ~known, torch.nan)
    else:
        now = batch.rows(log_probs)
    output = batch.finish(losses, log_p, now, known)
    if log_probs is not None:  # of whose logits nothing is known
        del output.metrics["drift_noise"]
    # The student's mass is there where the fused losses know a logsumexp.
    scanned = labels is not None and log_probs is None
    if scanned or not renormalized or batch.return_entropy:
        mass = listed.detach().exp().masked_fill(~here, 0).sum(-1)
        output.metrics["student_mass"] = mean(mass, known)
    output.metrics["teacher_mass"] = mean(teacher.exp().masked_fill(~here, 0).sum(-1), valid)
    overlap = torch.minimum(p_k.detach().exp(), q_k.exp()).sum(-1)
    output.metrics["overlap"] = mean(overlap, valid)
    output.metrics["without_support"] = without_support.to(student.dtype)
    output.metrics["duplicate_words"] = repeats.sum().to(student.dtype)
    return output
