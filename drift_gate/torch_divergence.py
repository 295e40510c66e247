"""The passes over both vocabularies without Triton: see `torch_passes`.

With a = log p of the student and b = log q of the teacher, row by row:

    reverse  L = sum p (a - b)                        dL/dz = p (a - b - L)
    forward  L = sum q (b - a)                        dL/dz = p - q
    jsd      L = beta sum q (b - log m)               dL/dz = p (h - sum p h)
               + (1 - beta) sum p (a - log m)         h = (1 - beta) (a - log m)
             with m = beta q + (1 - beta) p

On a CPU functions in C go over the rows, see `native`. Where they cannot, a few rows at a time pass
through scratch that stays in the cache; even "jsd" reads memory once.
Bytes that must move, with e and f bytes an element of student and teacher: N V (e + f) in
`divergence`, N V (2 e + f) in `divergence_grad`.
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
from .torch_passes import gather
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
    run = native.divergence if native.takes(student, teacher) else _divergence
    options = scale, teacher_scale, direction, beta, with_entropy
    rows = spread(run(student, teacher.detach(), valid, *options), valid)
    loss, top, log_sum, *_ = rows
    log_probs = torch.zeros_like(loss)
    if labels is not None:
        log_probs = gather(student, labels[:, None], valid, scale)[:, 0].sub_(top).sub_(log_sum)
    entropy = rows[6] if with_entropy else loss.new_empty(0)
    return loss, log_probs, torch.stack(rows[1:6]), entropy


def _divergence(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
) -> Tensor:
    """[7, valid rows]: loss, top and log_sum of student and teacher, centre, entropy."""
    size = _rows_at_once(student)
    scratch = new_scratch(student, BLOCKS[direction], size)
    sums = student.new_zeros((7, int(valid.sum())), dtype=accumulator(student))
    pieces: list[tuple[Piece, Piece]] = []
    counts: list[int] = []
    for (x, y), (mask,) in sequences((student, teacher), (valid,)):
        for n, (own, other) in chunks(mask, size, x, y):
            pieces.append((own, other))
            counts.append(n)
    outs = zip(*(torch.split(row, counts) for row in sums.unbind()), strict=True)
    tasks = [_Sums(*each, out) for each, out in zip(pieces, outs, strict=True)]

    def work(task: _Sums, worker: int) -> None:
        x, y, out = task.logits.read(), task.teacher.read(), task.out
        blocks = cut(scratch[worker], len(x))
        if direction == "jsd":
            _jsd_sums(x, y, beta, scale, teacher_scale, out, blocks, with_entropy)
            return
        reverse = direction == "reverse"
        models = (x, y, scale, teacher_scale) if reverse else (y, x, teacher_scale, scale)
        _kl_sums(*models, out, blocks, (1 - reverse) if with_entropy else None)

    share(tasks, work, len(scratch))
    if direction == "jsd":
        return _jsd_statistics(sums, beta)
    return _kl_statistics(sums, direction == "reverse")


class _Sums(NamedTuple):
    """A chunk of the forward."""

    logits: Piece  # [rows, V]
    teacher: Piece
    out: tuple[Tensor, ...]  # seven [rows]: tops, sums and moments, see below


class _Slopes(NamedTuple):
    """A chunk of the gradient; without logits 0."""

    out: Piece  # [rows, V]
    logits: Piece | None = None  # may be out
    teacher: Piece | None = None
    coefficients: tuple[Tensor, ...] = ()  # [rows, 1] each, of the direction's function


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
    student, gradient = logits.detach()[..., :vocab], out.detach()[..., :vocab]
    out.detach()[..., vocab:].zero_()
    active = valid & (upstream != 0)
    run = native.divergence_grad if native.takes(student, teacher) else _divergence_grad
    run(
        student, teacher.detach(), statistics, active, upstream, scale, teacher_scale, direction,
        beta, gradient,
    )  # fmt: skip


def _divergence_grad(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    active: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    out: Tensor,
) -> None:
    """The gradient in active rows, 0 in the others."""
    tensors = student, teacher, out
    size = _rows_at_once(tensors[0])
    scratch = new_scratch(tensors[0], 3, size)
    row_data = _coefficients(statistics, upstream * scale, direction, beta)
    tasks: list[_Slopes] = []
    for (x, t, y), (on, off, *each) in sequences(tensors, (active, ~active, *row_data)):
        tasks += [_Slopes(*pieces) for _, pieces in chunks(off, size, y)]
        for _, (out_piece, own, other, *rest) in chunks(on, size, y, x, t, *each):
            tasks.append(_Slopes(out_piece, own, other, tuple(c.read() for c in rest)))

    def work(task: _Slopes, worker: int) -> None:
        if task.logits is None or task.teacher is None:
            task.out.zero()
            return
        x, y = task.logits.read(), task.teacher.read()
        blocks = cut(scratch[worker], len(x))
        a, b = scaled(x, scale, blocks[0]), scaled(y, teacher_scale, blocks[1])
        if direction == "jsd":
            values = _jsd_slopes(a, b, blocks, beta, *task.coefficients)
        else:
            slopes = _reverse_slopes if direction == "reverse" else _forward_slopes
            values = slopes(a, b, blocks, *task.coefficients)
        task.out.write(values)

    share(tasks, work, len(scratch))


def _rows_at_once(student: Tensor) -> int:
    return max(1, rows_at_once(student) // 2)  # several blocks share the cache


# Sums over rows, [7, rows] for a chunk, and the statistics that they give: loss, top and log_sum of
# the student and of the teacher, centre, entropy.


def _kl_sums(
    u: Tensor,  # [rows, V], of the model whose masses weigh the sum
    v: Tensor,  # [rows, V], of the other
    u_scale: float,
    v_scale: float,
    out: tuple[Tensor, ...],  # [rows] each: tops, sums, the moment below, 0, sum exp(z) z of the
    #                           one of u and v whose entropy is wanted
    scratch: list[Tensor],  # three blocks [rows, V]
    entropy_of: int | None,  # 0: of u, 1: of v
) -> None:
    """sum exp(u), sum exp(v), and the moment sum exp(u) (u - v), of centred logits u and v."""
    top, other_top, total, other_total, moment, _, entropy = out
    a, b = scaled(u, u_scale, scratch[0]), scaled(v, v_scale, scratch[1])
    torch.amax(a, -1, out=top)
    torch.amax(b, -1, out=other_top)
    a, b = _centred(a, top, scratch[0]), _centred(b, other_top, scratch[1])
    if entropy_of is not None:
        z = (a, b)[entropy_of]
        torch.sum(torch.exp(z, out=scratch[2]).mul_(z), -1, out=entropy)
    torch.sum(torch.exp(b, out=scratch[2]), -1, out=other_total)
    missing = b.amin(-1) == LOWEST
    if bool(missing.any()):
        missing &= ((b == LOWEST) & (a > LOWEST)).any(-1)
    e = torch.exp(a, out=scratch[2])
    torch.sum(e, -1, out=total)
    torch.sum(torch.sub(a, b, out=scratch[1]).mul_(e), -1, out=moment)
    moment.masked_fill_(missing & ~moment.isnan(), torch.inf)


def _kl_statistics(sums: Tensor, reverse: bool) -> Tensor:
    """KL(u || v) and the rest from `_kl_sums`."""
    top, other_top, *others = sums.unbind()
    total, other_total, moment, _, entropy = map(wide, others)
    log_sum, other_log_sum = total.log(), other_total.log()
    loss = moment / total - log_sum + other_log_sum
    own, other = (top, log_sum), (other_top, other_log_sum)
    student, teacher = (own, other) if reverse else (other, own)
    mean = entropy / (total if reverse else other_total)
    rows = loss, *student, *teacher, loss, student[1] - mean
    return torch.stack([x.to(sums.dtype) for x in rows])


def _jsd_sums(
    x: Tensor,  # [rows, V] of the student
    y: Tensor,  # [rows, V] of the teacher
    beta: float,
    scale: float,
    teacher_scale: float,
    out: tuple[Tensor, ...],  # [rows] each: tops, sums, the two moments below, sum exp(a) a
    scratch: list[Tensor],  # five blocks [rows, V]
    with_entropy: bool,
) -> None:
    """sum exp(a), sum exp(b), and the moments sum exp(a) (a - n), sum exp(b) (b - n).

    For centred logits a and b; n = log m + log sum exp(a).
    """
    top, other_top, total, other_total, moment, other_moment, entropy = out
    a, b = scaled(x, scale, scratch[0]), scaled(y, teacher_scale, scratch[1])
    torch.amax(a, -1, out=top)
    torch.amax(b, -1, out=other_top)
    a, b = _centred(a, top, scratch[0]), _centred(b, other_top, scratch[1])
    e, other_e = torch.exp(a, out=scratch[2]), torch.exp(b, out=scratch[3])
    torch.sum(e, -1, out=total)
    torch.sum(other_e, -1, out=other_total)
    if with_entropy:
        torch.sum(torch.mul(e, a, out=scratch[4]), -1, out=entropy)
    ratio = _mass_ratio(_log_sum(total), _log_sum(other_total))
    n = _log_mixture(e, other_e, ratio[:, None], beta, scratch[4])
    torch.sum(a.sub_(n).mul_(e), -1, out=moment)
    torch.sum(b.sub_(n).mul_(other_e), -1, out=other_moment)


def _jsd_statistics(sums: Tensor, beta: float) -> Tensor:
    """Generalised JSD and the rest from `_jsd_sums`.

    The centre is KL(p || m) without the correction for how far the mixture is from summing to 1,
    which the terms that it is taken from lack, too: where one word has all the mass they cancel.
    """
    top, other_top, *others = sums.unbind()
    ratio = wide(_mass_ratio(_log_sum(others[0]), _log_sum(others[1])))
    total, other_total, moment, other_moment, entropy = map(wide, others)
    log_sum, other_log_sum = total.log(), other_total.log()
    # Of the mixture with its rounded ratio: the loss has its minimum there, and hardly feels the
    # rounding, if only the mixture sums to 1.
    log_mixed = torch.lerp(total, ratio * other_total, beta).log()
    centre = moment / total
    divergence = centre - log_sum + log_mixed
    other = other_moment / other_total - other_log_sum + log_mixed
    loss = (1 - beta) * divergence + beta * other
    rows = loss, top, log_sum, other_top, other_log_sum, centre, log_sum - entropy / total
    return torch.stack([x.to(sums.dtype) for x in rows])


def _log_sum(total: Tensor) -> Tensor:
    """As the statistics hold it."""
    return wide(total).log().to(total.dtype)


def _mass_ratio(log_sum: Tensor, other_log_sum: Tensor) -> Tensor:
    """Of a row's sums of exponentials: the same bits in the forward and in the gradient."""
    return (wide(log_sum) - other_log_sum).exp_().to(log_sum.dtype)


