"""`divergence`: KL or JSD of student and teacher over the whole vocabulary, by row.

For a row with z = scale * logits[row] and y = teacher_scale * teacher[row], log p = log softmax(z)
and log q = log softmax(y):

    reverse  L = sum p (log p - log q)
    forward  L = sum q (log q - log p)
    jsd      L = beta sum q (log q - log m) + (1 - beta) sum p (log p - log m)
             with m = beta q + (1 - beta) p

Reverse and forward take one read: with u the one whose mass weighs the sum and v the other,

    L = C / S_u - log S_u + log S_v,   C = sum exp(u - max u) ((u - max u) - (v - max v))

and C is rescaled like the sums S as the maxima move. A second read gives the JSD, whose m needs
both sums; with r = q / p it takes log m - log p = log((1 - beta) + beta r).

Lanes keep their own statistics (see `lanes`), so no loop has a barrier. Inside the loops logarithms
are of base 2: beyond some 25 instructions a word of both models, the arithmetic takes longer than
the bytes.

Bytes that must move: N * U * (itemsize of both) read, twice for "jsd"; O(N) besides. U words are
shared, of the student's V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E
from .lanes import LOWEST, lanes, load_lanes, move, top_of, words
from .launch import launch
from .paired import (
    DIRECTIONS,
    access,
    both_log_probs,
    ratio_to_mixture,
    row_pointers,
)

# Two 16-byte loads of each tensor in flight per thread, in 48 to 80 registers.
NUM_WARPS = 4
LOADS = 2
LEAST = tl.constexpr(-60.0)  # log2 of the least mass that the JSD tells from 0


@triton.jit
def _accumulate(
    xs, ys, top, total, other_top, other_total, cross, infinite, moment, scale_log2,
    other_scale_log2, CROSS: tl.constexpr, MOMENT: tl.constexpr, LOADS: tl.constexpr,
):  # fmt: skip
    """Fold tiles `xs` and `ys` into the lanes' statistics.

    The masses of x weigh the cross moment; `moment` is that of x (MOMENT 1) or of y (MOMENT 2).
    Both are in units of log 2. A weight of 0 counts 0 even beside -inf, and a weight of NaN stays.
    `infinite` grows beyond -LOWEST / 2 where y alone excludes a word, however little its mass in x.
    """
    LOWEST_: tl.constexpr = LOWEST
    new = top_of(xs, top, LOADS)
    other_new = top_of(ys, other_top, LOADS)
    shift, delta = move(top, new)
    other_shift, other_delta = move(other_top, other_new)
    delta *= scale_log2
    other_delta *= other_scale_log2
    carry = tl.exp2(delta)
    other_carry = tl.exp2(other_delta)
    cross = (cross + total * (delta - other_delta)) * carry
    if MOMENT == 1:
        moment = (moment + total * delta) * carry
    if MOMENT == 2:
        moment = (moment + other_total * other_delta) * other_carry
    total *= carry
    other_total *= other_carry
    for i in tl.static_range(LOADS):
        u = (xs[i] - shift[:, None]) * scale_log2
        v = (ys[i] - other_shift[:, None]) * other_scale_log2
        weight = tl.exp2(u)
        other_weight = tl.exp2(v)
        total += tl.sum(weight, 1)
        other_total += tl.sum(other_weight, 1)
        u = tl.maximum(u, LOWEST_)
        v = tl.maximum(v, LOWEST_)
        if CROSS:
            cross += tl.sum(weight * (u - v), 1)
            infinite = tl.maximum(infinite, tl.max(u - v, 1))
        if MOMENT == 1:
            moment += tl.sum(weight * u, 1)
        if MOMENT == 2:
            moment += tl.sum(other_weight * v, 1)
    return new, total, other_new, other_total, cross, infinite, moment


@triton.jit
def _reduce(
    top, total, other_top, other_total, cross, infinite, moment, scale_log2, other_scale_log2,
    MOMENT: tl.constexpr,
):  # fmt: skip
    """Fold the lanes: maxima, natural logarithms of the sums, cross / total, moment / sum.

    A row without mass (all -inf) has the logarithm NaN, as log_softmax has it.
    """
    LOG2_E_: tl.constexpr = LOG2_E
    _, delta = move(top, tl.max(top, 0))
    _, other_delta = move(other_top, tl.max(other_top, 0))
    delta *= scale_log2
    other_delta *= other_scale_log2
    carry = tl.exp2(delta)
    other_carry = tl.exp2(other_delta)
    row_total = tl.sum(total * carry, 0)
    other_row_total = tl.sum(other_total * other_carry, 0)
    log_total = tl.where(row_total == 0.0, float("nan"), tl.log(row_total))
    other_log_total = tl.where(other_row_total == 0.0, float("nan"), tl.log(other_row_total))
    cross = (cross + total * (delta - other_delta)) * carry
    mean = tl.sum(cross, 0) / row_total / LOG2_E_
    mean_log = 0.0
    if MOMENT == 1:
        mean_log = tl.sum((moment + total * delta) * carry, 0) / row_total / LOG2_E_
    if MOMENT == 2:
        moment = (moment + other_total * other_delta) * other_carry
        mean_log = tl.sum(moment, 0) / other_row_total / LOG2_E_
    return (
        tl.max(top, 0), log_total, tl.max(other_top, 0), other_log_total,
        mean, tl.max(infinite, 0), mean_log,
    )  # fmt: skip


@triton.jit
def _finish(
    row_logits,  # the row's first logit
    row,
    live,  # False: an ignored row, every output is 0
    loss,
    top,  # of the logits, before the scale
    log_sum,
    teacher_top,
    teacher_log_sum,
    mean_log,  # sum p (z - max z)
    labels,
    loss_out,
    log_probs_out,
    statistics,
    entropy_out,
    n_rows,
    vocab,
    scale,
):
    """Gather the label of the row and store its statistics."""
    tl.store(loss_out + row, tl.where(live, loss, 0.0))
    tl.store(statistics + row, tl.where(live, top, 0.0))
    tl.store(statistics + n_rows + row, tl.where(live, log_sum, 0.0))
    tl.store(statistics + 2 * n_rows + row, tl.where(live, teacher_top, 0.0))
    tl.store(statistics + 3 * n_rows + row, tl.where(live, teacher_log_sum, 0.0))
    tl.store(statistics + 4 * n_rows + row, tl.where(live, loss, 0.0))
    if entropy_out is not None:
        tl.store(entropy_out + row, tl.where(live, log_sum - mean_log, 0.0))
    log_prob = 0.0
    if labels is not None:
        column = tl.load(labels + row)
        readable = (column >= 0) & (column < vocab) & live
        x = tl.load(row_logits + column, mask=readable, other=float("nan")).to(tl.float32)
        log_prob = tl.where(live, (x - top) * scale - log_sum, 0.0)
    tl.store(log_probs_out + row, log_prob)


@triton.jit
def _divergence(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    teacher,  # [B, T, U] likewise, U <= V
    labels,  # [N] int32 or int64, or None
    valid,  # [N] uint8
    loss_out,  # [N] float32 out
    log_probs_out,  # [N] float32 out
    statistics,  # [5, N] float32 out
    entropy_out,  # [N] float32 out, or None
    stride_batch,
    stride_row,
    teacher_stride_batch,
    teacher_stride_row,
    n_rows,
    length,  # T
    vocab,  # U
    scale,  # 1 / temperature
    teacher_scale,
    DIRECTION: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of both tensors start on 16-byte boundaries,
    CONGRUENT: tl.constexpr,  # or lie equally far beyond one
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    LOG2_E_: tl.constexpr = LOG2_E
    LOWEST_: tl.constexpr = LOWEST
    tl.static_assert((DIRECTION >= 0) & (DIRECTION <= 2))
    SWAP: tl.constexpr = DIRECTION == 1  # forward: the teacher's masses weigh
    CROSS: tl.constexpr = DIRECTION != 2
    MOMENT: tl.constexpr = 0 if entropy_out is None else 1 + SWAP
    row = tl.program_id(0)
    live = tl.load(valid + row) != 0
    x_pointers, y_pointers, shift = row_pointers(
        logits, teacher, row, length, stride_batch, stride_row, teacher_stride_batch,
        teacher_stride_row, ALIGNED, CONGRUENT, VECTOR,
    )  # fmt: skip
    row_logits = x_pointers + shift
    word = words(LANES, VECTOR)
    x_pointers += word
    y_pointers += word
    # Tiles [begin, full) lie inside the row; the one before, and the one after, may not.
    begin = 0 if ALIGNED else 1
    full = tl.where(live, (vocab + shift) // TILE, 0)
    rest = vocab + shift - full * TILE
    first = live & (begin == 1)
    last = live & (full >= begin) & (rest > 0)

    u_scale = (teacher_scale if SWAP else scale) * LOG2_E_
    v_scale = (scale if SWAP else teacher_scale) * LOG2_E_
    u_top = tl.full([LANES], -float("inf"), tl.float32)
    v_top = tl.full([LANES], -float("inf"), tl.float32)
    u_total = tl.zeros([LANES], tl.float32)
    v_total = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    infinite = tl.full([LANES], LOWEST_, tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    if first:
        xs = load_lanes(x_pointers, word, shift, vocab + shift, LOADS, True)
        ys = load_lanes(y_pointers, word, shift, vocab + shift, LOADS, True)
        u_top, u_total, v_top, v_total, cross, infinite, moment = _accumulate(
            ys if SWAP else xs, xs if SWAP else ys, u_top, u_total, v_top, v_total, cross, infinite,
            moment, u_scale, v_scale, CROSS, MOMENT, LOADS,
        )  # fmt: skip
    for tile in range(begin, full):
        xs = load_lanes(x_pointers + tile * TILE, word, 0, TILE, LOADS, False)
        ys = load_lanes(y_pointers + tile * TILE, word, 0, TILE, LOADS, False)
        u_top, u_total, v_top, v_total, cross, infinite, moment = _accumulate(
            ys if SWAP else xs, xs if SWAP else ys, u_top, u_total, v_top, v_total, cross, infinite,
            moment, u_scale, v_scale, CROSS, MOMENT, LOADS,
        )  # fmt: skip
    if last:
        xs = load_lanes(x_pointers + full * TILE, word, 0, rest, LOADS, True)
        ys = load_lanes(y_pointers + full * TILE, word, 0, rest, LOADS, True)
        u_top, u_total, v_top, v_total, cross, infinite, moment = _accumulate(
            ys if SWAP else xs, xs if SWAP else ys, u_top, u_total, v_top, v_total, cross, infinite,
            moment, u_scale, v_scale, CROSS, MOMENT, LOADS,
        )  # fmt: skip
    u_top, u_log_sum, v_top, v_log_sum, mean, infinite, row_moment = _reduce(
        u_top, u_total, v_top, v_total, cross, infinite, moment, u_scale, v_scale, MOMENT
    )
    loss = mean - u_log_sum + v_log_sum  # for "jsd" `_jsd` overwrites it
    loss = tl.where((infinite > -0.5 * LOWEST_) & (loss == loss), float("inf"), loss)
    _finish(
        row_logits, row, live, loss, v_top if SWAP else u_top, v_log_sum if SWAP else u_log_sum,
        u_top if SWAP else v_top, u_log_sum if SWAP else v_log_sum, row_moment, labels, loss_out,
        log_probs_out, statistics, entropy_out, n_rows, vocab, scale,
    )  # fmt: skip


@triton.jit
def _accumulate_mixture(
    xs, ys, own, other, scale_log2, teacher_scale_log2, top, log_sum, teacher_top,
    teacher_log_sum, beta, LOADS: tl.constexpr,
):  # fmt: skip
    """Fold tiles into the lanes' sums p (log p - log m) and q (log q - log m), in units of log 2.

    The logarithms of the sums are of base 2. Words of less mass than LEAST count as of that much:
    q = p r then holds where p would underflow.
    """
    LEAST_: tl.constexpr = LEAST
    for i in tl.static_range(LOADS):
        log_p, log_q = both_log_probs(
            xs[i], ys[i], scale_log2, teacher_scale_log2, top, log_sum, teacher_top, teacher_log_sum
        )
        log_p = tl.maximum(log_p, LEAST_)
        difference = tl.maximum(log_q, LEAST_) - log_p
        p = tl.exp2(log_p)
        ratio, log_ratio = ratio_to_mixture(difference, beta, False)
        own -= tl.sum(p * log_ratio, 1)
        other += tl.sum((p * ratio) * (difference - log_ratio), 1)
    return own, other


@triton.jit
def _jsd(
    logits,  # [B, T, V], as in _divergence; the rest likewise
    teacher,  # [B, T, U]
    valid,  # [N] uint8
    loss_out,  # [N] float32 out
    statistics,  # [5, N] float32: the first four of a row are read, the last is written
    stride_batch,
    stride_row,
    teacher_stride_batch,
    teacher_stride_row,
    n_rows,
    length,
    vocab,
    scale,
    teacher_scale,
    beta,
    ALIGNED: tl.constexpr,
    CONGRUENT: tl.constexpr,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The second read of "jsd": its value and its centre, sum p (log p - log m)."""
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    LOG2_E_: tl.constexpr = LOG2_E
    row = tl.program_id(0)
    live = tl.load(valid + row) != 0
    x_pointers, y_pointers, shift = row_pointers(
        logits, teacher, row, length, stride_batch, stride_row, teacher_stride_batch,
        teacher_stride_row, ALIGNED, CONGRUENT, VECTOR,
    )  # fmt: skip
    word = words(LANES, VECTOR)
    x_pointers += word
    y_pointers += word
    begin = 0 if ALIGNED else 1
    full = tl.where(live, (vocab + shift) // TILE, 0)
    rest = vocab + shift - full * TILE
    own = tl.zeros([LANES], tl.float32)
    other = tl.zeros([LANES], tl.float32)
    top = tl.load(statistics + row)
    log_sum = tl.load(statistics + n_rows + row) * LOG2_E_
    teacher_top = tl.load(statistics + 2 * n_rows + row)
    teacher_log_sum = tl.load(statistics + 3 * n_rows + row) * LOG2_E_
    scale *= LOG2_E_
    teacher_scale *= LOG2_E_
    if live & (begin == 1):
        xs = load_lanes(x_pointers, word, shift, vocab + shift, LOADS, True)
        ys = load_lanes(y_pointers, word, shift, vocab + shift, LOADS, True)
        own, other = _accumulate_mixture(
            xs, ys, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum,
            beta, LOADS,
        )  # fmt: skip
    for tile in range(begin, full):
        xs = load_lanes(x_pointers + tile * TILE, word, 0, TILE, LOADS, False)
        ys = load_lanes(y_pointers + tile * TILE, word, 0, TILE, LOADS, False)
        own, other = _accumulate_mixture(
            xs, ys, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum,
            beta, LOADS,
        )  # fmt: skip
    if live & (full >= begin) & (rest > 0):
        xs = load_lanes(x_pointers + full * TILE, word, 0, rest, LOADS, True)
        ys = load_lanes(y_pointers + full * TILE, word, 0, rest, LOADS, True)
        own, other = _accumulate_mixture(
            xs, ys, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum,
            beta, LOADS,
        )  # fmt: skip
    centre = tl.sum(own, 0) / LOG2_E_
    loss = beta * (tl.sum(other, 0) / LOG2_E_) + (1.0 - beta) * centre
    known = log_sum + teacher_log_sum  # NaN where a row holds a NaN or +inf, or no mass
    centre = tl.where(known == known, centre, known)
    loss = tl.where(known == known, loss, known)
    tl.store(loss_out + row, tl.where(live, loss, 0.0))
    tl.store(statistics + 4 * n_rows + row, tl.where(live, centre, 0.0))


def divergence(
    logits: Tensor,  # [B, T, V] bfloat16, float16 or float32; last dimension contiguous
    teacher: Tensor,  # [B, T, U], U <= V, any float dtype; last dimension contiguous
    labels: Tensor | None,  # [N] int32 or int64, contiguous
    valid: Tensor,  # [N] bool
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [N], log_probs [N], statistics [5, N], entropy [N] or [0]), all float32.

    The maxima in the statistics are those of the logits, not yet scaled: see `both_log_probs`.
    Rows that are not valid are not read and give 0. A label outside [0, U) is not read and gives
    NaN.
    """
    length, vocab = teacher.shape[1:]
    rows = valid.shape[0]
    new = dict(dtype=torch.float32, device=logits.device)
    loss, log_probs = torch.empty(rows, **new), torch.empty(rows, **new)
    statistics = torch.empty(5, rows, **new)
    entropy = torch.empty(rows if with_entropy else 0, **new)
    if rows:
        tiling = access(logits, teacher)
        tiling |= lanes(vocab, tiling["VECTOR"], NUM_WARPS, LOADS)
        live, sizes = valid.view(torch.uint8), (rows, length, vocab)
        strides = *logits.stride()[:2], *teacher.stride()[:2]
        launch(
            _divergence, (rows,), logits, teacher, labels, live, loss, log_probs, statistics,
            entropy if with_entropy else None, *strides,
            *sizes, scale, teacher_scale, DIRECTION=DIRECTIONS[direction], **tiling,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        if direction == "jsd":
            launch(
                _jsd,
                (rows,),
                logits,
                teacher,
                live,
                loss,
                statistics,
                *strides,
                *sizes,
                scale,
                teacher_scale,
                beta,
                **tiling,
                num_warps=NUM_WARPS,
            )
    return loss, log_probs, statistics, entropy
