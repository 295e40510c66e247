"""The vocabulary passes in chunks of plain PyTorch: for CPUs, and for any device without Triton.

With z = scale * logits, row by row:

    scan    one read             gathered = z[ids], maximum, log_sum = log sum exp(z - maximum)
    expand  one read, one write  out = scale * (alpha softmax(z) + sum_k beta_k onehot(ids_k))

A few rows at a time pass through one block of scratch that stays in the cache. On the CPU, where
the row maxima lie within +-60, exp(z) neither overflows nor loses digits, so the shift by the
maximum moves from the [N, V] data into a factor for each row. Bytes that must move, with e bytes
an element: N V e in `scan`, 2 N V e in `expand`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .threads import share

SAFE_MAXIMUM = 60.0  # exp(60) summed over 2^18 words is still 10^7 times below the largest float32
SAFE_FACTOR = 1e32  # factors of 1 / this to this meet neither denormals nor infinity
WORDS_PER_THREAD = 1 << 18  # 1 MiB of float32
# Blocks over 32 MiB go back to the system when freed; touching new pages costs more than the work.
MOST_WORDS = 1 << 23
DEVICE_WORDS = 1 << 26  # where there are thousands of threads

Rows = slice | Tensor  # consecutive rows, or an int64 index


@torch.no_grad()
def scan(
    logits: Tensor,  # [B, T, V], any float dtype, last dimension contiguous, any outer strides
    ids: Tensor,  # [N, K] int64 or int32, N = B * T
    valid: Tensor | None,  # [N] bool; None: all rows
    scale: float,  # 1 / temperature
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (gathered [N, K], log_probs [N, K], maximum [N], log_sum [N], entropy [N] or [0]).

    All are float32, or float64 for float64 logits; log_probs = (gathered - maximum) - log_sum and
    the entropy are in nats. Rows that are not valid give 0: their logits and ids are ignored. A row
    that is all -inf, or holds a NaN or +inf, gives NaN.

    Raises ValueError for an id outside [0, V) in a valid row on the CPU; elsewhere it gives NaN.
    """
    size, workers = _task_rows(logits), _workers(logits)
    shape = workers, 1 + with_entropy, size, logits.shape[2]
    scratch = logits.new_empty(shape, dtype=_accumulator(logits))
    tasks: list[tuple[int, Tensor, Rows]] = []
    for (x,), (mask,) in _sequences((logits.detach(),), (valid,)):
        tasks += [(len(tasks) + i, x, rows) for i, rows in enumerate(_chunks(mask, len(x), size))]
    parts = [scratch.new_zeros((3, 0))] * (len(tasks) + 1)

    def work(task: tuple[int, Tensor, Rows], worker: int) -> None:
        i, x, rows = task
        parts[i] = _row_statistics(_take(x, rows), scale, scratch[worker])

    share(tasks, work, workers)
    maximum, total, entropy = _spread(torch.cat(parts, 1), valid)
    log_sum = total.clamp_(min=1).log_()  # the sum includes exp(0); rows left out hold 0
    log_sum.masked_fill_(maximum == -torch.inf, -torch.inf)  # as logsumexp has it
    gathered = gather(logits, ids, valid, scale)
    log_probs = (gathered - maximum[:, None]).sub_(log_sum[:, None])
    return gathered, log_probs, maximum, log_sum, entropy if with_entropy else entropy.new_empty(0)


@torch.no_grad()
def gather(
    logits: Tensor,  # [B, T, V]
    ids: Tensor,  # [N, K]
    valid: Tensor | None,  # [N] bool; None: all rows
    scale: float,
) -> Tensor:
    """z[ids] [N, K], as `scan` returns it."""
    bad = bad_ids(ids, valid, logits.shape[2])
    unread = bad if valid is None else bad | ~valid[:, None]
    index = ids.masked_fill(unread, 0).long().view(*logits.shape[:2], ids.shape[1])
    gathered = logits.gather(2, index).view(ids.shape).to(_accumulator(logits)).mul_(scale)
    return gathered.masked_fill_(unread, 0).masked_fill_(bad, torch.nan)


