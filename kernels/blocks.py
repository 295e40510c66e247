"""`row_blocks`: policy drift, reduced over the block of every row (arXiv 2606.24084).

    d_t = old_logp_t - logp_t              drift of row t
    a_t = | aggregate of d over the valid rows of t's block |

A block is an interval of rows inside one sequence: of `block_size` rows counted from the sequence's
first valid row, of one row, or of the whole sequence; for spans, the rows of the sequence that bear
the same id. So one rule serves all: row j belongs to row t's block if lo_t <= j < hi_t and their
span ids agree. A program takes ROWS rows and walks the rows their intervals cover, in tiles that
start at multiples of COLS: every row of a block then adds the same numbers in the same order, and
all of them get the same bits. O(N * block) work, O(N * T) for spans and sequences; no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
COLS = 32
NUM_WARPS = 8

# Rows of the result.
DRIFT, BLOCK_DRIFT, SEQUENCE_COUNT, IS_FIRST = range(4)


@triton.jit
def sequence_bounds(row, cu_seqlens, n_rows, length, n_sequences, PACKED: tl.constexpr):
    """First row of each row's sequence, and the row after its last."""
    if PACKED:
        start = row * 0
        end = start + n_rows
        for first in range(0, n_sequences + 1, 64):
            j = first + tl.arange(0, 64)
            border = tl.load(cu_seqlens + j, mask=j <= n_sequences, other=n_rows).to(tl.int32)
            before = border[None, :] <= row[:, None]
            start = tl.maximum(start, tl.max(tl.where(before, border[None, :], 0), 1))
            end = tl.minimum(end, tl.min(tl.where(before, n_rows, border[None, :]), 1))
    else:
        start = row // length * length
        end = start + length
    return start, end


@triton.jit
def _first_valid(valid, row, live, start, end, COUNT: tl.constexpr, COLS: tl.constexpr):
    """First valid row of each row's sequence, and with COUNT how many valid rows it has."""
    FAR: tl.constexpr = 2**31 - 1
    first = tl.full(row.shape, FAR, tl.int32)
    count = tl.zeros(row.shape, tl.float32)
    tile = tl.min(tl.where(live, start, FAR), 0) // COLS * COLS
    limit = tl.max(tl.where(live, end, 0), 0)
    while tile < limit:
        j = tile + tl.arange(0, COLS)
        is_valid = tl.load(valid + j, mask=j < limit, other=0) != 0
        member = (j[None, :] >= start[:, None]) & (j[None, :] < end[:, None]) & is_valid[None, :]
        first = tl.minimum(first, tl.min(tl.where(member, j[None, :], FAR), 1))
        if COUNT:
            count += tl.sum(member.to(tl.float32), 1)
        else:  # done as soon as every row has found its own
            limit = tl.max(tl.where(live & (first == FAR), end, 0), 0)
        tile += COLS
    return first, count


@triton.jit
def _members(log_probs, old_log_probs, valid, span_ids, row, live, lo, hi, j, limit):
    """Drift of rows j as [1, COLS], and whether each belongs to each row's block [ROWS, COLS]."""
    is_valid = tl.load(valid + j, mask=j < limit, other=0) != 0
    new = tl.load(log_probs + j, mask=is_valid, other=0.0)
    old = tl.load(old_log_probs + j, mask=is_valid, other=0.0)
    member = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]) & is_valid[None, :]
    if span_ids is not None:
        mine = tl.load(span_ids + row, mask=live, other=0)
        member &= tl.load(span_ids + j, mask=is_valid, other=0)[None, :] == mine[:, None]
    return (old - new)[None, :], member


