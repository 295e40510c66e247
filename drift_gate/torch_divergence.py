"""The passes over both vocabularies in chunks of plain PyTorch: see `torch_passes`.

With a = log p of the student and b = log q of the teacher, row by row:

    reverse  L = sum p (a - b)                        dL/dz = p (a - b - L)
    forward  L = sum q (b - a)                        dL/dz = p - q
    jsd      L = beta sum q (b - log m)               dL/dz = p (h - sum p h)
               + (1 - beta) sum p (a - log m)         h = (1 - beta) (a - log m)
             with m = beta q + (1 - beta) p

A few rows at a time pass through scratch that stays in the cache; even "jsd" reads memory once. As
in `torch_passes`, on the CPU exponentials are not shifted by the maximum where that is safe.
Bytes that must move, with e and f bytes an element of student and teacher: N V (e + f) in
`divergence`, N V (2 e + f) in `divergence_grad`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .threads import share
from .torch_passes import (
    SAFE_MAXIMUM,
    Rows,
    _accumulator,
    _chunks,
    _norm,
    _row_factors,
    _scaled,
    _sequences,
    _spread,
    _store,
    _take,
    _task_rows,
    _workers,
    _zero,
    gather,
)
from .torch_rows import wide

LOWEST = -1e30  # stands for -inf: its exponential is 0, and 0 times it is 0 and not NaN
BLOCKS = {"reverse": 3, "forward": 3, "jsd": 5}  # of scratch for a thread


@torch.no_grad()
def divergence(
    logits: Tensor,  # [B, T, V], any float dtype, last dimension contiguous, any outer strides
    teacher: Tensor,  # [B, T, U], U <= V, likewise
    labels: Tensor | None,  # [N] int64 or int32, N = B * T
    valid: Tensor,  # [N] bool
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [N], log_probs [N], statistics [5, N], entropy [N] or [0]).

    All are float32, or float64 for float64 logits. Rows that are not valid give 0. A row with a
    NaN or +inf, or all -inf, gives NaN. Logits of -1e30 and less count as -inf.

    Raises ValueError for a label outside [0, U) in a valid row on the CPU; elsewhere it gives NaN.
    """
    student = logits.detach()[..., : teacher.shape[2]]
    size, scratch = _scratch(student, direction)
    tasks: list[tuple[int, Tensor, Tensor, Rows]] = []
    for (x, y), (mask,) in _sequences((student, teacher.detach()), (valid,)):
        chunks = _chunks(mask, len(x), size)
        tasks += [(len(tasks) + i, x, y, rows) for i, rows in enumerate(chunks)]
    parts = [scratch.new_zeros((7 if direction == "jsd" else 6, 0))] * (len(tasks) + 1)

    def work(task: tuple[int, Tensor, Tensor, Rows], worker: int) -> None:
        i, *tensors, rows = task
        x, y = (_take(t, rows) for t in tensors)
        block = scratch[worker, :, : len(x)]
        if direction == "jsd":
            parts[i] = _jsd_statistics(x, y, beta, scale, teacher_scale, block, with_entropy)
        elif direction == "reverse":
            parts[i] = _kl_sums(x, y, scale, teacher_scale, block, 0 if with_entropy else None)
        else:
            parts[i] = _kl_sums(y, x, teacher_scale, scale, block, 1 if with_entropy else None)

    share(tasks, work, len(scratch))
    rows = torch.cat(parts, 1)
    if direction != "jsd":
        rows = _kl_statistics(rows, direction == "reverse")
    loss, centre, top, log_sum, teacher_top, teacher_log_sum, entropy = _spread(rows, valid)
    log_probs = torch.zeros_like(loss)
    if labels is not None:
        log_probs = gather(student, labels[:, None], valid, scale)[:, 0].sub_(top).sub_(log_sum)
    statistics = torch.stack((top, log_sum, teacher_top, teacher_log_sum, centre))
    return loss, log_probs, statistics, entropy if with_entropy else entropy.new_empty(0)


