"""The passes over one vocabulary. With z = scale * logits, row by row:

    scan    one read             gathered = z[ids], maximum, log_sum = log sum exp(z - maximum)
    expand  one read, one write  out = scale * (alpha softmax(z) + sum_k beta_k onehot(ids_k))

and with a gamma [N] more, for losses in which the entropy has a part,

    out = scale * ((alpha + gamma log softmax(z)) softmax(z) + sum_k beta_k onehot(ids_k))

A few rows at a time pass through blocks of scratch, which hold them in float32 (float64).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_WORDS = 1 << 18  # elements of a block for each thread: 1 MiB of float32, which caches hold
LEAST = -1e4  # a log-prob whose probability is 0 in every dtype
DEVICE_WORDS = 1 << 26  # elements of a block where there are thousands of threads


@torch.no_grad()
def scan(
    logits: Tensor,  # [B, T, V], any float dtype, any strides
    ids: Tensor,  # [N, K] int64 or int32, N = B * T
    valid: Tensor | None,  # [N] bool; None: all rows
    scale: float,  # 1 / temperature
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (gathered [N, K], log_probs [N, K], maximum [N], log_sum [N], entropy [N] or [0]).

    All are float32, or float64 for float64 logits; log_probs = (gathered - maximum) - log_sum and
    the entropy are in nats. A row that is all -inf, or holds a NaN or +inf, gives NaN.

    Raises ValueError for an id outside [0, V) in a valid row on the CPU; elsewhere it gives NaN.
    """
    gathered = gather(logits, ids, valid, scale)
    n = len(ids)
    maximum, log_sum = gathered.new_zeros(n), gathered.new_zeros(n)
    entropy = gathered.new_zeros(n if with_entropy else 0)
    (x,) = joined(logits)
    first, *others = scratch(x, 2 if with_entropy else 1)
    for b, rows, at in walk(x, valid, len(first)):
        z = read(x, b, rows, scale, first)
        top = z.amax(-1)
        z.sub_(top[:, None])
        e = torch.exp(z, out=others[0][: len(z)]) if with_entropy else z.exp_()
        total = e.sum(-1)
        maximum[at], log_sum[at] = top, total.log()
        if with_entropy:
            # Clamped, -inf times the probability 0 is 0. NaN stays.
            mean = z.clamp_(min=torch.finfo(z.dtype).min).mul_(e).sum(-1).div_(total)
            entropy[at] = total.log() - mean
    log_sum.masked_fill_(maximum == -torch.inf, -torch.inf)  # as logsumexp has it
    log_probs = (gathered - maximum[:, None]).sub_(log_sum[:, None])
    return gathered, log_probs, maximum, log_sum, entropy