def _centred(z: Tensor, top: Tensor, block: Tensor) -> Tensor:
    """z less its maximum, at least LOWEST, in the block."""
    return torch.sub(z, top[:, None], out=block).clamp_(min=LOWEST)


def _log_mixture(e: Tensor, other_e: Tensor, ratio: Tensor, beta: float, block: Tensor) -> Tensor:
    """log((1 - beta) e + beta ratio other_e) in the block, finite where both are 0."""
    m = torch.lerp(e, torch.mul(other_e, ratio, out=block), beta, out=block)
    return m.clamp_(min=torch.finfo(m.dtype).tiny).log_()


# The gradient of a chunk, [rows, V] in the scratch. `a` and `b` are the logits, divided by the
# temperature; they may lie in its first two blocks, or be the caller's.


def _coefficients(
    statistics: Tensor, upstream: Tensor, direction: str, beta: float
) -> tuple[Tensor, ...]:
    """Row data [N, 1] of the direction's function below."""
    top, log_sum, teacher_top, teacher_log_sum, centre = statistics
    factor = (-log_sum).exp_().mul_(upstream)
    if direction == "jsd":
        ratio = _mass_ratio(log_sum, teacher_log_sum)
        columns = [factor.mul_(1 - beta), ratio, centre]
    elif direction == "forward":
        columns = [factor, (-teacher_log_sum).exp_().mul_(upstream)]
    else:
        # log p - log q - L = (a - b) - mean, of centred a and b
        mean = wide(centre) + (log_sum - teacher_log_sum)
        columns = [factor, mean.to(top.dtype)]
    return tuple(x[:, None] for x in (top, teacher_top, *columns))


