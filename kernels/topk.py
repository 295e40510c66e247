"""The words of a teacher's lists: which count, divergence over them and its slope, their masses.

With log p and log q of the listed words (both softmaxed over the list where it is "renormalized"),
and a mixture m = beta q + (1 - beta) p,

    reverse  L = sum p (log p - log q)                              g = p (log p - log q)
    forward  L = sum q (log q - log p)                              g = -q
    jsd      L = sum beta q log(q / m) + (1 - beta) p log(p / m)    g = (1 - beta) p log(p / m)
    mixed    L = beta forward + (1 - beta) reverse                  g = as L

where g = p dL/dp up to a constant. At beta 0 and 1 the jsd stands for what it tends to when divided
by beta (forward) and 1 - beta (reverse), as in TRL. "tail" adds a bucket with the rest of either
mass. The slope in the scores is then

    renormalized  g - p sum(g)        in the logits: they reach L through a softmax over the list
    truncated     g + c p       in the log-probs, c: what was left out of g
    tail          g - p h             in the log-probs, h = dL/dp of the bucket, 1 - sum p

A word listed twice counts once, where it stands first. One launch each, O(N K) bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import TINY, ceil_div, power_of_2
from .launch import launch

MISSING = tl.constexpr(-1)  # the id of no word

ELEMENTS = 2048  # of a program's tile
PAIRS = 2048  # of entries that a program compares at a time
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
def _terms(log_p, log_q, p, q, beta, rest, DIRECTION: tl.constexpr):
    """Each word's share of L, and its g."""
    tl.static_assert(
        DIRECTION == "reverse" or DIRECTION == "forward" or DIRECTION == "jsd"
        or DIRECTION == "mixed", "unknown direction",
    )  # fmt: skip
    if DIRECTION == "reverse":
        value = _kl_term(p, log_p, log_q)
        g = value
    elif DIRECTION == "forward":
        value = _kl_term(q, log_q, log_p)
        g = -q
    elif DIRECTION == "mixed":
        g = rest * _kl_term(p, log_p, log_q)
        value = beta * _kl_term(q, log_q, log_p) + g
        g -= beta * q
    else:
        TINY_: tl.constexpr = TINY
        m = beta * q + rest * p
        log_m = tl.log(tl.where(m < TINY_, TINY_, m))  # keeps NaN
        g = rest * _xlogy(p, log_p - log_m)
        value = beta * _xlogy(q, log_q - log_m) + g
    return value, g


@triton.jit
def _whole(g, p, rest, DIRECTION: tl.constexpr):
    """p dL/dp: g with its constant, which cancels wherever p sums to one."""
    if DIRECTION == "reverse":
        g += p
    elif DIRECTION == "mixed":
        g += rest * p
    return g


