"""`scan`: one read of the logits gives every statistic the losses need.

For a row z = scale * logits[row] and ids i_1 .. i_K:

    maximum = max_v z_v                 log_sum = log sum_v exp(z_v - maximum)
    gathered_k = z[i_k]                 log_probs_k = scale * (logits[i_k] - max logits) - log_sum
    entropy = log_sum - sum_v p_v (z_v - maximum)

`maximum` and `log_sum` stay apart: subtracting their rounded sum from a large logit loses digits.
So do large products with the scale, which come after the difference where both are at hand.

Each lane of a `[LANES, VECTOR]` tile keeps its own running maximum and sum, so the loop over the
vocabulary has no barrier; the lanes are reduced once, after it. Where rows are too few to fill the
device, several programs share a row and `_combine` folds their partial statistics in fixed order.

Bytes that must move: N * V * itemsize read, O(N K) besides.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, is_aligned, programs_wanted, vector_width

LANES = 1024  # with 16-byte vectors and 8 warps: four independent loads in flight per thread
NUM_WARPS = 8


def scan_bytes(logits: Tensor, k: int, *, with_entropy: bool = False) -> int:
    """Bytes that `scan` must move through device memory."""
    rows = logits.numel() // max(logits.shape[-1], 1)
    per_row = k * (8 + 4 + 4) + 8 + 4 * with_entropy
    return logits.numel() * logits.element_size() + rows * per_row


@triton.jit
def _accumulate(x, maximum, total, moment, scale_log2, WITH_ENTROPY: tl.constexpr):
    """Fold a tile `x [LANES, VECTOR]` into the lanes' running statistics."""
    new = tl.maximum(maximum, tl.max(x, 1))
    shift = tl.where(new == -float("inf"), 0.0, new)  # a lane that has seen only -inf so far
    delta = tl.where(maximum == -float("inf"), 0.0, maximum - shift)
    carry = tl.exp2(delta * scale_log2)
    centred = x - shift[:, None]
    weight = tl.exp2(centred * scale_log2)
    if WITH_ENTROPY:
        moment = (moment + total * delta) * carry
        moment += tl.sum(tl.where(centred == -float("inf"), 0.0, weight * centred), 1)
    total = total * carry + tl.sum(weight, 1)
    return new, total, moment


