"""`select`: the K words of each row with the largest logits, and the sum of its exponentials.

`_bounds` reads the row once. It finds the largest logit of every column of a tile, and beside it
the sum of the row's exponentials, in lanes as `scan` does: K words at least are as large as the
K-th largest of those maxima, the bound, and whatever is as large stands in a column whose maximum
is. `_candidates` reads those columns alone, about K, and keeps the words at or above the bound: K,
and some more where two of the K share a column. Where they are more than CAPACITY, as among equal
logits, `_exactly` finds the K-th largest logit itself bit by bit, in 32 more reads, and keeps the
first of the words that have it. `_order` then counts, for each word that was kept, those that go
before it. A word is kept as a number: its logit's bits, made to rise with it, above those of its
id, which fall.

Bytes that must move: N * V * itemsize read; besides, a sector of 32 bytes for each word of N * K
columns, V / 4096 each, and O(N K).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, is_aligned, power_of_2, vector_width
from .lanes import WARP, move
from .launch import launch

WARPS = 8
COLUMNS = 4096  # of which the bound is found
WORDS = 2048  # of a tile where some are kept, which takes registers
READ = 64, 16  # columns of so many tiles that are looked through at a time,
READ_WARPS = 4
LONGEST = COLUMNS // 4  # list: a longer one would need more columns
CAPACITY = 512  # words kept of a row, or four times the list
SCRATCH = 1 << 23  # words kept of all rows at a time: 64 MiB
PEERS = 64, 32  # words that are ordered at a time, beside so many others

LAST_ID = tl.constexpr(0xFFFFFFFF)
LOWEST_KEY = tl.constexpr(-(2**31))
NOTHING = tl.constexpr(-(2**63))  # before every word's number


@triton.jit
def _key(x):
    """int32 that rise with float32; -0 and 0 are one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _tile(pointers, word, at, low, high, BLOCK: tl.constexpr):
    """Words at ... at + BLOCK of a row in float32, -inf outside [low, high)."""
    if (at >= low) & (at + BLOCK <= high):
        x = tl.load(pointers + at)
    else:
        inside = (at + word >= low) & (at + word < high)
        x = tl.load(pointers + at, mask=inside, other=-float("inf"))
    return x.to(tl.float32)


@triton.jit
def _raised(bound, bit):
    """The bound with this bit, of 31 (which makes it 0) and below."""
    return tl.where(bit == 31, 0, bound + (1 << (bit % 31)))


@triton.jit
def _keep(candidates, x, hit, place, id, CAPACITY: tl.constexpr):
    """Store the words that hit as numbers."""
    LAST_ID_: tl.constexpr = LAST_ID
    number = (_key(x).to(tl.int64) << 32) | (id.to(tl.int64) ^ LAST_ID_)
    tl.store(candidates + place, number, mask=hit & (place < CAPACITY))


