"""Divergence of student and teacher over K listed words a row.

With log p and log q of the listed words (both softmaxed over the list where it is "renormalized"),
and a mixture m = beta q + (1 - beta) p,

    reverse  L = sum p (log p - log q)                              g = p (log p - log q)
    forward  L = sum q (log q - log p)                              g = -q
    jsd      L = sum beta q log(q / m) + (1 - beta) p log(p / m)    g = (1 - beta) p log(p / m)
    mixed    L = beta forward + (1 - beta) reverse                  g likewise

where g = p dL/dp - c p, c = 1 for "reverse", 1 - beta for "mixed", else 0. "tail" adds a bucket
with the rest of either mass. The slope in the scores is then

    renormalized  g - p sum(g)     in the logits: they reach L through a softmax over the list
    truncated     g + c p          in the log-probs
    tail          g + c p - p h    in the log-probs, h = dL/dp of the bucket, 1 - sum p
"""

import torch
from torch import Tensor

from ...choices import DIRECTIONS, SUPPORTS
from ..rules import check_choice, limit_of
from .blocks import wide

MISSING = -1


@torch.no_grad()
def topk_support(
    ids: Tensor,  # [N, K] int64 or int32
    teacher: Tensor,  # [N, K] log-probs
    valid: Tensor,  # [N] bool
    vocab: int,
    check: bool,
    check_duplicates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (words [N, K] as ids, present [N, K] bool, supported [N] bool, counts [2] float32).

    Words are the ids of the entries that are present, and 0 elsewhere. An entry is missing where
    its id is -1, its log-prob -inf, or its word there already: a word listed twice counts once,
    where it is first present. Supported are valid rows with an entry left. Counted are the valid
    rows without, and in valid rows the entries of words already there.

    The checks read values (on a GPU they synchronise) and raise ValueError.
    """
    present = (ids != MISSING) & (teacher != -torch.inf)
    if check:
        bad = present & valid[:, None] & ((ids < 0) | (ids >= vocab))
        if bool(bad.any()):
            row, k = bad.nonzero()[0].tolist()
            word = int(ids[row, k])
            remedy = " (ignore_unknown_ids=True leaves such words out)" if word >= vocab else ""
            raise ValueError(
                f"teacher_topk_ids must lie in [0, {vocab}) or be {MISSING} where missing; "
                f"got {word} at row {row}, entry {k}{remedy}"
            )
    again = _again(ids, present)
    twice = again & valid[:, None]
    if check_duplicates and bool(twice.any()):
        row, k = twice.nonzero()[0].tolist()
        raise ValueError(
            "teacher_topk_ids must not list a word twice in a row; "
            f"got {int(ids[row, k])} twice in row {row}"
        )
    present &= ~again
    supported = valid & present.any(-1)
    counts = torch.stack([(valid & ~supported).sum(), twice.sum()])
    return torch.where(present, ids, 0), present, supported, counts.float()


def _again(ids: Tensor, present: Tensor) -> Tensor:
    """[N, K] bool: present entries of words that an earlier present entry of the row names."""
    ordered, order = ids.masked_fill(~present, MISSING).sort(dim=-1, stable=True)
    again = torch.zeros_like(present)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != MISSING)
    return torch.zeros_like(present).scatter_(1, order, again)


@torch.no_grad()
def topk_rows(
    scores: Tensor,  # [N, K] of the student: logits where renormalised, else log-probs
    log_probs: Tensor | None,  # [N, K] of the student, for its mass on the support
    teacher: Tensor,  # [N, K] log-probs (renormalised: any logits)
    present: Tensor,  # [N, K] bool
    valid: Tensor,  # [N] bool
    direction: str,
    support: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return (rows [4, N], slope [N, K] of the loss in the scores), 0 where not valid.

    The rows are loss, student mass, teacher mass, and overlap = sum min(p, q).
    """
    direction = limit_of(direction, beta, DIRECTIONS)
    check_choice("support", support, SUPPORTS)
    dtype = scores.dtype
    here = present & valid[:, None]
    log_p = wide(scores).masked_fill(~here, -torch.inf)
    log_q = wide(teacher).masked_fill(~here, -torch.inf)
    teacher_mass = log_q.exp().sum(-1)
    student_mass = torch.zeros_like(teacher_mass)
    if log_probs is not None:
        student_mass = wide(log_probs).exp().masked_fill(~here, 0).sum(-1)
    if support == "renormalized":
        log_p = torch.where(here, log_p.log_softmax(-1), -torch.inf)
        log_q = torch.where(here, log_q.log_softmax(-1), -torch.inf)
    p, q = log_p.exp(), log_q.exp()
    value, g = _terms(log_p, log_q, direction, beta)
    loss = value.sum(-1)
    overlap = torch.minimum(p, q).sum(-1)
    c = {"reverse": 1.0, "mixed": 1 - beta}.get(direction, 0.0)
    slope = g - p * g.sum(-1, keepdim=True) if support == "renormalized" else g + c * p
    if support == "tail":
        rest, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
        eps = torch.finfo(dtype).eps
        p_tail, q_tail = rest.clamp(min=eps), rest_q.clamp(min=eps)
        tail, g_tail = _terms(p_tail.log(), q_tail.log(), direction, beta)
        loss = loss + tail
        overlap = overlap + torch.minimum(p_tail, q_tail)
        h = torch.where(rest < eps, 0, g_tail / p_tail + c)
        slope = slope - h[:, None] * p
    rows = torch.where(valid, torch.stack([loss, student_mass, teacher_mass, overlap]), 0)
    return rows.to(dtype), torch.where(here, slope, 0).to(dtype)


@torch.no_grad()
def masses(
    rows: Tensor,  # [4, N] from `topk_rows`
    tokens: Tensor,  # []: how many rows are valid
    counts: Tensor,  # [2] from `topk_support`
) -> Tensor:
    """[5]: means over the valid rows of the last three rows, and the counts."""
    means = rows[1:].sum(-1).div_(tokens.clamp(min=1))
    return torch.cat([means, counts.to(means.dtype)])


def _kl_term(log_x: Tensor, log_y: Tensor) -> Tensor:
    """x (log x - log y): 0 where x is 0, infinite where y alone is, whatever exp could not hold."""
    difference = torch.where(log_x == -torch.inf, 0, log_x - log_y)
    return torch.where(difference == torch.inf, difference, log_x.exp() * difference)


def _terms(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> tuple[Tensor, Tensor]:
    """Each word's share of the divergence, and its g; words with p = q = 0 give 0."""
    p, q = log_p.exp(), log_q.exp()
    if direction == "jsd":
        m = beta * q + (1 - beta) * p
        log_m = m.clamp(min=torch.finfo(m.dtype).tiny).log()
        g = (1 - beta) * _kl_term(log_p, log_m)
        return beta * _kl_term(log_q, log_m) + g, g
    if direction == "forward":
        return _kl_term(log_q, log_p), -q
    reverse = _kl_term(log_p, log_q)
    if direction == "reverse":
        return reverse, reverse
    forward = _kl_term(log_q, log_p)
    return beta * forward + (1 - beta) * reverse, (1 - beta) * reverse - beta * q