@triton.jit
def _reduce(maximum, total, moment, scale_log2):
    """Fold lanes (or partial statistics of one row) into one."""
    top = tl.max(maximum, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    delta = tl.where(maximum == -float("inf"), 0.0, maximum - shift)
    carry = tl.exp2(delta * scale_log2)
    return top, tl.sum(total * carry, 0), tl.sum((moment + total * delta) * carry, 0)


@triton.jit
def _finish(
    row_logits,  # the row's first logit
    row,
    live,  # False: an ignored row, every output is 0
    maximum,
    total,
    moment,
    ids,
    gathered,
    log_probs,
    maximum_out,
    log_sum_out,
    entropy_out,
    vocab,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gather the listed entries of the row and store its statistics."""
    log_sum = tl.log(total)
    tl.store(maximum_out + row, tl.where(live, maximum * scale, 0.0))
    tl.store(log_sum_out + row, tl.where(live, log_sum, 0.0))
    if entropy_out is not None:
        entropy = log_sum - scale * moment / total
        tl.store(entropy_out + row, tl.where(live, entropy, 0.0))
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        column = tl.load(ids + row * K + k, mask=k < K, other=-1)
        readable = (column >= 0) & (column < vocab) & live
        x = tl.load(row_logits + column, mask=readable, other=float("nan")).to(tl.float32)
        tl.store(gathered + row * K + k, tl.where(live, x * scale, 0.0), mask=k < K)
        log_prob = (x - maximum) * scale - log_sum
        tl.store(log_probs + row * K + k, tl.where(live, log_prob, 0.0), mask=k < K)


@triton.jit
def _scan(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    ids,  # [N, K] int32 or int64
    valid,  # [N] uint8, or None
    gathered,  # [N, K] float32 out
    log_probs,  # [N, K] float32 out
    maximum_out,  # [N] float32 out
    log_sum_out,  # [N] float32 out
    entropy_out,  # [N] float32 out, or None
    partials,  # [3, N, SPLITS] float32 out: maximum, sum, moment; only where SPLITS > 1
    stride_batch,
    stride_row,
    n_rows,
    length,  # T
    vocab,  # V
    scale,  # 1 / temperature
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TILE: tl.constexpr = LANES * VECTOR
    WITH_ENTROPY: tl.constexpr = entropy_out is not None
    LOG2_E_: tl.constexpr = LOG2_E
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    offset = (row // length) * stride_batch + (row % length) * stride_row
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    # Tiles start on 16-byte boundaries; in the first one, `shift` elements lie before the row.
    shift = 0
    if not ALIGNED:
        shift = (offset % VECTOR).to(tl.int32)
    aligned = tl.multiple_of(offset - shift, VECTOR)
    lane = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    pointers = logits + aligned + lane

    full = (vocab + shift) // TILE  # tiles [0, full) end inside the row
    tiles = (vocab + shift + TILE - 1) // TILE
    share = (tiles + SPLITS - 1) // SPLITS
    first = split * share
    last = tl.minimum(first + share, tiles)
    last = tl.where(live, last, first)

    scale_log2 = scale * LOG2_E_
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    begin = first
    if not ALIGNED:
        if (first == 0) & (last > 0):
            inside = (lane >= shift) & (lane < vocab + shift)
            x = tl.load(pointers, mask=inside, other=-float("inf")).to(tl.float32)
            maximum, total, moment = _accumulate(
                x, maximum, total, moment, scale_log2, WITH_ENTROPY
            )
        begin = tl.maximum(first, 1)
    for tile in range(begin, tl.minimum(last, full)):
        x = tl.load(pointers + tile * TILE).to(tl.float32)
        maximum, total, moment = _accumulate(x, maximum, total, moment, scale_log2, WITH_ENTROPY)
    if (full >= begin) & (full < last):
        inside = lane < vocab + shift - full * TILE
        x = tl.load(pointers + full * TILE, mask=inside, other=-float("inf")).to(tl.float32)
        maximum, total, moment = _accumulate(x, maximum, total, moment, scale_log2, WITH_ENTROPY)
    top, row_total, row_moment = _reduce(maximum, total, moment, scale_log2)
    if SPLITS == 1:
        _finish(
            logits + offset, row, live, top, row_total, row_moment, ids, gathered, log_probs,
            maximum_out, log_sum_out, entropy_out, vocab, scale, K, BLOCK_K,
        )  # fmt: skip
    else:
        tl.store(partials + row * SPLITS + split, top)
        tl.store(partials + (row + n_rows) * SPLITS + split, row_total)
        tl.store(partials + (row + 2 * n_rows) * SPLITS + split, row_moment)


@triton.jit
def _combine(
    logits,  # [B, T, V]
    ids,  # [N, K]
    valid,  # [N] uint8, or None
    gathered,  # [N, K] out
    log_probs,  # [N, K] out
    maximum_out,  # [N] out
    log_sum_out,  # [N] out
    entropy_out,  # [N] out, or None
    partials,  # [3, N, SPLITS]
    stride_batch,
    stride_row,
    n_rows,
    length,
    vocab,
    scale,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    LOG2_E_: tl.constexpr = LOG2_E
    row = tl.program_id(0).to(tl.int64)
    offset = (row // length) * stride_batch + (row % length) * stride_row
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    split = tl.arange(0, SPLITS)
    maximum = tl.load(partials + row * SPLITS + split)
    total = tl.load(partials + (row + n_rows) * SPLITS + split)
    moment = tl.load(partials + (row + 2 * n_rows) * SPLITS + split)
    top, row_total, row_moment = _reduce(maximum, total, moment, scale * LOG2_E_)
    _finish(
        logits + offset, row, live, top, row_total, row_moment, ids, gathered, log_probs,
        maximum_out, log_sum_out, entropy_out, vocab, scale, K, BLOCK_K,
    )  # fmt: skip


def _splits(rows: int, tiles: int, device: torch.device) -> int:
    """Programs per row: one where the rows alone fill the device, else a power of two."""
    wanted = triton.cdiv(programs_wanted(device), max(rows, 1))
    return min(triton.next_power_of_2(wanted), triton.next_power_of_2(tiles), 64)


def scan(
    logits: Tensor,  # [B, T, V] bfloat16, float16 or float32; last dimension contiguous
    ids: Tensor,  # [N, K] int32 or int64, contiguous
    valid: Tensor | None,  # [N] bool
    scale: float,  # 1 / temperature
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (gathered [N, K], log_probs [N, K], maximum [N], log_sum [N], entropy [N] or [0]).

    All float32. Rows that are not valid are not read and give 0. An id outside the vocabulary is
    not read and gives NaN.
    """
    _, length, vocab = logits.shape
    rows, k = ids.shape
    vector = vector_width(logits)
    lanes = min(LANES, triton.next_power_of_2(triton.cdiv(vocab, vector)))
    tiles = triton.cdiv(vocab, lanes * vector)
    splits = _splits(rows, tiles, logits.device)
    new = dict(dtype=torch.float32, device=logits.device)
    gathered, log_probs = torch.empty(rows, k, **new), torch.empty(rows, k, **new)
    maximum, log_sum = torch.empty(rows, **new), torch.empty(rows, **new)
    entropy = torch.empty(rows if with_entropy else 0, **new)
    partials = torch.empty(3, rows, splits, **new) if splits > 1 else None
    if rows:
        arguments = (
            logits, ids, None if valid is None else valid.view(torch.uint8),
            gathered, log_probs, maximum, log_sum, entropy if with_entropy else None, partials,
            *logits.stride()[:2], rows, length, vocab, scale,
        )  # fmt: skip
        options = dict(K=k, BLOCK_K=min(triton.next_power_of_2(k), 256), SPLITS=splits)
        tile = dict(ALIGNED=is_aligned(logits, vector), LANES=lanes, VECTOR=vector)
        _scan[(rows * splits,)](*arguments, **options, **tile, num_warps=NUM_WARPS)
        if splits > 1:
            _combine[(rows,)](*arguments, **options, num_warps=1)
    return gathered, log_probs, maximum, log_sum, entropy