def _reverse_slopes(
    a: Tensor,
    b: Tensor,
    scratch: list[Tensor],
    top: Tensor,
    teacher_top: Tensor,
    factor: Tensor,
    mean: Tensor,
) -> Tensor:
    """p (a - b - mean), of centred a and b"""
    a, b = _centred(a, top[:, 0], scratch[0]), _centred(b, teacher_top[:, 0], scratch[1])
    slope = torch.sub(a, b, out=scratch[1]).sub_(mean)
    return slope.mul_(a.exp_()).mul_(factor)


def _forward_slopes(
    a: Tensor,
    b: Tensor,
    scratch: list[Tensor],
    top: Tensor,
    teacher_top: Tensor,
    factor: Tensor,
    teacher_factor: Tensor,
) -> Tensor:
    """p - q, each with its factor"""
    q = torch.sub(b, teacher_top, out=scratch[1]).exp_()
    p = torch.sub(a, top, out=scratch[0]).exp_()
    return p.mul_(factor).addcmul_(q, teacher_factor, value=-1)


def _jsd_slopes(
    a: Tensor,
    b: Tensor,
    scratch: list[Tensor],
    beta: float,
    top: Tensor,
    teacher_top: Tensor,
    factor: Tensor,
    ratio: Tensor,
    centre: Tensor,
) -> Tensor:
    """p (log p - log m - centre), with log m as `_jsd_sums` has it"""
    a = _centred(a, top[:, 0], scratch[0])
    other_e = torch.sub(b, teacher_top, out=scratch[1]).exp_()
    e = torch.exp(a, out=scratch[2])
    n = _log_mixture(e, other_e, ratio, beta, scratch[1])
    return a.sub_(n).sub_(centre).mul_(e).mul_(factor)
