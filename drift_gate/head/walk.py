"""The dense `linear_` losses in one pass over the rows: gradients are formed in the forward.

Where all rows fit one chunk, their log-probs come first, then gates and unit mean, then the
gradient, which is final. Else the rows are walked in chunks of whole blocks of the gate. A chunk is
then what a micro-batch is to a step: its weights u have unit mean over the chunk, and the mean gate
of the chunk relative to the first one's takes them to common units; the number that completes them
multiplies the sums at the end. Three products in all. Where the gates cannot be formed chunk by
chunk (a block longer than a chunk, unit mean over each sequence, a ratio over more than a token,
sequences cut over ranks) the log-probs of all rows come first, and the logits are made twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.rows import RowInputs
from ..passes.rules import (
    COEFFICIENT,
    GIVEN,
    NO_GATE,
    SLOPE,
    WEIGHT,
    Finished,
    RowData,
)
from .check import HeadInputs
from .chunk_losses import ChunkLoss
from .chunks import Rows, all_rows, chunks, cut, marks_of, put, regular_ends, take
from .sums import Needs, Sums, plan

FAR = 1.0  # nats by which a chunk's mean gate may exceed the units of the sums


class Work(NamedTuple):
    """What a walk is over."""

    run: Any  # the backend's passes
    backend: str
    head: HeadInputs
    rows: RowInputs
    valid: Tensor  # [N]
    whole: bool  # whether no row is left out, which the host knows without a read
    needs: Needs
    holes: bool = False  # whole, but for rows that the device alone knows not to be valid


class Walked(NamedTuple):
    """What a walk has found: the loss, and gradients = factor * sums."""

    done: Finished
    sums: tuple[Tensor, Tensor, Tensor, Tensor]  # see `sums.Plan`
    factor: Tensor  # []


Finish = Callable[[list[Tensor]], Finished]


def walk(
    work: Work,
    loss: ChunkLoss,
    finish: Finish,
    *,
    per_unit: bool = False,
    known: Tensor | None = None,
) -> Walked:
    """Go through the rows; `finish` makes the loss of the results of all of them.

    per_unit: a position's loss is a function of other rows' log-probs too. known [N]: log-probs of
    the labels, of which the gates are to be.
    """
    rows, size = work.rows, work.head.rule.chunk_size
    if rows.per_token or not any(work.needs):
        for at in _Parts(work).any_rows():
            loss.values(at)
        done = finish(loss.results.all())
        nothing = plan(work.head, Needs(False, False, False), False).empty(work.valid.device)
        return Walked(done, nothing, torch.ones_like(done.loss))
    many = len(work.valid) > size
    splits = splits_by_chunk(rows, per_unit)
    sums = Sums(work.head, work.needs, splits, work.backend)
    leaders = block_leaders(work) if many and splits else None
    cuts = _Parts(work, leaders)
    parts = cuts.any_rows() if leaders is None else cuts.whole_blocks()
    if parts is not None and len(parts) <= 1:
        for at in parts:
            loss.values(at)
        done = finish(loss.results.all())
        return _with_known_weights(work, loss, sums, done, parts, again=False)
    if splits and parts is not None:
        return _deferred(work, loss, sums, finish, parts, leaders, known)
    parts = cuts.any_rows()
    for at in parts:
        loss.values(at)
    return _with_known_weights(work, loss, sums, finish(loss.results.all()), parts, again=True)


def splits_by_chunk(rows: RowInputs, per_unit: bool) -> bool:
    """Whether the gates can be formed chunk by chunk, up to a number known at the end."""
    return rows.gate.normalize != "sequence" and not rows.context and not per_unit


def gradients_anew(work: Work, loss: ChunkLoss, upstream: Tensor) -> tuple[Tensor, ...]:
    """The sums of a loss whose rows' gradients [N] are known in the backward alone.

    The host reads which rows have one: the others cost nothing.
    """
    sums = Sums(work.head, work.needs, False, work.backend)
    for at in chunks(work.valid & (upstream != 0), work.head.rule.chunk_size) or []:
        loss.values(at)
        sums.add(at, take(work.head.hidden, at), loss.gradient(take(upstream, at), True))
    return sums.finish()


class _Parts:
    """The chunks of a walk, for which the host reads once at most."""

    def __init__(self, work: Work, leaders: Tensor | None = None) -> None:
        self.work, self.leaders, self.size = work, leaders, work.head.rule.chunk_size
        self.marks: Any = None  # the array that was read

    def any_rows(self) -> Any:
        """Chunks of the valid rows, wherever blocks end."""
        if self.work.whole:
            return all_rows(len(self.work.valid), self.size)
        if self.marks is None:
            return chunks(self.work.valid, self.size)
        return cut(self.work.valid, self.marks, self.size, False)

    def whole_blocks(self) -> Any:
        """Chunks that end where blocks do; None where a block is too long for that."""
        work, rows, n = self.work, self.work.rows, len(self.work.valid)
        known = work.whole and not work.holes and rows.cu_seqlens is None
        if known and rows.gate.granularity != "span":
            block = rows.gate.block_size if rows.gate.granularity == "block" else rows.length
            return all_rows(n, self.size, regular_ends(n, rows.length, block))
        self.marks = marks_of(work.valid, self.leaders)
        return cut(work.valid, self.marks, self.size, True)


def block_leaders(work: Work) -> Tensor | None:
    """First valid row of each row's block, [N]; None where every row is one."""
    rows = work.rows
    if rows.gate.normalize in ("off", "given") or rows.gate.granularity == "token":
        return None
    zeros = work.head.hidden.new_zeros(len(work.valid), dtype=torch.float32)
    data = RowData(work.valid, zeros, zeros, rows.spans, rows.cu_seqlens, rows.length)
    gate = rows.gate._replace(normalize="none", sample_every=1)
    first: Tensor = work.run.weigh(data, gate).first
    return first


