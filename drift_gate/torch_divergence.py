"""The passes over both vocabularies without Triton: see `torch_passes`.

With a = log p of the student and b = log q of the teacher, row by row:

    reverse  L = sum p (a - b)                        dL/dz = p (a - b - L)
    forward  L = sum q (b - a)                        dL/dz = p - q
    jsd      L = beta sum q (b - log m)               dL/dz = p (h - sum p h)
               + (1 - beta) sum p (a - log m)         h = (1 - beta) (a - log m)
             with m = beta q + (1 - beta) p

On a CPU functions in C go over the rows, see `native`. Where they cannot, a few rows at a time pass
through scratch that stays in the cache; even "jsd" reads memory once. As in `torch_passes`, on the
CPU exponentials are not shifted by the maximum where that is safe. There a chunk is also first
taken to hold no infinity, and computed again with care where the result shows that it does.
Bytes that must move, with e and f bytes an element of student and teacher: N V (e + f) in
`divergence`, N V (2 e + f) in `divergence_grad`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .row_chunks import (
    SAFE_MAXIMUM,
    Piece,
    accumulator,
    chunks,
    cut,
    new_scratch,
    row_factors,
    rows_at_once,
    scaled,
    sequences,
    spread,
    within,
)
from .threads import share
from .torch_passes import gather
from .torch_rows import wide

LOWEST = -1e30  # stands for -inf: its exponential is 0, and 0 times it is 0 and not NaN
NEAR = 4.0  # nats between the tops that cost no more digits than the logarithms do
BLOCKS = {"reverse": 3, "forward": 3, "jsd": 5}  # of scratch for a thread
# How the sums of a row were taken: exponentials as they are, and the moment without the tops'
# difference where they are near; or exponentials shifted by the tops.
NEAR_BY, FAR, SHIFTED = 0, 1, 2


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
    statistics = student.new_zeros((7, int(valid.sum())), dtype=accumulator(student))
    pieces: list[tuple[Piece, Piece]] = []
    counts: list[int] = []
    for (x, y), (mask,) in sequences((student, teacher), (valid,)):
        for n, (own, other) in chunks(mask, size, x, y):
            pieces.append((own, other))
            counts.append(n)
    outs = zip(*(torch.split(row, counts) for row in statistics.unbind()), strict=True)
    tasks = [_Sums(*each, out) for each, out in zip(pieces, outs, strict=True)]
    careful = with_entropy or not student.is_cpu

    def work(task: _Sums, worker: int) -> None:
        x, y, out = task.logits.read(), task.teacher.read(), task.out
        blocks = cut(scratch[worker], len(x))
        if direction == "jsd":
            _jsd_sums(x, y, beta, scale, teacher_scale, out, blocks, with_entropy, careful)
            return
        reverse = direction == "reverse"
        models = (x, y, scale, teacher_scale) if reverse else (y, x, teacher_scale, scale)
        _kl_sums(*models, out, blocks, (1 - reverse) if with_entropy else None, careful)

    share(tasks, work, len(scratch))
    if not careful:
        careful = True
        fine = _fine(statistics, direction == "jsd")
        if not bool(fine.all()):
            parts = zip(tasks, torch.split(fine, counts), strict=True)
            share([task for task, rows in parts if not rows.all()], work, len(scratch))
    if direction == "jsd":
        return _jsd_statistics(statistics, beta)
    return _kl_statistics(statistics, direction == "reverse")


class _Sums(NamedTuple):
    """A chunk of the forward."""

    logits: Piece  # [rows, V]
    teacher: Piece
    out: tuple[Tensor, ...]  # seven [rows]: see the sums below


class _Slopes(NamedTuple):
    """A chunk of the gradient; without logits 0."""

    out: Piece  # [rows, V]
    logits: Piece | None = None  # may be out
    teacher: Piece | None = None
    coefficients: tuple[Any, ...] = ()  # [rows, 1] or None each, of the direction's function


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
    row_data = _coefficients(statistics, upstream * scale, active, direction, beta)
    tasks: list[_Slopes] = []
    for (x, t, y), (on, off, *each) in sequences(tensors, (active, ~active, *row_data)):
        tasks += [_Slopes(*pieces) for _, pieces in chunks(off, size, y)]
        for _, (out_piece, own, other, *rest) in chunks(on, size, y, x, t, *each):
            columns = tuple(None if c is None else c.read() for c in rest)
            tasks.append(_Slopes(out_piece, own, other, columns))

    def work(task: _Slopes, worker: int) -> None:
        if task.logits is None or task.teacher is None:
            task.out.zero()
            return
        x, y = task.logits.read(), task.teacher.read()
        blocks = cut(scratch[worker], len(x))
        columns = task.coefficients

        def slopes(careful: bool) -> Tensor:
            a, b = scaled(x, scale, blocks[0]), scaled(y, teacher_scale, blocks[1])
            if direction == "reverse":
                return _reverse_slopes(a, b, blocks, careful, *columns)
            if direction == "forward":
                return _forward_slopes(a, b, blocks, *columns)
            return _jsd_slopes(a, b, blocks, careful, beta, *columns)

        values = slopes(careful=not x.is_cpu)
        if x.is_cpu and direction != "forward" and not math.isfinite(values.sum().item()):
            values = slopes(careful=True)
        task.out.write(values)

    share(tasks, work, len(scratch))


def _rows_at_once(student: Tensor) -> int:
    return max(1, rows_at_once(student) // 2)  # several blocks share the cache


# Sums over rows, [7, rows] for a chunk, and the statistics that they give: loss, top and log_sum of
# the student and of the teacher, centre, entropy.


def _fine(sums: Tensor, jsd: bool) -> Tensor:
    """Whether rows [n] of sums [7, n] taken without care are right."""
    moments = sums[4:6] if jsd else sums[4:5]
    fine = moments.isfinite().all(0)
    return fine if jsd else fine | (sums[6] == SHIFTED)


def _kl_sums(
    u: Tensor,  # [rows, V], of the model whose masses weigh the sum
    v: Tensor,  # [rows, V], of the other
    u_scale: float,
    v_scale: float,
    out: tuple[Tensor, ...],  # seven [rows]: tops, sums and moment below, sum exp(z) z of the
    #                           centred u or v, how the sums were taken
    scratch: list[Tensor],  # three blocks [rows, V]
    entropy_of: int | None,  # 0: of u, 1: of v
    careful: bool,
) -> None:
    """sum exp(u), sum exp(v), and the moment sum exp(u) ((u - top) - (v - top)).

    Without care exponentials are not shifted, where that is safe; see `_fine` for infinities.
    """
    top, other_top = out[:2]
    a, b = scaled(u, u_scale, scratch[0]), scaled(v, v_scale, scratch[1])
    torch.amax(a, -1, out=top)
    torch.amax(b, -1, out=other_top)
    if careful or not within(SAFE_MAXIMUM, top, other_top):
        _shifted_kl_sums(a, b, out, scratch, entropy_of)
    else:
        _plain_kl_sums(a, b, out, scratch)


def _plain_kl_sums(a: Tensor, b: Tensor, out: tuple[Tensor, ...], scratch: list[Tensor]) -> None:
    top, other_top, total, other_total, moment, _, how = out
    torch.sum(torch.exp(b, out=scratch[2]), -1, out=other_total)
    difference = torch.sub(a, b, out=scratch[1])
    offset = top - other_top
    if not within(NEAR, offset):
        how.fill_(FAR)
        difference.sub_(offset[:, None])
    e = torch.exp(a, out=scratch[0])
    torch.sum(e, -1, out=total)
    torch.sum(difference.mul_(e), -1, out=moment)


def _shifted_kl_sums(
    a: Tensor, b: Tensor, out: tuple[Tensor, ...], scratch: list[Tensor], entropy_of: int | None
) -> None:
    top, other_top, total, other_total, moment, entropy, how = out
    how.fill_(SHIFTED)
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
    top, other_top, total, other_total, moment, entropy, how = sums.unbind()
    total, other_total, moment = wide(total), wide(other_total), wide(moment)
    moment = torch.where(how == NEAR_BY, moment - (wide(top) - other_top) * total, moment)
    # Divided by the exponential's own value at the maximum, which cancels its rounding.
    unit, other_unit = (wide(x.exp().masked_fill_(how == SHIFTED, 1)) for x in (top, other_top))
    total, other_total, moment = total / unit, other_total / other_unit, moment / unit
    log_sum, other_log_sum = total.log(), other_total.log()
    loss = moment / total - log_sum + other_log_sum
    own, other = (top, log_sum), (other_top, other_log_sum)
    student, teacher = (own, other) if reverse else (other, own)
    mean = wide(entropy) / (total if reverse else other_total)
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
    careful: bool,
) -> None:
    """sum exp(a), sum exp(b), and the moments sum exp(a) (a - n), sum exp(b) (b - n).

    For centred logits a and b; n = log m + log sum exp(a). Without care not finite where one is
    infinite.
    """
    top, other_top, total, other_total, moment, other_moment, entropy = out
    a, b = scaled(x, scale, scratch[0]), scaled(y, teacher_scale, scratch[1])
    torch.amax(a, -1, out=top)
    torch.amax(b, -1, out=other_top)
    a = _centred(a, top, scratch[0], careful)
    b = _centred(b, other_top, scratch[1], careful)
    e, other_e = torch.exp(a, out=scratch[2]), torch.exp(b, out=scratch[3])
    torch.sum(e, -1, out=total)
    torch.sum(other_e, -1, out=other_total)
    if with_entropy:
        torch.sum(torch.mul(e, a, out=scratch[4]), -1, out=entropy)
    ratio = _mass_ratio(_log_sum(total), _log_sum(other_total))
    n = _log_mixture(e, other_e, ratio[:, None], beta, scratch[4], careful)
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


def _centred(z: Tensor, top: Tensor, block: Tensor, careful: bool = True) -> Tensor:
    """z less its maximum, in the block; with care at least LOWEST."""
    centred = torch.sub(z, top[:, None], out=block)
    return centred.clamp_(min=LOWEST) if careful else centred


def _log_mixture(
    e: Tensor, other_e: Tensor, ratio: Tensor, beta: float, block: Tensor, careful: bool
) -> Tensor:
    """log((1 - beta) e + beta ratio other_e) in the block; with care finite where both are 0."""
    m = torch.lerp(e, torch.mul(other_e, ratio, out=block), beta, out=block)
    return (m.clamp_(min=torch.finfo(m.dtype).tiny) if careful else m).log_()


# The gradient of a chunk, [rows, V] in the scratch. `a` and `b` are the logits, divided by the
# temperature; they may lie in its first two blocks, or be the caller's.


def _coefficients(
    statistics: Tensor, upstream: Tensor, active: Tensor, direction: str, beta: float
) -> tuple[Tensor | None, ...]:
    """Row data [N, 1] of the direction's function below."""
    top, log_sum, teacher_top, teacher_log_sum, centre = statistics
    if direction == "jsd":
        factor = (-log_sum).exp_().mul_(upstream).mul_(1 - beta)
        ratio = _mass_ratio(log_sum, teacher_log_sum)
        return tuple(x[:, None] for x in (factor, top, teacher_top, ratio, centre))
    own = row_factors(top, log_sum, upstream, active, 1.0)
    if direction == "forward":
        return *own, *row_factors(teacher_top, teacher_log_sum, upstream, active, 1.0)
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
    scratch: list[Tensor],
    careful: bool,
    shift: Tensor | None,
    factor: Tensor,
    teacher_shift: Tensor | None,
    mean: Tensor,
) -> Tensor:
    """p (a - b - mean), of a and b less their shifts"""
    if shift is not None:
        a = torch.sub(a, shift, out=scratch[0])
    if teacher_shift is not None:
        b = torch.sub(b, teacher_shift, out=scratch[1])
    if careful:
        a = torch.clamp(a, min=LOWEST, out=scratch[0])
        b = torch.clamp(b, min=LOWEST, out=scratch[1])
    slope = torch.sub(a, b, out=scratch[1]).sub_(mean)
    return slope.mul_(torch.exp(a, out=scratch[0])).mul_(factor)


def _forward_slopes(
    a: Tensor,
    b: Tensor,
    scratch: list[Tensor],
    shift: Tensor | None,
    factor: Tensor,
    teacher_shift: Tensor | None,
    teacher_factor: Tensor,
) -> Tensor:
    """p - q, each with its factor"""
    q = _shifted_exp(b, teacher_shift, scratch[1])
    return _shifted_exp(a, shift, scratch[0]).mul_(factor).addcmul_(q, teacher_factor, value=-1)


def _jsd_slopes(
    a: Tensor,
    b: Tensor,
    scratch: list[Tensor],
    careful: bool,
    beta: float,
    factor: Tensor,
    top: Tensor,
    teacher_top: Tensor,
    ratio: Tensor,
    centre: Tensor,
) -> Tensor:
    """p (log p - log m - centre), with log m as `_jsd_sums` has it"""
    a = _centred(a, top[:, 0], scratch[0], careful)
    other_e = torch.exp(torch.sub(b, teacher_top, out=scratch[1]), out=scratch[1])
    e = torch.exp(a, out=scratch[2])
    n = _log_mixture(e, other_e, ratio, beta, scratch[1], careful)
    return a.sub_(n).sub_(centre).mul_(e).mul_(factor)
