"""Losses of the sampled token: what a position's L is, given its log-prob and the teacher's.

    "ppo"         -min(r A, clip(r, 1 - low, 1 + high) A), for A < 0 at most -dual A
                  (Schulman et al. 2017; dual clip: arXiv 1912.09729, equation 5)
    "importance"  -r A
    "cispo"       -sg(clip(r, 1 - low, 1 + high)) A logp        (arXiv 2506.13585, equation 4)
    "k1"          logp - teacher                                (J. Schulman, "Approximating KL
    "k2"          (logp - teacher)^2 / 2                        divergence", 2020; verl's
    "k3"          exp(x) - x - 1,  x = teacher - logp           `kl_penalty`)

with r = exp(clamp(log-ratio, -20, 20)), and sg what autograd takes for a constant.
"""

from typing import Any

import torch
from torch import Tensor

from ..choices import ESTIMATORS
from ..gate import DriftGate
from ..options import Clip
from ..outputs import LossOutput
from .batch import Batch
from .gate import block_ids, mean, of_blocks
from .vocabulary import Student, label_log_probs


def kl_estimate(log_probs: Tensor, teacher: Tensor, estimator: str, bounded: bool) -> Tensor:
    """k1, k2 and k3 of KL(student || teacher); verl bounds x to +-20 and k3 to +-10."""
    if estimator == "k1":
        return log_probs - teacher
    if estimator == "k2":
        return 0.5 * (log_probs - teacher).square()
    x = teacher - log_probs
    if not bounded:
        return x.exp() - x - 1
    x = x.clamp(-20, 20)
    return (x.exp() - x - 1).clamp(-10, 10)


def surrogate(
    log_probs: Tensor, ratio: Tensor, advantage: Tensor, estimator: str, clip: Clip
) -> tuple[Tensor, Tensor]:
    """L of "ppo", "importance" and "cispo"; and where the clip is active."""
    loss = -advantage * ratio
    held_ratio = ratio.clamp(1 - clip.low, 1 + clip.high)
    if estimator == "importance":
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    if estimator == "cispo":
        outside = (ratio < 1 - clip.low) | (ratio > 1 + clip.high)
        return -held_ratio.detach() * advantage * log_probs, outside
    held = -advantage * held_ratio
    worse = torch.maximum(loss, held)
    if clip.dual is not None:
        worse = torch.where(advantage < 0, torch.minimum(-advantage * clip.dual, worse), worse)
    return worse, held > loss


def log_ratio(log_probs: Tensor, old: Tensor, ratio: str, batch: Batch) -> Tensor:
    """log r of each row: its own, or the mean over the valid rows of its block.

    The mean is that of all rows in value and each row's own in gradient, as in GSPO
    (arXiv 2507.18071, equation 14; verl's `compute_policy_loss_gspo`):
    sg(mean) + logp - sg(logp).
    """
    own = log_probs - old
    if ratio == "token" or batch.old_log_probs is None:
        return own.clamp(-20, 20)
    size = batch.gate.block_size if isinstance(batch.gate, DriftGate) else 64
    ids = block_ids(batch.valid, batch.sequences, ratio, size, batch.span_ids)
    together = of_blocks(own.detach(), ids, "mean")
    moving = torch.where(log_probs == -torch.inf, 0, log_probs - log_probs.detach())
    return (together + moving).clamp(-20, 20)


def bounded_advantage(advantage: Tensor, bound: float | tuple[float, float] | None) -> Tensor:
    """A within `Clip.advantage`."""
    if bound is None:
        return advantage
    low, high = bound if isinstance(bound, tuple) else (-bound, bound)
    return advantage.clamp(low, high)


def student_opd_loss(
    student: Student,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    *,
    estimator: str = "ppo",
    clip: Clip = Clip(),  # noqa: B008  (frozen)
    advantages: Tensor | None = None,
    advantage: str = "old",
    ratio: str = "token",
    teacher_log_prob_min: float | None = None,
    **common: Any,
) -> LossOutput:
    """`drift_gate.opd_loss`.

    A is the caller's `advantages`, else teacher - old ("old", the paper's) or teacher - sg(logp)
    ("current", refreshed each step: AsyncOPD, arXiv 2606.24143). Without old log-probs old is
    sg(logp): r is 1 in value.
    """
    batch = Batch(student, labels, old_log_probs, **common)
    log_p = batch.scaled_logits().log_softmax(-1)
    log_probs = label_log_probs(log_p, labels, batch.valid)
    now = log_probs.detach()
    teacher = None if teacher_log_probs is None else batch.rows(teacher_log_probs)
    floored = None
    if teacher_log_prob_min is not None:
        assert teacher is not None
        floored = (batch.valid & (teacher < teacher_log_prob_min)).sum()
        teacher = teacher.clamp(min=teacher_log_prob_min)

    clipped = torch.zeros_like(batch.valid)
    if not ESTIMATORS[estimator].ratio:
        assert teacher is not None
        losses = kl_estimate(log_probs, teacher, estimator, clip.kl)
    else:
        old = now if old_log_probs is None else batch.rows(old_log_probs)
        if advantages is not None:
            a = batch.rows(advantages)
        else:
            assert teacher is not None
            a = teacher - (old if advantage == "old" else now)
        r = log_ratio(log_probs, old, ratio, batch).exp()
        a = bounded_advantage(a, clip.advantage)
        losses, clipped = surrogate(log_probs, r, a, estimator, clip)

    output = batch.finish(losses, log_p, log_probs)
    output.metrics["pg_clipfrac"] = mean(clipped.to(now.dtype), batch.valid)
    if floored is not None:
        output.metrics["floored"] = floored.to(now.dtype)
    return output