def _with_known_weights(
    work: Work, loss: ChunkLoss, sums: Sums, done: Finished, parts: list[Rows], again: bool
) -> Walked:
    """Gradients of rows whose weights are known; `again`: their logits are no more."""
    upstream = done.table[SLOPE] * done.table[COEFFICIENT]
    factor = torch.ones_like(done.loss)
    if work.head.weight.dtype == torch.float16:  # whose range is short
        factor = _largest(upstream)
        upstream = upstream / factor
    for at in parts:
        if again:
            loss.values(at)
        _add(work, sums, at, loss.gradient(take(upstream, at), True))
    return Walked(done, sums.finish(), factor)


def _deferred(
    work: Work,
    loss: ChunkLoss,
    sums: Sums,
    finish: Finish,
    parts: list[Rows],
    leaders: Tensor | None,
    known: Tensor | None,
) -> Walked:
    """Gradients of chunks whose weights lack the unit mean of the batch."""
    rows = work.rows
    units = _Units(work, leaders)
    coefficient = _coefficients(work)
    used = torch.zeros_like(coefficient)  # what each row was weighed by
    for at in parts:
        now = loss.values(at)
        gates, factor = units.of(at, now if known is None else take(known, at))
        weights = gates * take(coefficient, at)
        if factor is not None:
            sums.multiply(factor)
            used *= factor.to(used.dtype)
        put(used, at, weights)
        if rows.row_weights is not None:
            weights = weights * take(rows.row_weights, at)
        _add(work, sums, at, loss.gradient(weights, False))
    done = finish(loss.results.all())
    row = used.abs().nan_to_num_(0.0).argmax()  # a row that is NaN has no say
    wanted = (done.table[WEIGHT] * done.table[COEFFICIENT]).take(row)  # x[row] would be read
    found = used.take(row)
    factor = torch.where((found == 0) & (wanted == 0), 1, wanted / found)
    return Walked(done, sums.finish(), factor)


def _add(work: Work, sums: Sums, at: Rows, gradient: Tensor) -> None:
    hidden, unread = take(work.head.hidden, at), None  # rows of weight 0 may hold anything
    if work.rows.row_weights is not None:
        unread = take(work.rows.row_weights, at)[:, None] == 0
    if work.holes:
        invalid = ~take(work.valid, at)[:, None]
        unread = invalid if unread is None else unread.logical_or_(invalid)
    if unread is not None:
        hidden = hidden.masked_fill(unread, 0)
        if work.head.rule.softcap:  # whose slope may be NaN
            gradient.masked_fill_(unread, 0)
    sums.add(at, hidden, gradient)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude, 1 where there is none."""
    top = torch.nn.functional.pad(x.abs(), (0, 1)).max()
    return torch.where(top > 0, top, 1)


def _coefficients(work: Work) -> Tensor:
    """d loss / d (w L) of each row [N], over the largest of them."""
    rows, n = work.rows, len(work.valid)
    dtype = torch.promote_types(work.head.hidden.dtype, torch.float32)
    zeros = work.head.hidden.new_zeros(n, dtype=dtype)
    data = RowData(work.valid, zeros, None, None, rows.cu_seqlens, rows.length)
    found = work.run.finish(data, NO_GATE, None, None, zeros, GIVEN, rows.reduce)
    coefficient: Tensor = found.table[COEFFICIENT]
    return coefficient / _largest(coefficient)


class _Units:
    """Gates of a batch as its chunks come, in common units."""

    def __init__(self, work: Work, leaders: Tensor | None) -> None:
        self.work, self.leaders = work, leaders
        gate = work.rows.gate
        granularity = "token" if leaders is None else "span"
        self.gate = gate._replace(granularity=granularity, part=True)
        self.log_mean: Tensor | None = None
        """Of the gates in the units of the sums, float64."""

    def of(self, at: Rows, now: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gates u [C] of a chunk, and what the sums so far are to be multiplied by."""
        rows, normalize = self.work.rows, self.gate.normalize
        if normalize == "off":
            return torch.ones_like(now), None
        if normalize == "given":
            assert rows.weights is not None
            return take(rows.weights, at), None
        old = None if rows.old is None else take(rows.old, at)
        spans = None if self.leaders is None else take(self.leaders, at).long()
        valid = take(self.work.valid, at)  # all, unless there are holes
        found = self.work.run.weigh(RowData(valid, now, old, spans, None, len(now)), self.gate)
        if normalize == "none":
            return found.weight, None
        return self._common(found.weight, found.totals[0] + found.totals[1])

    def _common(self, weight: Tensor, log_mean: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of a chunk's unit mean in the units of the sums, which may become the chunk's."""
        before, factor = self.log_mean, None
        if before is None:
            self.log_mean = before = log_mean
        else:
            far = (log_mean > before + FAR) | (before == -torch.inf)
            self.log_mean = torch.where(far, log_mean, before)
            same = before == self.log_mean
            factor = torch.where(same, 1, torch.exp(before - self.log_mean))
        relative = torch.where(log_mean == -torch.inf, 0, torch.exp(log_mean - self.log_mean))
        return weight * relative.to(weight.dtype), factor