@triton.jit
def _topk_support(
    ids,  # [N, K] int32 or int64
    teacher,  # [N, K] float32
    valid,  # [N] uint8
    words,  # [N, K] out, as ids: those of the entries present, else 0
    present,  # [N, K] uint8 out: listed, with mass, and not listed before
    supported,  # [N] uint8 out: valid, and something is present
    parts,  # [2, programs] float32 out: valid rows without support, duplicate entries in them
    n_rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BEFORE: tl.constexpr,  # entries that are compared with all others at a time
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = row < n_rows
    live = tl.load(valid + row, mask=inside, other=0) != 0
    start = row.to(tl.int64)[:, None] * K
    listed = (k < K) & inside[:, None]
    id = tl.load(ids + start + k, mask=listed, other=MISSING)
    log_q = tl.load(teacher + start + k, mask=listed, other=-float("inf"))
    here = listed & (id != MISSING) & (log_q != -float("inf"))
    repeats = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for at in range(0, K, BEFORE):
        j = at + tl.arange(0, BEFORE)[None, :]
        inside_too = (j < K) & inside[:, None]
        other = tl.load(ids + start + j, mask=inside_too, other=MISSING)
        mass = tl.load(teacher + start + j, mask=inside_too, other=-float("inf"))
        counts = (other != MISSING) & (mass != -float("inf"))
        same = (id[:, :, None] == other[:, None, :]) & (j[:, None, :] < k[:, :, None])
        repeats = tl.maximum(repeats, tl.max((same & counts[:, None, :]).to(tl.int32), 2))
    twice = here & (repeats != 0)
    here = here & (repeats == 0)
    some = tl.max(here.to(tl.int32), 1) != 0
    tl.store(words + start + k, tl.where(here, id, 0), mask=listed)
    tl.store(present + start + k, here.to(tl.uint8), mask=listed)
    tl.store(supported + row, (live & some).to(tl.uint8), mask=inside)
    program = tl.program_id(0)
    without = tl.sum((live & (some == 0)).to(tl.int32), 0)
    tl.store(parts + program, without.to(tl.float32))
    doubled = tl.sum(tl.sum((twice & live[:, None]).to(tl.int32), 1), 0)
    tl.store(parts + tl.num_programs(0) + program, doubled.to(tl.float32))


@triton.jit
def _masses(
    rows,  # [4, N] float32 from `_topk_rows`; the first is passed over
    tokens,  # [] float32: valid rows
    counts,  # [2, programs] float32 from `_topk_support`
    out,  # [5] float32: means of the rows over the valid ones, and the counts
    n_rows,
    programs,
    WIDTH: tl.constexpr,
):
    lane = tl.arange(0, WIDTH)
    over = tl.maximum(tl.load(tokens), 1.0)
    for which in tl.static_range(3):
        total = tl.zeros([WIDTH], tl.float32)
        row = rows + (which + 1) * n_rows
        for at in range(0, n_rows, WIDTH):
            total += tl.load(row + at + lane, mask=at + lane < n_rows, other=0.0)
        tl.store(out + which, tl.sum(total, 0) / over)
    for which in tl.static_range(2):
        count = tl.zeros([WIDTH], tl.int32)
        for at in range(0, programs, WIDTH):
            inside = at + lane < programs
            x = tl.load(counts + which * programs + at + lane, mask=inside, other=0.0)
            count += x.to(tl.int32)
        tl.store(out + 3 + which, tl.sum(count, 0).to(tl.float32))


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
    beta,
    rest,  # 1 - beta
    K: tl.constexpr,
    DIRECTION: tl.constexpr,  # "reverse", "forward", "jsd", "mixed"
    SUPPORT: tl.constexpr,  # "renormalized", "truncated", "tail"
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tl.static_assert(
        SUPPORT == "renormalized" or SUPPORT == "truncated" or SUPPORT == "tail", "unknown support"
    )
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
    value, g = _terms(log_p, log_q, p, q, beta, rest, DIRECTION)
    loss = tl.sum(value, 1)
    overlap = tl.sum(_smaller(p, q), 1)
    if SUPPORT == "renormalized":
        slope = g - p * tl.sum(g, 1)[:, None]
    elif SUPPORT == "truncated":
        slope = _whole(g, p, rest, DIRECTION)
    else:
        left = 1.0 - tl.sum(p, 1)
        left_q = 1.0 - tl.sum(q, 1)
        p_tail = tl.where(left < EPS, EPS, left)  # keeps NaN
        q_tail = tl.where(left_q < EPS, EPS, left_q)
        tail, g_tail = _terms(tl.log(p_tail), tl.log(q_tail), p_tail, q_tail, beta, rest, DIRECTION)
        loss += tail
        overlap += _smaller(p_tail, q_tail)
        slope = _whole(g, p, rest, DIRECTION)  # counts where the bucket is held at EPS
        g_tail = _whole(g_tail, p_tail, rest, DIRECTION)
        slope -= tl.where(left < EPS, 0.0, g_tail / p_tail)[:, None] * p
    tl.store(rows_out + row, tl.where(live, loss, 0.0), mask=inside)
    tl.store(rows_out + n_rows + row, tl.where(live, student_mass, 0.0), mask=inside)
    tl.store(rows_out + 2 * n_rows + row, tl.where(live, teacher_mass, 0.0), mask=inside)
    tl.store(rows_out + 3 * n_rows + row, tl.where(live, overlap, 0.0), mask=inside)
    slope = tl.where(here, slope, 0.0)
    tl.store(slope_out + place, slope, mask=(k < K) & inside[:, None])


def topk_support(
    ids: Tensor,  # [N, K] int32 or int64
    teacher: Tensor,  # [N, K] float32
    valid: Tensor,  # [N] bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (words [N, K] as ids, present [N, K] bool, supported [N] bool, counts float32).

    counts: [2, programs], to be summed, see `masses`. At most LONGEST entries.
    """
    n_rows, k = ids.shape
    block_k = power_of_2(k)
    before = max(1, min(16, block_k, PAIRS // block_k))
    per_program = max(1, PAIRS // (block_k * before))
    programs = ceil_div(n_rows, per_program)
    warps = 4 if block_k <= 1024 else 16
    words = torch.empty_like(ids)
    present = torch.empty(n_rows, k, dtype=torch.bool, device=ids.device)
    supported = torch.empty(n_rows, dtype=torch.bool, device=ids.device)
    counts = torch.empty(2, programs, dtype=torch.float32, device=ids.device)
    if n_rows:
        launch(
            _topk_support, (programs,), ids, teacher, valid.view(torch.uint8), words,
            present.view(torch.uint8), supported.view(torch.uint8), counts, n_rows,
            K=k, ROWS=per_program, BLOCK_K=block_k, BEFORE=before, num_warps=warps,
        )  # fmt: skip
    return words, present, supported, counts


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
    if direction in ("jsd", "mixed") and beta in (0, 1):
        direction = "forward" if (beta == 0) == (direction == "jsd") else "reverse"
    block_k = power_of_2(k)
    per_program = max(1, ELEMENTS // block_k)
    if n_rows:
        launch(
            _topk_rows, (ceil_div(n_rows, per_program),),
            scores, log_probs, teacher, present.view(torch.uint8), valid.view(torch.uint8),
            rows, slope, n_rows, float(beta), 1.0 - beta, K=k, DIRECTION=direction, SUPPORT=support,
            ROWS=per_program, BLOCK_K=block_k, num_warps=4,
        )  # fmt: skip
    return rows, slope


def masses(
    rows: Tensor,  # [4, N] float32 from `topk_rows`
    tokens: Tensor,  # [] float32: valid rows
    counts: Tensor,  # [2, programs] float32 from `topk_support`
) -> Tensor:
    """[5] float32: means over the valid rows of the last three rows, and the sums of the counts."""
    n_rows, programs = rows.shape[1], counts[0].numel()
    out = torch.empty(5, dtype=torch.float32, device=rows.device)
    width = min(1024, max(128, power_of_2(n_rows)))
    launch(
        _masses, (1,), rows, tokens, counts, out, n_rows, programs, WIDTH=width,
        num_warps=width // 128,
    )  # fmt: skip
    return out
