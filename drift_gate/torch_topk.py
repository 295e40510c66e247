"""`topk_rows` in PyTorch, on any device: the formulas stand in `kernels/topk.py`."""

import torch
from torch import Tensor

from .torch_rows import wide


def _kl_term(x: Tensor, log_x: Tensor, log_y: Tensor) -> Tensor:
    """x (log x - log y): 0 where x is 0, infinite where y alone is, whatever exp could not hold."""
    difference = torch.where(log_x == -torch.inf, 0, log_x - log_y)
    return torch.where(difference == torch.inf, difference, x * difference)


def _terms(
    log_p: Tensor, log_q: Tensor, direction: str, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each word's share of the divergence, its g, and p; words with p = q = 0 give 0."""
    p, q = log_p.exp(), log_q.exp()
    if direction == "reverse":
        g = _kl_term(p, log_p, log_q)
        return g, g, p
    if direction == "forward":
        return _kl_term(q, log_q, log_p), -q, p
    m = beta * q + (1 - beta) * p
    log_m = m.clamp(min=torch.finfo(m.dtype).tiny).log()
    g = (1 - beta) * _kl_term(p, log_p, log_m)
    return beta * _kl_term(q, log_q, log_m) + g, g, p


def topk_rows(
    scores: Tensor,
    log_probs: Tensor | None,
    teacher: Tensor,
    present: Tensor,
    valid: Tensor,
    direction: str,
    support: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """See `drift_gate.topk_rows.topk_rows`."""
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
    value, g, p = _terms(log_p, log_q, direction, beta)
    loss = value.sum(-1)
    overlap = torch.minimum(p, log_q.exp()).sum(-1)
    if support == "renormalized":
        slope = g - p * g.sum(-1, keepdim=True)
    else:
        slope = g + p if direction == "reverse" else g
    if support == "tail":
        rest, rest_q = 1 - p.sum(-1), 1 - log_q.exp().sum(-1)
        eps = torch.finfo(dtype).eps
        log_tails = rest.clamp(min=eps).log(), rest_q.clamp(min=eps).log()
        tail, g_tail, p_tail = _terms(*log_tails, direction, beta)
        loss = loss + tail
        overlap = overlap + torch.minimum(p_tail, log_tails[1].exp())
        g_tail = g_tail + p_tail if direction == "reverse" else g_tail
        slope = slope - torch.where(rest < eps, 0, g_tail / p_tail)[:, None] * p
    rows = torch.stack([loss, student_mass, teacher_mass, overlap])
    rows = torch.where(valid, rows, 0).to(dtype)
    return rows, torch.where(here, slope, 0).to(dtype)