def scan_lists(
    logits: Tensor,
    labels: Tensor,  # [N] int64 or int32
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan`, and the labels' log-probs [N]."""
    every = torch.cat([labels[:, None].to(ids.dtype), ids], 1)
    gathered, log_probs, *others = scan(logits, every, valid, scale, with_entropy)
    maximum, log_sum, entropy = others
    listed = gathered[:, 1:].contiguous(), log_probs[:, 1:].contiguous()
    return *listed, maximum, log_sum, entropy, log_probs[:, 0].contiguous()


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
    maximum: Tensor | None,  # [N], from scan, as the next two; None where alpha is
    log_sum: Tensor | None,  # [N]
    gathered: Tensor | None,  # [N, K]
    valid: Tensor | None,  # [N] bool; None: all rows
    alpha: Tensor | None,  # [N]: d loss / d logsumexp; None: 0, and so is gamma
    beta: Tensor,  # [N, K]: d loss / d z[ids]
    scale: float,  # 1 / temperature
    out: Tensor,  # [B, T, V], any float dtype, any strides; may be the logits
    gamma: Tensor | None = None,  # [N]: d loss / d (minus the entropy); None: 0
) -> None:
    """Write d loss / d logits into `out`, computed in float32 (float64) and rounded once.

    Rows that are not valid become 0 and are not read; nor are rows whose alpha (and gamma) is 0. An
    id outside [0, V) writes nothing; ids listed twice in a row receive both betas. A NaN alpha
    gives NaN.
    """
    if alpha is None or maximum is None or log_sum is None or gathered is None:
        out.zero_()
        _put(out, ids, valid, _sum_duplicates(ids, beta) * scale)
        return
    active = alpha != 0 if gamma is None else (alpha != 0) | (gamma != 0)
    active = active if valid is None else active & valid
    factor = (-log_sum).exp_()
    factor = (factor if gamma is not None else factor.mul_(alpha)).mul_(scale)
    x, y = joined(logits, out)
    (block,) = scratch(x, 1)
    zero(y, ~active)
    for b, rows, at in walk(x, active, len(block)):
        z = read(x, b, rows, scale, block)
        z.sub_(maximum[at, None])
        slope = None
        if gamma is not None:
            slope = _slope(z - log_sum[at, None], alpha[at, None], gamma[at, None])
        z.exp_().mul_(factor[at, None])
        y[b, rows] = (z if slope is None else z.mul_(slope)).to(y.dtype)
    _put_entries(out, ids, maximum, log_sum, gathered, valid, alpha, beta, scale, gamma)


def expand_labels(
    logits: Tensor,
    labels: Tensor,  # [N]
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,  # [N, 1]
    valid: Tensor | None,
    slope: Tensor,  # [N]: d loss / d log p[label]
    scale: float,
    out: Tensor,
) -> None:
    """`expand` of a loss that is a function of the labels' log-probs: alpha = -beta."""
    expand(
        logits, labels[:, None], maximum, log_sum, gathered, valid, -slope, slope[:, None], scale,
        out,
    )  # fmt: skip


def _slope(log_p: Tensor, alpha: Tensor, gamma: Tensor) -> Tensor:
    """alpha + gamma log p; where p is 0 the product with it is to be 0."""
    return log_p.clamp(min=LEAST).mul_(gamma).add_(alpha)


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
    gamma: Tensor | None,
) -> None:
    """Overwrite `out` at the listed ids with scale * ((alpha + gamma log p) p + sum beta)."""
    beta = _sum_duplicates(ids, beta)
    a = alpha[:, None]
    log_p = (gathered - maximum[:, None]).sub_(log_sum[:, None])
    p = log_p.exp()
    if gamma is not None:
        a = _slope(log_p, a, gamma[:, None])
    # alpha p + beta = alpha (p - 1) + (alpha + beta): near p = 1, expm1 keeps the digits of p - 1.
    value = torch.where(p > 0.5, a * log_p.expm1() + (a + beta), a * p + beta)
    _put(out, ids, valid, torch.where(a == 0, beta, value).mul_(scale))


def _put(out: Tensor, ids: Tensor, valid: Tensor | None, value: Tensor) -> None:
    """Overwrite `out` [B, T, V] at the listed ids [N, K] of valid rows."""
    listed = (ids >= 0) & (ids < out.shape[2])
    row, k = (listed if valid is None else listed & valid[:, None]).nonzero(as_tuple=True)
    length = out.shape[1]
    where = (row // length, row % length, ids[row, k].long())
    out.index_put_(where, value[row, k].to(out.dtype))


def _sum_duplicates(ids: Tensor, beta: Tensor) -> Tensor:
    """[N, K]: for each entry, the sum of beta over the entries of its row with the same id."""
    if ids.shape[1] == 1:
        return beta
    ordered, order = ids.sort(dim=-1, stable=True)
    new = (ordered[:, 1:] != ordered[:, :-1]) | (ordered[:, 1:] < 0)
    if bool(new.all()):
        return beta
    rank = torch.nn.functional.pad(new.cumsum(-1), (1, 0))
    group = torch.empty_like(rank).scatter_(1, order, rank)
    return torch.zeros_like(beta).scatter_add_(1, group, beta).gather(1, group)


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


# Rows a few at a time.


def accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 data."""
    return torch.promote_types(x.dtype, torch.float32)


def joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views [1, B T, V] of tensors [B, T, V] where the strides allow it, else the tensors."""
    batch, length, _ = tensors[0].shape
    if batch < 2 or length < 2 or all(x.stride(0) == length * x.stride(1) for x in tensors):
        tensors = tuple(x.view(1, batch * length, x.shape[2]) for x in tensors)
    return tuple(x.detach() for x in tensors)


def words_at_once(x: Tensor) -> int:
    """Elements to have in a block of scratch."""
    return CPU_WORDS * torch.get_num_threads() if x.is_cpu else DEVICE_WORDS


def scratch(like: Tensor, blocks: int) -> list[Tensor]:
    """Blocks [rows, V] in the accumulator's dtype, of as many rows as are to be read at once."""
    batch, length, vocab = like.shape
    rows = max(1, min(batch * length, words_at_once(like) // max(vocab, 1)))
    return list(like.new_empty((blocks, rows, vocab), dtype=accumulator(like)).unbind())


def walk(
    x: Tensor,  # [B, T, V]
    active: Tensor | None,  # [N] bool; None: all rows
    size: int,
) -> Iterator[tuple[int, slice | Tensor, slice | Tensor]]:
    """The active rows, at most `size` at a time, as (b, rows in x[b], rows in [N] data)."""
    batch, length, _ = x.shape
    for b in range(batch):
        on = None if active is None else active[b * length : (b + 1) * length].nonzero()[:, 0]
        places = range(length) if on is None else on.tolist()
        for i in range(0, len(places), size):
            count = min(size, len(places) - i)
            first, end = places[i], places[i + count - 1] + 1
            if on is None or end - first == count:
                yield b, slice(first, end), slice(b * length + first, b * length + end)
            else:
                yield b, on[i : i + count], on[i : i + count] + b * length


def read(x: Tensor, b: int, rows: slice | Tensor, scale: float, block: Tensor) -> Tensor:
    """scale * x[b, rows], in the first rows of the block."""
    chosen = x[b, rows]
    z = block[: len(chosen)].copy_(chosen)
    return z if scale == 1 else z.mul_(scale)


def zero(x: Tensor, rows: Tensor) -> None:
    """Overwrite the rows [N] of x [B, T, V] that the mask selects with 0."""
    for b, some, _ in walk(x, rows, max(1, x.shape[1])):
        x[b, some] = 0