@torch.no_grad()
def divergence_grad(
    logits: Tensor,  # [B, T, V], as given to divergence
    teacher: Tensor,  # [B, T, U]
    statistics: Tensor,  # [5, N], from divergence
    valid: Tensor,  # [N] bool
    upstream: Tensor,  # [N]
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    out: Tensor,  # [B, T, V], dtype of the logits, any outer strides; may be the logits
) -> None:
    """Write upstream * d loss / d logits into `out`, computed in float32 (float64), rounded once.

    Rows that are not valid, or whose upstream is 0, become 0 and are not read.
    """
    vocab = teacher.shape[2]
    tensors = logits.detach()[..., :vocab], teacher.detach(), out.detach()[..., :vocab]
    out.detach()[..., vocab:].zero_()
    active = valid & (upstream != 0)
    size, scratch = _scratch(tensors[0], direction)
    coefficients = _coefficients(statistics, upstream * scale, active, direction, beta)
    tasks: list[tuple[Any, ...]] = []
    for (x, t, y), (on, off, *each) in _sequences(tensors, (active, ~active, *coefficients)):
        tasks += [(y, rows, None) for rows in _chunks(off, len(x), size)]
        tasks += [(y, rows, x, t, each) for rows in _chunks(on, len(x), size)]

    def work(task: tuple[Any, ...], worker: int) -> None:
        y, rows, *sources = task
        if sources[0] is None:
            _zero(y, rows)
            return
        block = scratch[worker, :, : len(_take(active, rows))]
        a = _scaled(_take(sources[0], rows), scale, block[0])
        b = _scaled(_take(sources[1], rows), teacher_scale, block[1])
        row_data: list[Any] = [None if s is None else _take(s, rows) for s in sources[2]]
        values: Tensor
        factor: Tensor | None
        if direction == "reverse":
            values, factor = _reverse_slopes(a, b, block, *row_data)
        elif direction == "forward":
            values, factor = _forward_slopes(a, b, block, *row_data)
        else:
            values, factor = _jsd_slopes(a, b, block, beta, *row_data)
        if factor is not None:
            _store(y, rows, values, factor)
        elif isinstance(rows, slice):
            y[rows].copy_(values)
        else:
            y.index_copy_(0, rows, values.to(y.dtype))

    share(tasks, work, len(scratch))


