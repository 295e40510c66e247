"""The passes over the vocabularies of student and teacher. With a = log p of the student and
b = log q of the teacher, row by row:

    reverse  L = sum p (a - b)                        dL/dz = p (a - b - L)
    forward  L = sum q (b - a)                        dL/dz = p - q
    jsd      L = beta sum q (b - log m)               dL/dz = p (h - sum p h)
               + (1 - beta) sum p (a - log m)         h = (1 - beta) (a - log m)
             with m = beta q + (1 - beta) p

`divergence` reads both once; `divergence_grad` reads both once and writes the gradient.
"""

import torch
from torch import Tensor

from ...choices import FULL_DIRECTIONS
from ..rules import limit_of
from .blocks import wide
from .vocabulary import gather, joined, read, scratch, walk, zero

LOWEST = -1e30  # stands for -inf: its exponential is 0, and 0 times it is 0 and not NaN


@torch.no_grad()
def divergence(
    logits: Tensor,  # [B, T, V], any float dtype, any strides
    teacher: Tensor,  # [B, T, U], U <= V, likewise
    labels: Tensor | None,  # [N] int64 or int32, N = B * T
    valid: Tensor,  # [N] bool
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [N], log_probs [N], statistics [5, N], entropy [N] or [0]).

    All are float32, or float64 for float64 logits. The statistics are maximum and log_sum of
    student and teacher, and the centre of the gradient. A row with a NaN or +inf, or all -inf,
    gives NaN. Logits of -1e30 and less count as -inf.

    Raises ValueError for a label outside [0, U) in a valid row on the CPU; elsewhere it gives NaN.
    """
    direction = limit_of(direction, beta, FULL_DIRECTIONS)
    student = logits[..., : teacher.shape[2]]
    x, y = joined(student, teacher)
    blocks = scratch(x, 5 if direction == "jsd" else 3)
    results = blocks[0].new_zeros(7, len(valid))
    for b, rows, at in walk(x, valid, len(blocks[0])):
        u = read(x, b, rows, scale, blocks[0])
        v = read(y, b, rows, teacher_scale, blocks[1])
        tops = _centre(u), _centre(v)
        rest = [block[: len(u)] for block in blocks[2:]]
        if direction == "jsd":
            found = _jsd(u, v, beta, rest, with_entropy)
        else:
            found = _kl(u, v, direction == "reverse", rest[0], with_entropy)
        results[:, at] = torch.stack([x.to(u.dtype) for x in (*tops, *found)])
    top, teacher_top, loss, log_sum, teacher_log_sum, centre, entropy = results
    log_probs = torch.zeros_like(loss)
    if labels is not None:
        log_probs = gather(student, labels[:, None], valid, scale)[:, 0].sub_(top).sub_(log_sum)
    statistics = torch.stack([top, log_sum, teacher_top, teacher_log_sum, centre])
    entropy = entropy if with_entropy else entropy[:0]
    return loss.clone(), log_probs, statistics, entropy.clone()


@torch.no_grad()
def divergence_grad(
    logits: Tensor,  # [B, T, V], as given to divergence
    teacher: Tensor,  # [B, T, U]
    statistics: Tensor,  # [5, N], from divergence
    valid: Tensor,  # [N] bool
    upstream: Tensor,  # [N]
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    out: Tensor,  # [B, T, V], any float dtype, any strides; may be the logits
) -> None:
    """Write upstream * d loss / d logits into `out`, computed in float32 (float64), rounded once.

    Rows that are not valid, or whose upstream is 0, become 0 and are not read.
    """
    direction = limit_of(direction, beta, FULL_DIRECTIONS)
    words = teacher.shape[2]
    out.detach()[..., words:].zero_()
    x, y, target = joined(logits[..., :words], teacher, out[..., :words])
    active = valid & (upstream != 0)
    zero(target, ~active)
    top, log_sum, teacher_top, teacher_log_sum, centre = (s[:, None] for s in statistics)
    factor = (-log_sum).exp_().mul_(upstream[:, None]).mul_(scale)
    teacher_factor = (-teacher_log_sum).exp_().mul_(upstream[:, None]).mul_(scale)
    ratio = _mass_ratio(log_sum, teacher_log_sum)
    # log p - log q - L = (a - b) - mean, of centred a and b
    mean = (wide(centre) + (log_sum - teacher_log_sum)).to(factor.dtype)
    blocks = scratch(x, 3 if direction == "jsd" else 2)
    for b, rows, at in walk(x, active, len(blocks[0])):
        u = read(x, b, rows, scale, blocks[0])
        v = read(y, b, rows, teacher_scale, blocks[1])
        u = u.sub_(top[at]).clamp_(min=LOWEST)
        v = v.sub_(teacher_top[at]).clamp_(min=LOWEST)
        if direction == "forward":  # p - q
            v.exp_().mul_(teacher_factor[at])
            slope = u.exp_().mul_(factor[at]).sub_(v)
        elif direction == "reverse":  # p (a - b - mean)
            slope = torch.sub(u, v, out=v).sub_(mean[at]).mul_(u.exp_()).mul_(factor[at])
        else:  # p (log p - log m - centre)
            e = torch.exp(u, out=blocks[2][: len(u)])
            slope = u.sub_(_log_mixture(e, v.exp_(), ratio[at], beta, v)).sub_(centre[at])
            slope.mul_(e).mul_(factor[at] * (1 - beta))
        target[b, rows] = slope.to(target.dtype)


# Sums over the words of a few rows: [rows, V] of student and teacher -> [rows] each.


def _centre(z: Tensor) -> Tensor:
    """The maximum of each row, which is taken off; what is left is at least LOWEST."""
    top = z.amax(-1)
    z.sub_(top[:, None]).clamp_(min=LOWEST)
    return top


def _kl(
    a: Tensor, b: Tensor, reverse: bool, block: Tensor, with_entropy: bool
) -> tuple[Tensor, ...]:
    """Loss, log_sum of student and teacher, centre and entropy from centred logits."""
    u, v = (a, b) if reverse else (b, a)  # KL(u || v)
    other_total = torch.exp(v, out=block).sum(-1)
    entropy = block.mul_(v).sum(-1) if with_entropy and not reverse else other_total
    missing = v.amin(-1) == LOWEST
    if bool(missing.any()):
        missing &= ((v == LOWEST) & (u > LOWEST)).any(-1)
    total = torch.exp(u, out=block).sum(-1)
    if with_entropy and reverse:
        entropy = torch.mul(block, u).sum(-1)
    moment = v.neg_().add_(u).mul_(block).sum(-1)
    moment.masked_fill_(missing & ~moment.isnan(), torch.inf)
    total, other_total = wide(total), wide(other_total)
    log_sum, other_log_sum = total.log(), other_total.log()
    loss = moment / total - log_sum + other_log_sum
    own, other = (log_sum, other_log_sum) if reverse else (other_log_sum, log_sum)
    return loss, own, other, loss, own - entropy / (total if reverse else other_total)


def _jsd(
    a: Tensor, b: Tensor, beta: float, blocks: list[Tensor], with_entropy: bool
) -> tuple[Tensor, ...]:
    """Loss, log_sum of student and teacher, centre and entropy from centred logits.

    The centre is KL(p || m) without the correction for how far the mixture is from summing to 1,
    which the terms that it is taken from lack, too: where one word has all the mass they cancel.
    """
    e, other_e, block = torch.exp(a, out=blocks[0]), torch.exp(b, out=blocks[1]), blocks[2]
    total, other_total = wide(e.sum(-1)), wide(other_e.sum(-1))
    entropy = torch.mul(e, a, out=block).sum(-1) if with_entropy else total
    log_sum, other_log_sum = total.log(), other_total.log()
    ratio = _mass_ratio(log_sum.to(a.dtype), other_log_sum.to(a.dtype))
    n = _log_mixture(e, other_e, ratio[:, None], beta, block)
    centre = a.sub_(n).mul_(e).sum(-1) / total
    other_centre = b.sub_(n).mul_(other_e).sum(-1) / other_total
    # Of the mixture with its rounded ratio: the loss has its minimum there, and hardly feels the
    # rounding, if only the mixture sums to 1.
    log_mixed = torch.lerp(total, wide(ratio) * other_total, beta).log()
    divergence = centre - log_sum + log_mixed
    other = other_centre - other_log_sum + log_mixed
    loss = (1 - beta) * divergence + beta * other
    return loss, log_sum, other_log_sum, centre, log_sum - entropy / total


def _mass_ratio(log_sum: Tensor, other_log_sum: Tensor) -> Tensor:
    """Of a row's sums of exponentials: the same bits in the forward and in the gradient."""
    return (wide(log_sum) - other_log_sum).exp_().to(log_sum.dtype)


def _log_mixture(e: Tensor, other_e: Tensor, ratio: Tensor, beta: float, block: Tensor) -> Tensor:
    """log((1 - beta) e + beta ratio other_e) in the block, finite where both are 0."""
    m = torch.lerp(e, torch.mul(other_e, ratio, out=block), beta, out=block)
    return m.clamp_(min=torch.finfo(m.dtype).tiny).log_()
