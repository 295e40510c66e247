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
both sums. Lanes keep their own statistics, as in `scan`, so no loop has a barrier.

Bytes that must move: N * U * (itemsize of both) read, twice for "jsd"; O(N) besides. U words are
shared, of the student's V.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E
from .paired import (
    DIRECTIONS,
    LOWEST,
    access,
    both_log_probs,
    load_tiles,
    mixture,
    row_pointers,
)

LANES = 512  # with 8 warps: two 16-byte loads of each tensor in flight per thread
NUM_WARPS = 8


def divergence_bytes(logits: Tensor, teacher: Tensor, direction: str) -> int:
    """Bytes that `divergence` must move through device memory."""
    rows = teacher.numel() // max(teacher.shape[-1], 1)
    both = teacher.numel() * (logits.element_size() + teacher.element_size())
    return both * (1 + (direction == "jsd")) + rows * (8 + 1 + 4 * 7)


@triton.jit
def _move(maximum, new):
    """(shift, how far the maximum moved): a lane that has seen only -inf so far is at LOWEST."""
    LOWEST_: tl.constexpr = LOWEST
    shift = tl.where(new == -float("inf"), 0.0, new)
    return shift, tl.maximum(maximum - shift, LOWEST_)


@triton.jit
def _accumulate(
    x, y, top, total, other_top, other_total, cross, infinite, moment, scale, other_scale,
    CROSS: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """Fold tiles `x`, `y` [LANES, VECTOR] into the lanes' statistics.

    The masses of x weigh the cross moment; `moment` is that of x (MOMENT 1) or of y (MOMENT 2).
    """
    LOG2_E_: tl.constexpr = LOG2_E
    new = tl.maximum(top, tl.max(x, 1))
    other_new = tl.maximum(other_top, tl.max(y, 1))
    shift, delta = _move(top, new)
    other_shift, other_delta = _move(other_top, other_new)
    carry = tl.exp2(delta * (scale * LOG2_E_))
    other_carry = tl.exp2(other_delta * (other_scale * LOG2_E_))
    u = (x - shift[:, None]) * scale
    v = (y - other_shift[:, None]) * other_scale
    weight = tl.exp2(u * LOG2_E_)
    other_weight = tl.exp2(v * LOG2_E_)
    if CROSS:
        # A word without mass in x counts 0; one that y alone excludes makes the sum infinite.
        difference = tl.where(x == -float("inf"), 0.0, u - v)
        missing = difference == float("inf")
        moved = delta * scale - other_delta * other_scale
        cross = (cross + total * moved) * carry
        cross += tl.sum(tl.where(missing, 0.0, weight * difference), 1)
        infinite = tl.maximum(infinite, tl.max(tl.where(missing, 1.0, 0.0), 1))
    if MOMENT == 1:
        moment = (moment + total * (delta * scale)) * carry
        moment += tl.sum(tl.where(x == -float("inf"), 0.0, weight * u), 1)
    if MOMENT == 2:
        moment = (moment + other_total * (other_delta * other_scale)) * other_carry
        moment += tl.sum(tl.where(y == -float("inf"), 0.0, other_weight * v), 1)
    total = total * carry + tl.sum(weight, 1)
    other_total = other_total * other_carry + tl.sum(other_weight, 1)
    return new, total, other_new, other_total, cross, infinite, moment


@triton.jit
def _reduce(
    top, total, other_top, other_total, cross, infinite, moment, scale, other_scale,
    MOMENT: tl.constexpr,
):  # fmt: skip
    """Fold the lanes: maxima, logarithms of the sums, cross / total, moment / sum.

    A row without mass (all -inf) has the logarithm NaN, as log_softmax has it.
    """
    LOG2_E_: tl.constexpr = LOG2_E
    _, delta = _move(top, tl.max(top, 0))
    _, other_delta = _move(other_top, tl.max(other_top, 0))
    carry = tl.exp2(delta * (scale * LOG2_E_))
    other_carry = tl.exp2(other_delta * (other_scale * LOG2_E_))
    row_total = tl.sum(total * carry, 0)
    other_row_total = tl.sum(other_total * other_carry, 0)
    log_total = tl.where(row_total == 0.0, float("nan"), tl.log(row_total))
    other_log_total = tl.where(other_row_total == 0.0, float("nan"), tl.log(other_row_total))
    moved = delta * scale - other_delta * other_scale
    mean = tl.sum((cross + total * moved) * carry, 0) / row_total
    mean_log = 0.0
    if MOMENT == 1:
        mean_log = tl.sum((moment + total * (delta * scale)) * carry, 0) / row_total
    if MOMENT == 2:
        moment = (moment + other_total * (other_delta * other_scale)) * other_carry
        mean_log = tl.sum(moment, 0) / other_row_total
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
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TILE: tl.constexpr = LANES * VECTOR
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
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    x_pointers += lane
    y_pointers += lane
    # Tiles [begin, full) lie inside the row; the one before, and the one after, may not.
    begin = 0 if ALIGNED else 1
    full = tl.where(live, (vocab + shift) // TILE, 0)
    first_inside = (lane >= shift) & (lane < vocab + shift)
    last_inside = lane < vocab + shift - full * TILE
    first = live & (begin == 1)
    last = live & (full >= begin) & (vocab + shift > full * TILE)

    u_scale = teacher_scale if SWAP else scale
    v_scale = scale if SWAP else teacher_scale
    u_top = tl.full([LANES], -float("inf"), tl.float32)
    v_top = tl.full([LANES], -float("inf"), tl.float32)
    u_total = tl.zeros([LANES], tl.float32)
    v_total = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    infinite = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    if first:
        x, y = load_tiles(x_pointers, y_pointers, first_inside)
        u_top, u_total, v_top, v_total, cross, infinite, moment = _accumulate(
            y if SWAP else x, x if SWAP else y, u_top, u_total, v_top, v_total, cross, infinite,
            moment, u_scale, v_scale, CROSS, MOMENT,
        )  # fmt: skip
    for tile in range(begin, full):
        x, y = load_tiles(x_pointers + tile * TILE, y_pointers + tile * TILE, None)
        u_top, u_total, v_top, v_total, cross, infinite, moment = _accumulate(
            y if SWAP else x, x if SWAP else y, u_top, u_total, v_top, v_total, cross, infinite,
            moment, u_scale, v_scale, CROSS, MOMENT,
        )  # fmt: skip
    if last:
        x, y = load_tiles(x_pointers + full * TILE, y_pointers + full * TILE, last_inside)
        u_top, u_total, v_top, v_total, cross, infinite, moment = _accumulate(
            y if SWAP else x, x if SWAP else y, u_top, u_total, v_top, v_total, cross, infinite,
            moment, u_scale, v_scale, CROSS, MOMENT,
        )  # fmt: skip
    u_top, u_log_sum, v_top, v_log_sum, mean, infinite, row_moment = _reduce(
        u_top, u_total, v_top, v_total, cross, infinite, moment, u_scale, v_scale, MOMENT
    )
    loss = mean - u_log_sum + v_log_sum  # for "jsd" `_jsd` overwrites it
    loss = tl.where((infinite > 0.0) & (loss == loss), float("inf"), loss)
    _finish(
        row_logits, row, live, loss, v_top if SWAP else u_top, v_log_sum if SWAP else u_log_sum,
        u_top if SWAP else v_top, u_log_sum if SWAP else v_log_sum, row_moment, labels, loss_out,
        log_probs_out, statistics, entropy_out, n_rows, vocab, scale,
    )  # fmt: skip


@triton.jit
def _accumulate_mixture(
    x, y, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum, beta
):
    """Fold a tile into the lanes' sums p (log p - log m) and q (log q - log m)."""
    log_p, log_q = both_log_probs(
        x, y, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum
    )
    p, q, log_m = mixture(log_p, log_q, beta)
    return own + tl.sum(p * (log_p - log_m), 1), other + tl.sum(q * (log_q - log_m), 1)


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
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The second read of "jsd": its value and its centre, sum p (log p - log m)."""
    TILE: tl.constexpr = LANES * VECTOR
    row = tl.program_id(0)
    live = tl.load(valid + row) != 0
    x_pointers, y_pointers, shift = row_pointers(
        logits, teacher, row, length, stride_batch, stride_row, teacher_stride_batch,
        teacher_stride_row, ALIGNED, CONGRUENT, VECTOR,
    )  # fmt: skip
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    x_pointers += lane
    y_pointers += lane
    begin = 0 if ALIGNED else 1
    full = tl.where(live, (vocab + shift) // TILE, 0)
    own = tl.zeros([LANES], tl.float32)
    other = tl.zeros([LANES], tl.float32)
    top = tl.load(statistics + row)
    log_sum = tl.load(statistics + n_rows + row)
    teacher_top = tl.load(statistics + 2 * n_rows + row)
    teacher_log_sum = tl.load(statistics + 3 * n_rows + row)
    if live & (begin == 1):
        inside = (lane >= shift) & (lane < vocab + shift)
        x, y = load_tiles(x_pointers, y_pointers, inside)
        own, other = _accumulate_mixture(
            x, y, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum, beta
        )
    for tile in range(begin, full):
        x, y = load_tiles(x_pointers + tile * TILE, y_pointers + tile * TILE, None)
        own, other = _accumulate_mixture(
            x, y, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum, beta
        )
    if live & (full >= begin) & (vocab + shift > full * TILE):
        inside = lane < vocab + shift - full * TILE
        x, y = load_tiles(x_pointers + full * TILE, y_pointers + full * TILE, inside)
        own, other = _accumulate_mixture(
            x, y, own, other, scale, teacher_scale, top, log_sum, teacher_top, teacher_log_sum, beta
        )
    centre = tl.sum(own, 0)
    loss = beta * tl.sum(other, 0) + (1.0 - beta) * centre
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
        tiling["LANES"] = min(LANES, triton.next_power_of_2(triton.cdiv(vocab, tiling["VECTOR"])))
        live, sizes = valid.view(torch.uint8), (rows, length, vocab)
        strides = *logits.stride()[:2], *teacher.stride()[:2]
        _divergence[(rows,)](
            logits, teacher, labels, live, loss, log_probs, statistics,
            entropy if with_entropy else None, *strides,
            *sizes, scale, teacher_scale, DIRECTION=DIRECTIONS[direction], **tiling,
            num_warps=NUM_WARPS,
        )  # fmt: skip
        if direction == "jsd":
            _jsd[(rows,)](
                logits, teacher, live, loss, statistics, *strides, *sizes, scale, teacher_scale,
                beta, **tiling, num_warps=NUM_WARPS,
            )  # fmt: skip
    return loss, log_probs, statistics, entropy