@triton.jit
def _block_drift(
    log_probs,
    old_log_probs,
    valid,
    span_ids,
    row,
    live,
    lo,
    hi,
    AGGREGATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Absolute aggregate of the drift over [lo, hi), and the first valid row there."""
    FAR: tl.constexpr = 2**31 - 1
    begin = tl.min(tl.where(live, lo, FAR), 0) // COLS * COLS
    limit = tl.max(tl.where(live, hi, 0), 0)
    total = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    largest = tl.zeros([ROWS], tl.float32)
    nans = tl.zeros([ROWS], tl.int32)  # maxima drop NaN
    leader = tl.full([ROWS], FAR, tl.int32)
    for tile in range(begin, limit, COLS):
        j = tile + tl.arange(0, COLS)
        d, member = _members(log_probs, old_log_probs, valid, span_ids, row, live, lo, hi, j, limit)
        leader = tl.minimum(leader, tl.min(tl.where(member, j[None, :], FAR), 1))
        count += tl.sum(member.to(tl.float32), 1)
        if AGGREGATE == "mean":
            total += tl.sum(tl.where(member, d, 0.0), 1)
        elif AGGREGATE == "mean_abs":
            total += tl.sum(tl.where(member, tl.abs(d), 0.0), 1)
        else:
            nans = tl.maximum(nans, tl.max((member & (d != d)).to(tl.int32), 1))
            largest = tl.maximum(largest, tl.max(tl.where(member, tl.abs(d), 0.0), 1))
    result = largest
    if AGGREGATE == "mean" or AGGREGATE == "mean_abs":
        result = tl.abs(total / tl.maximum(count, 1.0))
    if AGGREGATE == "rms":  # in units of the largest: squares of large drifts overflow
        unit = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)
        for tile in range(begin, limit, COLS):
            j = tile + tl.arange(0, COLS)
            d, member = _members(
                log_probs, old_log_probs, valid, span_ids, row, live, lo, hi, j, limit
            )
            ratio = d / unit[:, None]
            total += tl.sum(tl.where(member, ratio * ratio, 0.0), 1)
        result = unit * tl.sqrt(total / tl.maximum(count, 1.0))
    return tl.where(nans > 0, float("nan"), result), leader


@triton.jit
def _row_blocks(
    log_probs,  # [N] float32
    old_log_probs,  # [N] float32, or None: no drift is wanted
    valid,  # [N] uint8
    span_ids,  # [N] int64, or None
    cu_seqlens,  # [n_sequences + 1] int32 or int64, or None: sequences of `length` rows
    out,  # [2 or 4, N] float32: drift, block drift; with COUNT valid rows of the sequence and 1
    #       at its first one, else 0
    block_first,  # [N] int32: first valid row of the row's block, -1 where not valid
    n_rows,
    length,
    n_sequences,
    block_size,
    GRANULARITY: tl.constexpr,  # "token", "block", "span", "sequence"
    AGGREGATE: tl.constexpr,  # "mean", "mean_abs", "rms", "max_abs"
    COUNT: tl.constexpr,  # whether rows 2 and 3 of `out` are wanted
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < n_rows
    live = tl.load(valid + row, mask=inside, other=0) != 0
    start, end = sequence_bounds(
        row, cu_seqlens, n_rows, length, n_sequences, cu_seqlens is not None
    )
    if COUNT or GRANULARITY == "block":
        first, count = _first_valid(valid, row, live, start, end, COUNT, COLS)
        if COUNT:
            tl.store(out + 2 * n_rows + row, tl.where(live, count, 0.0), mask=inside)
            is_first = (live & (first == row)).to(tl.float32)
            tl.store(out + 3 * n_rows + row, is_first, mask=inside)
        if GRANULARITY == "block":
            start = tl.where(live, first + (row - first) // block_size * block_size, start)
            end = tl.minimum(end, start + tl.minimum(block_size, n_rows))
    if GRANULARITY == "token":
        start = row
        end = row + 1
    if old_log_probs is not None:
        drift = tl.load(old_log_probs + row, mask=live, other=0.0) - tl.load(
            log_probs + row, mask=live, other=0.0
        )
        tl.store(out + row, drift, mask=inside)
        result, leader = _block_drift(
            log_probs, old_log_probs, valid, span_ids, row, live, start, end, AGGREGATE, ROWS, COLS
        )
        tl.store(out + n_rows + row, tl.where(live, result, 0.0), mask=inside)
        tl.store(block_first + row, tl.where(live, leader, -1), mask=inside)


def row_blocks(
    log_probs: Tensor,  # [N] float32
    old_log_probs: Tensor | None,  # [N] float32
    valid: Tensor,  # [N] bool
    span_ids: Tensor | None,  # [N] int64, with granularity "span"
    cu_seqlens: Tensor | None,  # [B + 1] int32 or int64
    length: int,  # rows of a sequence where cu_seqlens is None
    granularity: str,
    block_size: int,
    aggregate: str,
    count: bool,
) -> tuple[Tensor, Tensor]:
    """Return (rows [2 or 4, N] float32, block_first [N] int32), as `_row_blocks` describes them.

    One launch. Rows 2 and 3 exist only with `count`; without `old_log_probs` rows 0 and 1 are 0
    and block_first is -1.
    """
    n_rows = log_probs.shape[0]
    new = dict(device=log_probs.device)
    shape = (4 if count else 2, n_rows)
    if old_log_probs is None:
        out = torch.zeros(shape, dtype=torch.float32, **new)
        block_first = torch.full((n_rows,), -1, dtype=torch.int32, **new)
    else:
        out = torch.empty(shape, dtype=torch.float32, **new)
        block_first = torch.empty(n_rows, dtype=torch.int32, **new)
    if n_rows:
        _row_blocks[(triton.cdiv(n_rows, ROWS),)](
            log_probs, old_log_probs, valid.view(torch.uint8), span_ids, cu_seqlens,
            out, block_first, n_rows, length,
            0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, min(block_size, n_rows),
            GRANULARITY=granularity, AGGREGATE=aggregate, COUNT=count,
            ROWS=ROWS, COLS=COLS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out, block_first
