"""The vocabulary passes without Triton: for CPUs, and in plain PyTorch for any device.

With z = scale * logits, row by row:

    scan    one read             gathered = z[ids], maximum, log_sum = log sum exp(z - maximum)
    expand  one read, one write  out = scale * (alpha softmax(z) + sum_k beta_k onehot(ids_k))

On a CPU functions in C go over the rows: see `native`. Where they cannot (float64, other devices,
no compiler at installation) a few rows at a time pass through one block of scratch that stays in
the cache. On the CPU, where the row maxima lie within +-60, exp(z) neither overflows nor loses
digits, so the shift by the maximum moves from the [N, V] data into a factor for each row. Bytes
that must move, with e bytes an element: N V e in `scan`, 2 N V e in `expand`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import native
from .row_chunks import (
    Piece,
    accumulator,
    chunks,
    cut,
    new_scratch,
    rows_at_once,
    scaled,
    sequences,
    spread,
)
from .threads import share

SAFE_MAXIMUM = 60.0  # exp(60) summed over 2^18 words is still 10^7 times below the largest float32
SAFE_FACTOR = 1e32  # factors of 1 / this to this meet neither denormals nor infinity


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
    run = native.scan if native.takes(logits) else _scan
    maximum, log_sum, entropy = spread(run(logits.detach(), valid, scale, with_entropy), valid)
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
    gathered = logits.gather(2, index).view(ids.shape).to(accumulator(logits)).mul_(scale)
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
    x, y = logits.detach(), out.detach()
    run = native.expand if native.takes(x) else _expand
    run(x, active, maximum, log_sum, alpha, scale, y)
    _put_entries(out, ids, maximum, log_sum, gathered, valid, alpha, beta, scale)


# The passes in ATen.


def _scan(logits: Tensor, valid: Tensor | None, scale: float, with_entropy: bool) -> Tensor:
    """[3, valid rows]: maximum, log_sum and entropy."""
    size = rows_at_once(logits)
    scratch = new_scratch(logits, 1 + with_entropy, size)
    pieces: list[Piece] = []
    counts: list[int] = []
    for (x,), (mask,) in sequences((logits,), (valid,)):
        for n, (piece,) in chunks(mask, size, x):
            pieces.append(piece)
            counts.append(n)
    statistics = logits.new_zeros((3, sum(counts)), dtype=accumulator(logits))
    outs = zip(*(torch.split(row, counts) for row in statistics.unbind()), strict=True)

    def work(task: tuple[Piece, tuple[Tensor, ...]], worker: int) -> None:
        piece, out = task
        x = piece.read()
        _row_statistics(x, scale, cut(scratch[worker], len(x)), out)

    share(list(zip(pieces, outs, strict=True)), work, len(scratch))
    maximum, total, _ = statistics
    total.clamp_(min=1).log_()  # the sum includes exp(0)
    total.masked_fill_(maximum == -torch.inf, -torch.inf)  # as logsumexp has it
    return statistics


def _expand(
    logits: Tensor,
    active: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    alpha: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """out = scale * alpha * softmax(z) in active rows, 0 in the others."""
    shift, factor = _row_factors(maximum, log_sum, alpha, active, scale)
    size = rows_at_once(logits)
    scratch = new_scratch(logits, 1, size)
    tasks: list[_Expansion] = []
    for (x, y), (on, off, f, m) in sequences((logits, out), (active, ~active, factor, shift)):
        tasks += [_Expansion(*pieces) for _, pieces in chunks(off, size, y)]
        tasks += [_Expansion(*pieces) for _, pieces in chunks(on, size, y, x, f, m)]

    def work(task: _Expansion, worker: int) -> None:
        if task.logits is None:
            task.out.zero()
        else:
            _write_softmax(task, scale, scratch[worker][0])

    share(tasks, work, len(scratch))


# Arithmetic on a chunk, and on row data.


class _Expansion(NamedTuple):
    """out = factor * exp(scale * logits - shift); without logits 0."""

    out: Piece  # [rows, V]
    logits: Piece | None = None  # [rows, V], may be out
    factor: Piece | None = None  # [rows, 1]
    shift: Piece | None = None  # [rows, 1]


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


def _write_softmax(task: _Expansion, scale: float, block: Tensor) -> None:
    assert task.logits is not None and task.factor is not None
    x, factor = task.logits.read(), task.factor.read()
    if len(x) < len(block):
        block = block[: len(x)]
    z = scaled(x, scale, block)
    if task.shift is not None:
        z = torch.sub(z, task.shift.read(), out=block)
    if task.out.chosen is None and task.out.x.dtype == z.dtype:
        torch.exp(z, out=task.out.x).mul_(factor)
    else:
        task.out.write(torch.exp(z, out=block).mul_(factor))


def _row_statistics(
    x: Tensor,  # [rows, V]
    scale: float,
    scratch: list[Tensor],  # one block [rows, V]; two to have the entropy
    out: tuple[Tensor, ...],  # three [rows]
) -> None:
    """Maximum of z = scale * x, sum of exp(z - maximum), and entropy if asked for, into `out`."""
    maximum, total, entropy = out
    z = scaled(x, scale, scratch[0])
    torch.amax(z, -1, out=maximum)
    e = scratch[-1]
    with_entropy = len(scratch) == 2
    if not with_entropy and x.is_cpu and _all_safe(maximum):
        # Divided by the exponential's own value at the maximum, which cancels its rounding: near
        # p = 1 the sum is as exact as with the shift.
        torch.sum(torch.exp(z, out=e), -1, out=total).div_(maximum.exp())
        return
    z = torch.sub(z, maximum[:, None], out=scratch[0])
    torch.sum(torch.exp(z, out=e), -1, out=total)
    if with_entropy:
        # Clamped, -inf times the probability 0 is 0. NaN stays.
        mean = z.clamp_(min=torch.finfo(z.dtype).min).mul_(e).sum(-1).div_(total)
        torch.sub(total.log(), mean, out=entropy)


def _all_safe(maximum: Tensor) -> bool:
    """False for NaN, too."""
    return all(-SAFE_MAXIMUM <= x <= SAFE_MAXIMUM for x in maximum.tolist())


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