@triton.jit
def _row(
    logits, row, stride_batch, stride_row, length, ALIGNED: tl.constexpr, VECTOR: tl.constexpr
):
    """Where a row's first tile begins, and the elements in it that lie before the row.

    Tiles start on 16-byte boundaries.
    """
    offset = (row // length) * stride_batch + (row % length) * stride_row
    shift = 0
    if not ALIGNED:
        shift = (offset % VECTOR).to(tl.int32)
    return logits + tl.multiple_of(offset - shift, VECTOR), shift


@triton.jit
def _bounds(
    logits,  # [B, T, V] any float dtype, last dimension contiguous
    valid,  # [N] uint8, or None
    bounds,  # [rows] int32 out: the bound, as `_key` has it
    columns,  # [rows, CAPACITY] int32 out: those with words at the bound
    counts,  # [rows] int32 out: how many columns there are, written or not
    log_sum_out,  # [N] float32 out
    stride_batch,
    stride_row,
    first,  # row of the first program
    length,  # T
    vocab,  # V
    scale,  # 1 / temperature
    K: tl.constexpr,  # at most V
    BLOCK: tl.constexpr,  # columns: LANES * VECTOR, as often as it takes
    LANES: tl.constexpr,
    CAPACITY: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row starts on a 16-byte boundary
    VECTOR: tl.constexpr,
):
    STEP: tl.constexpr = LANES * VECTOR
    LOADS: tl.constexpr = BLOCK // STEP
    LOWEST_KEY_: tl.constexpr = LOWEST_KEY
    LOG2_E_: tl.constexpr = LOG2_E
    own = tl.program_id(0).to(tl.int64)
    row = first + own
    row_logits, shift = _row(logits, row, stride_batch, stride_row, length, ALIGNED, VECTOR)
    live = True
    if valid is not None:
        live = tl.load(valid + row) != 0
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    word = tl.arange(0, LOADS)[:, None, None] * STEP + lane
    pointers = row_logits + word
    scale_log2 = scale * LOG2_E_
    column = tl.full([LOADS, LANES, VECTOR], -float("inf"), tl.float32)
    maximum = tl.full([LANES], -float("inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for tile in range(tl.where(live, (vocab + shift + BLOCK - 1) // BLOCK, 0)):
        x = _tile(pointers, word, tile * BLOCK, shift, vocab + shift, BLOCK)
        column = tl.maximum(column, x)
        new = tl.maximum(maximum, tl.max(tl.max(x, 2), 0))
        centre, delta = move(maximum, new)
        weight = tl.exp2((x - centre[None, :, None]) * scale_log2)
        total = total * tl.exp2(delta * scale_log2) + tl.sum(tl.sum(weight, 2), 0)
        maximum = new
    key = _key(column)
    bound = tl.full([], LOWEST_KEY_, tl.int32)
    for step in range(32):
        raised = _raised(bound, 31 - step)
        bound = tl.where(tl.sum((key >= raised).to(tl.int32)) >= K, raised, bound)
    hit = tl.reshape(((key >= bound) & (column > -float("inf"))).to(tl.int32), [BLOCK])
    place = tl.cumsum(hit, 0) - 1
    here = tl.arange(0, BLOCK)
    tl.store(columns + own * CAPACITY + place, here, mask=(hit != 0) & (place < CAPACITY))
    _, delta = move(maximum, tl.max(maximum, 0))
    log_sum = tl.log(tl.sum(total * tl.exp2(delta * scale_log2), 0))
    tl.store(bounds + own, bound)
    tl.store(counts + own, tl.sum(hit))
    tl.store(log_sum_out + row, tl.where(live, log_sum, 0.0))


@triton.jit
def _candidates(
    logits,  # as the next one: see _bounds
    bounds,  # [rows]
    columns,  # [rows, CAPACITY]
    candidates,  # [rows, CAPACITY] int64 out: a number a word
    counts,  # [rows] int32: of columns; out: how many words there are, kept or not
    stride_batch,
    stride_row,
    first,
    length,
    vocab,
    BLOCK: tl.constexpr,  # as _bounds has it
    CAPACITY: tl.constexpr,
    ACROSS: tl.constexpr,
    DOWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64)
    candidates += own * CAPACITY
    columns += own * CAPACITY
    row_logits, shift = _row(logits, first + own, stride_batch, stride_row, length, ALIGNED, VECTOR)
    bound = tl.load(bounds + own)
    count = tl.load(counts + own)
    across = tl.arange(0, ACROSS)
    down = tl.arange(0, DOWN)
    tiles = (vocab + shift + BLOCK - 1) // BLOCK
    kept = tl.where(count > CAPACITY, count, 0)  # words at least
    for start in range(0, tl.where(count > CAPACITY, 0, count), ACROSS):
        listed = start + across < count
        column = tl.load(columns + start + across, mask=listed, other=0)
        for tile in range(0, tiles, DOWN):
            at = (tile + down)[:, None] * BLOCK + column[None, :]
            inside = listed[None, :] & (at >= shift) & (at < vocab + shift)
            x = tl.load(row_logits + at, mask=inside, other=-float("inf")).to(tl.float32)
            x = tl.reshape(x, [DOWN * ACROSS])
            hit = (_key(x) >= bound) & (x > -float("inf"))
            place = kept + tl.cumsum(hit.to(tl.int32), 0) - 1
            _keep(candidates, x, hit, place, tl.reshape(at, [DOWN * ACROSS]) - shift, CAPACITY)
            kept += tl.sum(hit.to(tl.int32))
    tl.store(counts + own, kept)


@triton.jit
def _exactly(
    logits,  # as the next ones: see _bounds
    candidates,  # [rows, CAPACITY] int64 out
    counts,  # [rows] int32: of words; out: of those kept
    stride_batch,
    stride_row,
    first,
    length,
    vocab,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    ALIGNED: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The K largest of the rows of which more than CAPACITY words are at the bound."""
    LOWEST_KEY_: tl.constexpr = LOWEST_KEY
    own = tl.program_id(0).to(tl.int64)
    candidates += own * CAPACITY
    row_logits, shift = _row(logits, first + own, stride_batch, stride_row, length, ALIGNED, VECTOR)
    word = tl.arange(0, BLOCK)
    pointers = row_logits + word
    more = tl.load(counts + own) > CAPACITY
    tiles = tl.where(more, (vocab + shift + BLOCK - 1) // BLOCK, 0)
    bound = tl.full([], LOWEST_KEY_, tl.int32)
    for step in range(tl.where(more, 32, 0)):
        raised = _raised(bound, 31 - step)
        count = 0
        for tile in range(tiles):
            x = _tile(pointers, word, tile * BLOCK, shift, vocab + shift, BLOCK)
            count += tl.sum((_key(x) >= raised).to(tl.int32))
        bound = tl.where(count >= K, raised, bound)
    equal = 0  # words above the bound, and then those that have its logit so far
    for tile in range(tiles):
        x = _tile(pointers, word, tile * BLOCK, shift, vocab + shift, BLOCK)
        equal += tl.sum((_key(x) > bound).to(tl.int32))
    kept = 0
    for tile in range(tiles):
        x = _tile(pointers, word, tile * BLOCK, shift, vocab + shift, BLOCK)
        key = _key(x)
        same = (key == bound).to(tl.int32)
        take = (key > bound) | ((key == bound) & (equal + tl.cumsum(same, 0) <= K))
        place = kept + tl.cumsum(take.to(tl.int32), 0) - 1
        _keep(candidates, x, take, place, tile * BLOCK + word - shift, K)
        kept += tl.sum(take.to(tl.int32))
        equal += tl.sum(same)
    if more:
        tl.store(counts + own, K)


@triton.jit
def _order(
    candidates,  # [rows, CAPACITY] int64
    counts,  # [rows] int32
    ids,  # [N, LENGTH] int64 out
    values,  # [N, LENGTH] float32 out
    first,
    LENGTH: tl.constexpr,  # of the lists
    CAPACITY: tl.constexpr,
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):
    LAST_ID_: tl.constexpr = LAST_ID
    NOTHING_: tl.constexpr = NOTHING
    own = tl.program_id(0).to(tl.int64)
    candidates += own * CAPACITY
    ids += (first + own) * LENGTH
    values += (first + own) * LENGTH
    count = tl.load(counts + own)
    at = tl.arange(0, OWN)
    peer = tl.arange(0, OTHERS)
    for start in range(0, count, OWN):
        number = tl.load(candidates + start + at, mask=start + at < count, other=NOTHING_)
        before = tl.zeros([OWN], tl.int32)
        for other in range(0, count, OTHERS):
            here = other + peer < count
            others = tl.load(candidates + other + peer, mask=here, other=NOTHING_)
            before += tl.sum((others[None, :] > number[:, None]).to(tl.int32), 1)
        key = (number >> 32).to(tl.int32)
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        listed = (start + at < count) & (before < LENGTH)
        tl.store(ids + before, (number & LAST_ID_) ^ LAST_ID_, mask=listed)
        tl.store(values + before, value, mask=listed)
    for start in range(0, LENGTH, OWN):
        empty = (start + at >= count) & (start + at < LENGTH)
        tl.store(ids + start + at, tl.full([OWN], -1, tl.int64), mask=empty)
        tl.store(values + start + at, -float("inf"), mask=empty)


def select(
    logits: Tensor,  # [B, T, V] bfloat16, float16 or float32; last dimension contiguous
    k: int,  # at most LONGEST, or V
    valid: Tensor | None,  # [N] bool
    scale: float,  # 1 / temperature
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids [N, K] int64, logits [N, K], log_sum [N]), float32, of the largest logits.

    Entries without a word (beyond V, of rows that are not valid, of logits of -inf) are -1 and
    -inf. Of equal logits the smaller ids come first.
    """
    batch, length, vocab = logits.shape
    rows, vector = batch * length, vector_width(logits)
    new = dict(device=logits.device)
    ids = torch.empty(rows, k, dtype=torch.int64, **new)
    values = torch.empty(rows, k, dtype=torch.float32, **new)
    log_sum = torch.empty(rows, dtype=torch.float32, **new)
    kept = min(k, vocab)
    capacity = max(CAPACITY, power_of_2(4 * kept))
    step = max(1, min(rows, SCRATCH // capacity))
    candidates = torch.empty(step, capacity, dtype=torch.int64, **new)
    columns = torch.empty(step, capacity, dtype=torch.int32, **new)
    counts, bounds = torch.empty(2, step, dtype=torch.int32, **new)
    widest = power_of_2(max(vocab, vector) + vector)  # a short row is one tile, wherever it begins
    width = min(COLUMNS, widest)
    tile = dict(BLOCK=width, CAPACITY=capacity)
    layout = dict(ALIGNED=is_aligned(logits, vector), VECTOR=vector)
    mask = None if valid is None else valid.view(torch.uint8)
    for first in range(0, rows, step):
        programs = (min(step, rows - first),)
        place = *logits.stride()[:2], first, length, vocab
        launch(
            _bounds, programs, logits, mask, bounds, columns, counts, log_sum, *place, scale,
            K=kept, LANES=min(WARP * WARPS, width // vector), **tile, **layout, num_warps=WARPS,
        )  # fmt: skip
        launch(
            _candidates, programs, logits, bounds, columns, candidates, counts, *place,
            ACROSS=READ[0], DOWN=READ[1], **tile, **layout, num_warps=READ_WARPS,
        )  # fmt: skip
        launch(
            _exactly, programs, logits, candidates, counts, *place, K=kept,
            BLOCK=min(WORDS, widest), CAPACITY=capacity, **layout, num_warps=WARPS,
        )  # fmt: skip
        launch(
            _order, programs, candidates, counts, ids, values, first, LENGTH=k, CAPACITY=capacity,
            OWN=PEERS[0], OTHERS=PEERS[1], num_warps=1,
        )  # fmt: skip
    return ids, values, log_sum