@torch.no_grad()
def expand(
    logits: Tensor,  # [B, T, V], as given to scan
    ids: Tensor,  # [N, K]
    maximum: Tensor,  # [N], from scan, as the next two
    log_sum: Tensor,  # [N]
    gathered: Tensor,  # [N, K]
    valid: Tensor | None,  # [N] bool; None: all rows
    alpha: Tensor,  # [N]: d loss / d logsumexp
    beta: Tensor,  # [N, K]: d loss / d z[ids]
    scale: float,  # 1 / temperature
    out: Tensor,  # [B, T, V], dtype of the logits, any outer strides; may be the logits
) -> None:
    """Write d loss / d logits into `out`, computed in float32 (float64) and rounded once.

    Rows that are not valid become 0 and are not read; nor are rows whose alpha is 0. An id outside
    [0, V) writes nothing; ids listed twice in a row receive both betas. A NaN alpha gives NaN.
    """
    active = alpha != 0 if valid is None else (alpha != 0) & valid
    shift, factor = _row_factors(maximum, log_sum, alpha, active, scale)
    size, workers = _task_rows(logits), _workers(logits)
    scratch = logits.new_empty((workers, size, logits.shape[2]), dtype=_accumulator(logits))
    tasks: list[tuple[Tensor, Tensor, Rows, Tensor | None, Tensor | None]] = []
    row_data = active, ~active, factor, shift
    for (x, y), (on, off, f, m) in _sequences((logits.detach(), out.detach()), row_data):
        tasks += [(x, y, rows, None, None) for rows in _chunks(off, len(x), size)]
        tasks += [(x, y, rows, f, m) for rows in _chunks(on, len(x), size)]

    def work(task: tuple[Tensor, Tensor, Rows, Tensor | None, Tensor | None], worker: int) -> None:
        x, y, rows, f, m = task
        if f is None:
            _zero(y, rows)
        else:
            _write_softmax(x, y, rows, f, m, scale, scratch[worker])

    share(tasks, work, workers)
    _put_entries(out, ids, maximum, log_sum, gathered, valid, alpha, beta, scale)


# Which rows are worked on together, and where they lie.


