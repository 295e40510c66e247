"""What a fused head does between its products: sums are finished, logits of a chunk become E.

    scale_unless_one   x *= factor, where the factor on the device is not 1
    finish_sum         a float32 sum times the factor, rounded once to the dtype of the gradient
    exp_rows           E = exp(z - offset) in place of a chunk's logits, z = scale * logits

`exp_rows` is for losses whose gradient of a row is alpha softmax(z) and a few listed entries. With

    offset = z_y - (the log-prob that label y had when it was sampled)

the sum of a row's exp(z - offset) is exp(drift): offset is the row's logsumexp but for the drift,
so one read and one write need no maximum. With s the sums and E 0 at the listed words,

    log p_y = z_y - offset - log s
    grad_hidden = c (E W) + listed entries,  grad_weight = E^T (c h) + listed entries
    with c = alpha / s

On an H200 this saved 0.5 of the 41 ms of `linear_opd_loss` at 8,192 x 151,936 and H = 4096: too
little for a second way through the head. No loss takes it; its tests hold it to the same budget.

The listed entries are exact, not rounded with E. Where drift is large, E may overflow or lose
digits: `exp_rows` says in which rows, and their gradients are to be made in two passes.

Bytes that must move: those of x read and written; of the sum read, of the gradient written; of the
logits read, of E written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, ceil_div, power_of_2, programs_wanted, vector_width
from .lanes import lanes, load_lanes, words
from .launch import launch

TILE = 4096  # of `scale_unless_one` and `finish_sum`: two or more 16-byte loads in flight a thread
NUM_WARPS = 8
PROGRAMS = 4  # as multiples of those that run at once; each walks over many tiles
EXP_WARPS, EXP_LOADS = 4, 2
EXP_WAVES = 2
SAFE_DRIFT = tl.constexpr(10.0)  # nats: e^10 is below the largest float16


@triton.jit
def _multiply(
    x,  # [n] any float dtype
    out,  # [n] any float dtype; may be x
    factor,  # scalar, any float dtype
    n,
    ONLY_UNLESS_ONE: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = x * factor in float32. What is exactly 0 stays 0, whatever the factor."""
    f = tl.load(factor).to(tl.float32)
    if ONLY_UNLESS_ONE:
        if f == 1.0:
            return
    lane = tl.arange(0, TILE)
    whole = tl.full([], TILE, tl.int64)
    full = n // TILE
    for tile in range(tl.program_id(0), full, tl.num_programs(0)):
        at = tile * whole + lane
        value = tl.load(x + at).to(tl.float32)
        value = tl.where(value == 0.0, value, value * f)
        tl.store(out + at, value.to(out.dtype.element_ty))
    if tl.program_id(0) == full % tl.num_programs(0):
        at = full * whole + lane
        value = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
        value = tl.where(value == 0.0, value, value * f)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _exp_tile(
    logits, out, word, low, high, target, offset_log2, scale_log2, total,
    LOADS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write a tile of E, 0 at the word `target`, and add all of it to the lanes' sums."""
    STEP: tl.constexpr = logits.shape[0] * logits.shape[1]
    xs = load_lanes(logits, word, low, high, LOADS, MASKED)
    for i in tl.static_range(LOADS):
        e = tl.exp2(xs[i] * scale_log2 - offset_log2)
        total += tl.sum(e, 1)
        e = tl.where(word + i * STEP == target, 0.0, e).to(out.dtype.element_ty)
        if MASKED:
            inside = (word + i * STEP >= low) & (word + i * STEP < high)
            tl.store(out + i * STEP, e, mask=inside)
        else:
            tl.store(out + i * STEP, e)
    return total


@triton.jit
def _zero_row(out, word, low, high, LOADS: tl.constexpr):
    STEP: tl.constexpr = out.shape[0] * out.shape[1]
    for i in tl.static_range(LOADS):
        inside = (word + i * STEP >= low) & (word + i * STEP < high)
        tl.store(out + i * STEP, tl.zeros(out.shape, out.dtype.element_ty), mask=inside)


@triton.jit
def _store_sum(total, row, live, sums, far):
    SAFE_DRIFT_: tl.constexpr = SAFE_DRIFT
    total = tl.where(live, total, 1.0)
    drift = tl.log(total)
    tl.store(sums + row, total)
    tl.store(far + row, tl.where(tl.abs(drift) <= SAFE_DRIFT_, 0, 1).to(tl.uint8))


@triton.jit
def _exp_rows(
    logits,  # [C, V] any float dtype, rows `stride` apart
    out,  # [C, V] any float dtype, rows as far apart; may be the logits themselves
    label,  # [C] int32 or int64, or None
    offset,  # [C] float32
    valid,  # [C] uint8, or None
    sums,  # [C] float32 out
    far,  # [C] uint8 out
    partials,  # [C, SPLITS] float32 out; only where SPLITS > 1
    stride,
    vocab,
    scale,
    SPLITS: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a boundary of VECTOR elements
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    TILE: tl.constexpr = LOADS * LANES * VECTOR
    LOG2_E_: tl.constexpr = LOG2_E
    row = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    shift = 0
    if not ALIGNED:
        shift = (row * stride % VECTOR).to(tl.int32)
    start = tl.multiple_of(row * stride - shift, VECTOR)
    word = words(LANES, VECTOR)
    x = logits + start + word
    y = out + start + word
    target = -1
    if label is not None:
        column = tl.load(label + row)
        known = (column >= 0) & (column < vocab)
        target = tl.where(known, column, -1 - shift).to(tl.int32) + shift
    offset_log2 = tl.load(offset + row) * LOG2_E_
    scale_log2 = scale * LOG2_E_
    tiles = (vocab + shift + TILE - 1) // TILE
    total = tl.zeros([LANES], tl.float32)
    for tile in range(split * tiles // SPLITS, (split + 1) * tiles // SPLITS):
        begin = tile * TILE
        low = shift - begin
        high = vocab + shift - begin
        if not live:
            _zero_row(y + begin, word, low, high, LOADS)
        elif (low <= 0) & (high >= TILE):
            total = _exp_tile(
                x + begin, y + begin, word, 0, TILE, target - begin, offset_log2, scale_log2,
                total, LOADS, False,
            )  # fmt: skip
        else:
            total = _exp_tile(
                x + begin, y + begin, word, low, high, target - begin, offset_log2, scale_log2,
                total, LOADS, True,
            )  # fmt: skip
    row_total = tl.sum(total, 0)
    if SPLITS == 1:
        _store_sum(row_total, row, live, sums, far)
    else:
        tl.store(partials + row * SPLITS + split, row_total)


@triton.jit
def _add_splits(valid, sums, far, partials, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    total = tl.sum(tl.load(partials + row * SPLITS + tl.arange(0, SPLITS)), 0)
    _store_sum(total, row, live, sums, far)


@triton.jit
def _zero_entries(out, ids, stride, vocab, K: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.load(ids + row * K + k, mask=k < K, other=-1)
    known = (column >= 0) & (column < vocab)
    zero = tl.zeros([BLOCK_K], out.dtype.element_ty)
    tl.store(out + row * stride + column, zero, mask=known)


def _launch_multiply(x: Tensor, out: Tensor, factor: Tensor, only_unless_one: bool) -> None:
    n = x.numel()
    if n:
        programs = min(ceil_div(n, TILE), PROGRAMS * programs_wanted(x.device))
        launch(
            _multiply,
            (programs,),
            x,
            out,
            factor,
            n,
            ONLY_UNLESS_ONE=only_unless_one,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )


def scale_unless_one(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply contiguous tensors of any float dtype in place by a scalar tensor of their device.

    Nothing is touched where the factor is exactly 1. What is exactly 0 stays 0 even if the factor
    is NaN: rows that were left out have no gradient.
    """
    for x in tensors:
        assert x.is_contiguous()
        _launch_multiply(x, x, factor, True)


def finish_sum(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """total * factor in float32, rounded once to `dtype`; total contiguous, of any shape.

    What is exactly 0 stays 0, as in `scale_unless_one`.
    """
    assert total.is_contiguous()
    out = torch.empty_like(total, dtype=dtype)
    _launch_multiply(total, out, factor, False)
    return out


def exp_rows(
    logits: Tensor,  # [C, V] bfloat16, float16 or float32, last dimension contiguous
    ids: Tensor | None,  # [C, K] int32 or int64, contiguous: where E is to be 0
    offset: Tensor,  # [C] float32, contiguous: about the logsumexp of scale * logits
    scale: float,
    valid: Tensor | None = None,  # [C] bool
    out: Tensor | None = None,  # [C, V] another dtype, strides of the logits; None: the logits
) -> tuple[Tensor, Tensor]:
    """Write E = exp(scale * logits - offset) into `out`; return (sums [C] float32, far [C] bool).

    The sums go over all words, those of `ids`, too, before E is rounded. `far` marks rows in which
    |log sum| is beyond SAFE_DRIFT or NaN: their E is not to be used. Rows that are not valid are
    not read: E is 0, the sum 1. An id outside the vocabulary writes nothing.
    """
    out = logits if out is None else out
    assert out.stride() == logits.stride() and logits.stride(1) == 1
    (rows, vocab), stride = logits.shape, logits.stride(0)
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device)
    far = torch.empty(rows, dtype=torch.bool, device=logits.device)
    vector = max(vector_width(logits), vector_width(out))
    tile = lanes(vocab, vector, EXP_WARPS, EXP_LOADS)
    tiles = ceil_div(vocab, tile["LOADS"] * tile["LANES"] * vector)
    wanted = ceil_div(EXP_WAVES * programs_wanted(logits.device), max(rows, 1))
    splits = min(power_of_2(wanted), power_of_2(tiles), 64)
    partials = torch.empty(rows, splits, device=logits.device) if splits > 1 else None
    if rows:
        mask = None if valid is None else valid.view(torch.uint8)
        bits, k = far.view(torch.uint8), 0 if ids is None else ids.shape[1]
        launch(
            _exp_rows,
            (rows * splits,),
            logits,
            out,
            ids if k == 1 else None,
            offset,
            mask,
            sums,
            bits,
            partials,
            stride,
            vocab,
            scale,
            SPLITS=splits,
            ALIGNED=stride % vector == 0,
            **tile,
            num_warps=EXP_WARPS,
        )
        if splits > 1:
            launch(_add_splits, (rows,), mask, sums, bits, partials, SPLITS=splits, num_warps=1)
        if k > 1:
            block = min(power_of_2(k), 256)
            launch(
                _zero_entries,
                (rows, ceil_div(k, block)),
                out,
                ids,
                stride,
                vocab,
                K=k,
                BLOCK_K=block,
                num_warps=1,
            )
    return sums, far
