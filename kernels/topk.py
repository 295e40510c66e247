"""`topk_rows`: divergence of student and teacher over K listed words, and its slope.

With log p and log q of the listed words (both softmaxed over the list where it is "renormalized"),
and a mixture m = beta q + (1 - beta) p,

    reverse  L = sum p (log p - log q)                              g = p (log p - log q)
    forward  L = sum q (log q - log p)                              g = -q
    jsd      L = sum beta q log(q / m) + (1 - beta) p log(p / m)    g = (1 - beta) p log(p / m)

where g = p dL/dp up to a constant. "tail" adds a bucket with the rest of either mass. The slope in
the scores is then

    renormalized  g - p sum(g)        in the logits: they reach L through a softmax over the list
    truncated     g (reverse: g + p)  in the log-probs
    tail          g - p h             in the log-probs, h = dL/dp of the bucket, 1 - sum p

Row data: one launch, O(N K) bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TINY

ELEMENTS = 2048  # of a program's tile
LONGEST = 4096  # words a list


@triton.jit
def _xlogy(x, y):
    """x * y, and 0 where x is 0 and y infinite."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def _kl_term(x, log_x, log_y):
    """x (log x - log y): 0 where x is 0, and infinite where y alone is.

    Told by the logarithms: a mass too small for float32 is 0 without them.
    """
    difference = tl.where(log_x == -float("inf"), 0.0, log_x - log_y)
    return tl.where(difference == float("inf"), difference, x * difference)


@triton.jit
def _smaller(x, y):
    """The smaller of both; NaN stays."""
    return tl.where((x < y) | (x != x), x, y)


@triton.jit
def _log_softmax(x, present):
    """log_softmax over the entries present in each row of x [ROWS, K]."""
    x = tl.where(present, x, -float("inf"))
    top = tl.max(x, 1)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    return x - top[:, None] - tl.log(total)[:, None]


@triton.jit
def _terms(log_p, log_q, p, q, BETA: tl.constexpr, DIRECTION: tl.constexpr):
    """Each word's share of L, and its g."""
    if DIRECTION == "reverse":
        value = _kl_term(p, log_p, log_q)
        g = value
    elif DIRECTION == "forward":
        value = _kl_term(q, log_q, log_p)
        g = -q
    else:
        TINY_: tl.constexpr = TINY
        m = BETA * q + (1.0 - BETA) * p
        log_m = tl.log(tl.where(m < TINY_, TINY_, m))  # keeps NaN
        g = (1.0 - BETA) * _xlogy(p, log_p - log_m)
        value = BETA * _xlogy(q, log_q - log_m) + g
    return value, g


@triton.jit
def _topk_rows(
    scores,  # [N, K] float32: logits where renormalised, else log-probs
    log_probs,  # [N, K] float32, or None: the student's mass is not wanted
    teacher,  # [N, K] float32
    present,  # [N, K] uint8
    valid,  # [N] uint8
    rows_out,  # [4, N] float32: loss, student mass, teacher mass, overlap
    slope_out,  # [N, K] float32
    n_rows,
    K: tl.constexpr,
    DIRECTION: tl.constexpr,  # "reverse", "forward", "jsd"
    SUPPORT: tl.constexpr,  # "renormalized", "truncated", "tail"
    BETA: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EPS: tl.constexpr = 1.1920929e-7
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = row < n_rows
    live = tl.load(valid + row, mask=inside, other=0) != 0
    place = row.to(tl.int64)[:, None] * K + k
    listed = (k < K) & live[:, None]
    here = (tl.load(present + place, mask=listed, other=0) != 0) & listed
    log_p = tl.load(scores + place, mask=here, other=-float("inf"))
    log_q = tl.load(teacher + place, mask=here, other=-float("inf"))
    teacher_mass = tl.sum(tl.exp(log_q), 1)
    student_mass = teacher_mass * 0.0
    if log_probs is not None:
        student_mass = tl.sum(tl.exp(tl.load(log_probs + place, mask=here, other=-float("inf"))), 1)
    if SUPPORT == "renormalized":
        log_p = _log_softmax(log_p, here)
        log_q = _log_softmax(log_q, here)
    # Absent words have p = q = 0, and so no value and no g; their logarithms are set to 0 to stay
    # out of 0 * inf.
    p = tl.where(here, tl.exp(log_p), 0.0)
    q = tl.where(here, tl.exp(log_q), 0.0)
    log_p = tl.where(here, log_p, 0.0)
    log_q = tl.where(here, log_q, 0.0)
    value, g = _terms(log_p, log_q, p, q, BETA, DIRECTION)
    loss = tl.sum(value, 1)
    overlap = tl.sum(_smaller(p, q), 1)
    if SUPPORT == "renormalized":
        slope = g - p * tl.sum(g, 1)[:, None]
    elif SUPPORT == "truncated":
        slope = g
        if DIRECTION == "reverse":
            slope = g + p
    else:
        rest = 1.0 - tl.sum(p, 1)
        rest_q = 1.0 - tl.sum(q, 1)
        p_tail = tl.where(rest < EPS, EPS, rest)  # keeps NaN
        q_tail = tl.where(rest_q < EPS, EPS, rest_q)
        tail, g_tail = _terms(tl.log(p_tail), tl.log(q_tail), p_tail, q_tail, BETA, DIRECTION)
        loss += tail
        overlap += _smaller(p_tail, q_tail)
        slope = g
        if DIRECTION == "reverse":
            slope = g + p  # the constant counts where the bucket's mass is held at EPS
            g_tail += p_tail
        slope -= tl.where(rest < EPS, 0.0, g_tail / p_tail)[:, None] * p
    tl.store(rows_out + row, tl.where(live, loss, 0.0), mask=inside)
    tl.store(rows_out + n_rows + row, tl.where(live, student_mass, 0.0), mask=inside)
    tl.store(rows_out + 2 * n_rows + row, tl.where(live, teacher_mass, 0.0), mask=inside)
    tl.store(rows_out + 3 * n_rows + row, tl.where(live, overlap, 0.0), mask=inside)
    slope = tl.where(here, slope, 0.0)
    tl.store(slope_out + place, slope, mask=(k < K) & inside[:, None])


def topk_rows(
    scores: Tensor,  # [N, K] float32
    log_probs: Tensor | None,  # [N, K] float32
    teacher: Tensor,  # [N, K] float32
    present: Tensor,  # [N, K] bool
    valid: Tensor,  # [N] bool
    direction: str,
    support: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Return (rows [4, N]: loss, student mass, teacher mass, overlap; slope [N, K]), float32."""
    n_rows, k = scores.shape
    rows = torch.empty(4, n_rows, dtype=torch.float32, device=scores.device)
    slope = torch.empty(n_rows, k, dtype=torch.float32, device=scores.device)
    block_k = triton.next_power_of_2(k)
    per_program = max(1, ELEMENTS // block_k)
    if n_rows:
        _topk_rows[(triton.cdiv(n_rows, per_program),)](
            scores, log_probs, teacher, present.view(torch.uint8), valid.view(torch.uint8),
            rows, slope, n_rows, K=k, DIRECTION=direction, SUPPORT=support, BETA=beta,
            ROWS=per_program, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return rows, slope