def _accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 data."""
    return torch.promote_types(x.dtype, torch.float32)


def _workers(logits: Tensor) -> int:
    """Threads that share a pass; other devices share their work themselves."""
    return torch.get_num_threads() if logits.is_cpu else 1


def _task_rows(logits: Tensor) -> int:
    """How many rows a thread passes through its scratch at once."""
    batch, length, vocab = logits.shape
    most = MOST_WORDS // _workers(logits)
    words = min(WORDS_PER_THREAD, most) if logits.is_cpu else DEVICE_WORDS
    return max(1, min(batch * length, round(words / vocab)))


def _sequences(
    tensors: tuple[Tensor, ...],  # [B, T, V]
    row_data: tuple[Tensor | None, ...],  # [N] or [N, 1]
) -> Iterator[tuple[list[Tensor], list[Any]]]:
    """Views [rows, V] and [rows, ...] of all rows where the strides allow it, else of each b."""
    batch, length, vocab = tensors[0].shape
    if batch < 2 or length < 2 or all(x.stride(0) == length * x.stride(1) for x in tensors):
        yield [x.view(batch * length, vocab) for x in tensors], list(row_data)
        return
    for b in range(batch):
        rows = slice(b * length, (b + 1) * length)
        yield [x[b] for x in tensors], [None if x is None else x[rows] for x in row_data]


def _chunks(mask: Tensor | None, count: int, size: int) -> Iterator[Rows]:
    """The rows of [0, count) that the mask selects, in order, at most `size` at a time."""
    if mask is None:
        yield from (slice(i, min(i + size, count)) for i in range(0, count, size))
        return
    selected = mask.nonzero()[:, 0]
    for i in range(0, len(selected), size):
        rows = selected[i : i + size]
        first, last = int(rows[0]), int(rows[-1])
        yield slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _take(x: Tensor, rows: Rows) -> Tensor:
    """x[rows]: a view where the rows are consecutive."""
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _zero(x: Tensor, rows: Rows) -> None:
    """x[rows] = 0"""
    if isinstance(rows, slice):
        x[rows].zero_()
    else:
        x.index_fill_(0, rows, 0)


def _store(x: Tensor, rows: Rows, values: Tensor, factor: Tensor) -> None:
    """x[rows] = factor * values, rounded once; overwrites the values."""
    if isinstance(rows, slice):
        x[rows].copy_(values.mul_(factor))
    else:
        x.index_copy_(0, rows, values.mul_(factor).to(x.dtype))


def _spread(values: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    """The rows of `values` [k, selected] as k tensors [N], with 0 where the mask is False."""
    if mask is None:
        return tuple(x.clone() for x in values)
    return tuple(x.new_zeros(len(mask)).masked_scatter_(mask, x) for x in values)


# Arithmetic on a chunk, and on row data.


def _write_softmax(
    x: Tensor,  # [rows, V]
    y: Tensor,  # [rows, V], may be x
    rows: Rows,
    factor: Tensor,  # [rows, 1]
    shift: Tensor | None,  # [rows, 1]
    scale: float,
    scratch: Tensor,  # [>= chosen rows, V]
) -> None:
    """y[rows] = factor * exp(scale * x[rows] - shift)"""
    z = _scaled(_take(x, rows), scale, scratch)
    if shift is not None:
        z = torch.sub(z, _take(shift, rows), out=scratch[: len(z)])
    if isinstance(rows, slice) and y.dtype == z.dtype:
        torch.exp(z, out=y[rows]).mul_(_take(factor, rows))
    else:
        _store(y, rows, torch.exp(z, out=scratch[: len(z)]), _take(factor, rows))


def _scaled(x: Tensor, scale: float, scratch: Tensor) -> Tensor:
    """scale * x, in the scratch unless there is nothing to do; [rows, V]."""
    z = scratch[: len(x)]
    if x.dtype == z.dtype:
        return x if scale == 1 else torch.mul(x, scale, out=z)
    z.copy_(x)
    return z if scale == 1 else z.mul_(scale)


def _row_statistics(
    x: Tensor,  # [rows, V]
    scale: float,
    scratch: Tensor,  # [1, >= rows, V]; [2, ...] to have the entropy
) -> Tensor:
    """[3, rows]: maximum of z = scale * x, sum of exp(z - maximum), and entropy if asked for."""
    z = _scaled(x, scale, scratch[0])
    maximum = z.amax(-1)
    e = scratch[-1, : len(x)]
    with_entropy = len(scratch) == 2
    if not with_entropy and x.is_cpu and _norm(maximum) <= SAFE_MAXIMUM:
        # Divided by the exponential's own value at the maximum, which cancels its rounding: near
        # p = 1 the sum is as exact as with the shift.
        total = torch.exp(z, out=e).sum(-1).div_(maximum.exp())
        return torch.stack((maximum, total, total))
    z = torch.sub(z, maximum[:, None], out=scratch[0, : len(x)])
    total = torch.exp(z, out=e).sum(-1)
    if not with_entropy:
        return torch.stack((maximum, total, total))
    # Clamped, -inf times the probability 0 is 0. NaN stays.
    mean = z.clamp_(min=torch.finfo(z.dtype).min).mul_(e).sum(-1).div_(total)
    return torch.stack((maximum, total, total.log().sub_(mean)))


def _norm(x: Tensor) -> float:
    """Largest magnitude; NaN if there is one."""
    return float(torch.linalg.vector_norm(x, torch.inf))


def _row_factors(
    maximum: Tensor, log_sum: Tensor, alpha: Tensor, active: Tensor, scale: float
) -> tuple[Tensor | None, Tensor]:
    """(shift, factor), [N, 1], with scale * alpha * softmax(z) = factor * exp(z - shift).

    The shift is None where every active row can do without.
    """
    if maximum.is_cpu:
        factor = (-(maximum.double() + log_sum)).exp_().mul_(alpha).mul_(scale)
        size = factor.abs()
        safe = (size >= 1 / SAFE_FACTOR) & (size <= SAFE_FACTOR) & (maximum.abs() <= SAFE_MAXIMUM)
        if bool((safe | ~active).all()):
            return None, factor.to(maximum.dtype)[:, None]
    return maximum[:, None], (-log_sum).exp_().mul_(alpha).mul_(scale)[:, None]


def bad_ids(ids: Tensor, valid: Tensor | None, vocab: int) -> Tensor:
    """[N, K] bool: ids of valid rows outside [0, V). Raises ValueError on the CPU if any are."""
    bad = (ids < 0) | (ids >= vocab)
    if valid is not None:
        bad &= valid[:, None]
    if ids.is_cpu and bool(bad.any()):
        row, k = bad.nonzero()[0].tolist()
        raise ValueError(
            f"ids must lie in [0, {vocab}); got {int(ids[row, k])} at row {row}, entry {k}"
        )
    return bad


def _sum_duplicates(ids: Tensor, beta: Tensor) -> Tensor:
    """[N, K]: for each entry, the sum of beta over the entries of its row with the same id."""
    ordered, order = ids.sort(-1)
    new = (ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)
    if bool(new.all()):
        return beta
    rank = torch.nn.functional.pad(new.cumsum(-1), (1, 0))
    group = torch.empty_like(rank).scatter_(1, order, rank)
    return torch.zeros_like(beta).scatter_add_(1, group, beta).gather(1, group)


def _put_entries(
    out: Tensor,
    ids: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
) -> None:
    """Overwrite `out` at the listed ids with scale * (alpha p + sum beta)."""
    if ids.shape[1] > 1:
        beta = _sum_duplicates(ids, beta)
    a = alpha[:, None]
    log_p = (gathered - maximum[:, None]).sub_(log_sum[:, None])
    p = log_p.exp()
    # alpha p + beta = alpha (p - 1) + (alpha + beta): near p = 1, expm1 keeps the digits of p - 1.
    value = torch.where(p > 0.5, a * log_p.expm1() + (a + beta), a * p + beta)
    value = torch.where(a == 0, beta, value).mul_(scale)
    listed = (ids >= 0) & (ids < out.shape[2])
    row, k = (listed if valid is None else listed & valid[:, None]).nonzero(as_tuple=True)
    length = out.shape[1]
    where = (row // length, row % length, ids[row, k].long())
    out.index_put_(where, value[row, k].to(out.dtype))