def _scratch(student: Tensor, direction: str) -> tuple[int, Tensor]:
    """How many rows a thread takes at once, and [threads, BLOCKS, rows, V] scratch."""
    size = max(1, _task_rows(student) // 2)  # several blocks share the cache
    shape = _workers(student), BLOCKS[direction], size, student.shape[2]
    return size, student.new_empty(shape, dtype=_accumulator(student))


# Statistics of rows: [7, rows] of loss, centre, top and log_sum of either, entropy.


def _centred(z: Tensor, top: Tensor, scratch: Tensor) -> Tensor:
    """z less its maximum, and at least LOWEST, in the scratch."""
    return torch.sub(z, top[:, None], out=scratch).clamp_(min=LOWEST)


def _unshifted_sums(u: Tensor, v: Tensor, tops: Tensor, scratch: Tensor) -> Tensor | None:
    """`_shifted_sums` of logits that are not centred; None where a word has no mass."""
    other_total = torch.exp(v, out=scratch[2]).sum(-1)
    e = torch.exp(u, out=scratch[2])
    total = e.sum(-1)
    difference = torch.sub(u, v, out=scratch[1]).sub_((tops[0] - tops[1])[:, None])
    moment = difference.mul_(e).sum(-1)
    if not math.isfinite(float(moment.sum())):
        return None
    # Divided by the exponential's own value at the maximum, which cancels its rounding.
    units = tops.exp()
    return torch.stack((total, other_total, moment)).div_(units[[0, 1, 0]])


def _shifted_sums(u: Tensor, v: Tensor, e: Tensor) -> Tensor:
    """[3, rows]: sum exp(u), sum exp(v) and sum exp(u) (u - v), of centred u and v [rows, V].

    The last is infinite where v lacks a word of u. Overwrites v; e is scratch.
    """
    other_total = torch.exp(v, out=e).sum(-1)
    missing = v.amin(-1) == LOWEST
    if bool(missing.any()):
        missing &= ((v == LOWEST) & (u > LOWEST)).any(-1)
    total = torch.exp(u, out=e).sum(-1)
    moment = torch.sub(u, v, out=v).mul_(e).sum(-1)
    moment.masked_fill_(missing & ~moment.isnan(), torch.inf)
    return torch.stack((total, other_total, moment))


def _kl_sums(
    u: Tensor,  # [rows, V], of the model whose masses weigh the sum
    v: Tensor,  # [rows, V], of the other
    u_scale: float,
    v_scale: float,
    scratch: Tensor,  # [3, rows, V]
    entropy_of: int | None,  # 0: of u, 1: of v
) -> Tensor:
    """[6, rows]: tops of u and v, `_shifted_sums`, and sum exp(z) z of the centred u or v."""
    a, b = _scaled(u, u_scale, scratch[0]), _scaled(v, v_scale, scratch[1])
    tops = torch.stack((a.amax(-1), b.amax(-1)))
    sums = None
    if u.is_cpu and entropy_of is None and _norm(tops) <= SAFE_MAXIMUM:
        sums = _unshifted_sums(a, b, tops, scratch)
    entropy = tops[:1]
    if sums is None:
        a = _centred(_scaled(u, u_scale, scratch[0]), tops[0], scratch[0])
        b = _centred(_scaled(v, v_scale, scratch[1]), tops[1], scratch[1])
        if entropy_of is not None:
            z = (a, b)[entropy_of]
            entropy = torch.exp(z, out=scratch[2]).mul_(z).sum(-1)[None]
        sums = _shifted_sums(a, b, scratch[2])
    return torch.cat((tops, sums, entropy))


def _kl_statistics(sums: Tensor, reverse: bool) -> Tensor:
    """KL(u || v) and the rest from `_kl_sums`."""
    top, other_top, total, other_total, moment, entropy = sums.unbind()
    log_sum, other_log_sum = wide(total).log(), wide(other_total).log()
    loss = wide(moment) / wide(total) - log_sum + other_log_sum
    own, other = (top, log_sum), (other_top, other_log_sum)
    student, teacher = (own, other) if reverse else (other, own)
    mean = wide(entropy) / wide(total if reverse else other_total)
    rows = loss, loss, *student, *teacher, student[1] - mean
    return torch.stack([x.to(sums.dtype) for x in rows])


def _jsd_statistics(
    x: Tensor,  # [rows, V] of the student
    y: Tensor,  # [rows, V] of the teacher
    beta: float,
    scale: float,
    teacher_scale: float,
    scratch: Tensor,  # [5, rows, V]
    with_entropy: bool,
) -> Tensor:
    """Generalised JSD; the centre is KL(p || m)."""
    masses, log_masses, tops, log_sums = [], [], [], []
    for source, factor, z, e in (
        (x, scale, scratch[0], scratch[2]),
        (y, teacher_scale, scratch[1], scratch[3]),
    ):
        scaled = _scaled(source, factor, z)
        tops.append(scaled.amax(-1))
        total = torch.exp(_centred(scaled, tops[-1], z), out=e).sum(-1)
        log_sums.append(wide(total).log().to(total.dtype))
        masses.append(e.div_(total[:, None]))
        log_masses.append(z.sub_(log_sums[-1][:, None]))
    (p, q), (a, b), m = masses, log_masses, scratch[4]
    entropy = -torch.mul(p, a, out=m).sum(-1) if with_entropy else tops[0]
    log_m = _log_mixture(p, q, beta, m)
    centre = a.sub_(log_m).mul_(p).sum(-1)
    loss = (1 - beta) * centre + beta * b.sub_(log_m).mul_(q).sum(-1)
    return torch.stack((loss, centre, tops[0], log_sums[0], tops[1], log_sums[1], entropy))


def _log_mixture(p: Tensor, q: Tensor, beta: float, out: Tensor) -> Tensor:
    """log(beta q + (1 - beta) p), finite where both are 0."""
    return torch.lerp(p, q, beta, out=out).clamp_(min=torch.finfo(p.dtype).tiny).log_()


# The gradient of a chunk: values [rows, V] and their factor [rows, 1]. `a` and `b` are the logits,
# divided by the temperature, and may lie in the first two blocks of the scratch.


def _coefficients(
    statistics: Tensor, upstream: Tensor, active: Tensor, direction: str, beta: float
) -> tuple[Tensor | None, ...]:
    """Row data [N, 1] of the direction's function below."""
    top, log_sum, teacher_top, teacher_log_sum, centre = statistics
    if direction == "jsd":
        factor = upstream * (1 - beta)
        return tuple(x[:, None] for x in (factor, *statistics))
    own = _row_factors(top, log_sum, upstream, active, 1.0)
    if direction == "forward":
        return *own, *_row_factors(teacher_top, teacher_log_sum, upstream, active, 1.0)
    # log p - log q - L = (a - b) - mean, with the difference of the logsumexps in the mean. Maxima
    # that are large, and differ, leave a and b before that: a - b would lose digits.
    mean = wide(centre) + (log_sum - teacher_log_sum)
    shift, factor = own
    teacher_shift = None
    if shift is None:
        mean = mean + wide(top)
    if bool(((teacher_top.abs() <= SAFE_MAXIMUM) | ~active).all()):
        mean = mean - wide(teacher_top)
    else:
        teacher_shift = teacher_top[:, None]
    return shift, factor, teacher_shift, mean.to(top.dtype)[:, None]


def _shifted_exp(z: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    return torch.exp(z if shift is None else torch.sub(z, shift, out=out), out=out)


def _reverse_slopes(
    a: Tensor,
    b: Tensor,
    scratch: Tensor,
    shift: Tensor | None,
    factor: Tensor,
    teacher_shift: Tensor | None,
    mean: Tensor,
) -> tuple[Tensor, Tensor]:
    """p (a - b - mean), of a and b less their shifts"""
    if shift is not None:
        a = torch.sub(a, shift, out=scratch[0])
    if teacher_shift is not None:
        b = torch.sub(b, teacher_shift, out=scratch[1])
    if not bool(a.amin() > LOWEST):
        a = torch.clamp(a, min=LOWEST, out=scratch[0])
        b = torch.clamp(b, min=LOWEST, out=scratch[1])
    slope = torch.sub(a, b, out=scratch[1]).sub_(mean)
    return slope.mul_(torch.exp(a, out=scratch[0])), factor


def _forward_slopes(
    a: Tensor,
    b: Tensor,
    scratch: Tensor,
    shift: Tensor | None,
    factor: Tensor,
    teacher_shift: Tensor | None,
    teacher_factor: Tensor,
) -> tuple[Tensor, None]:
    """p - q, each with its factor"""
    q = _shifted_exp(b, teacher_shift, scratch[1])
    slope = _shifted_exp(a, shift, scratch[0]).mul_(factor).addcmul_(q, teacher_factor, value=-1)
    return slope, None


def _jsd_slopes(
    a: Tensor,
    b: Tensor,
    scratch: Tensor,
    beta: float,
    factor: Tensor,
    top: Tensor,
    log_sum: Tensor,
    teacher_top: Tensor,
    teacher_log_sum: Tensor,
    centre: Tensor,
) -> tuple[Tensor, Tensor]:
    """p (log p - log m - centre)"""
    log_p = torch.sub(a, top, out=scratch[0]).clamp_(min=LOWEST).sub_(log_sum)
    q = torch.sub(b, teacher_top, out=scratch[1]).sub_(teacher_log_sum).exp_()
    p = torch.exp(log_p, out=scratch[2])
    slope = log_p.sub_(_log_mixture(p, q, beta, scratch[3])).sub_(centre)
    return slope.mul_(p), factor
