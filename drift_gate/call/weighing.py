"""Gate, unit mean, position losses and reduction of a call's rows, over ranks where they share."""

from typing import Any

import torch
from torch import Tensor

from ..parallel import sequences
from ..parallel.scope import Totals, over_ranks, rescaled, scales, totals
from ..passes import torch as plain
from ..passes.rules import (
    COEFFICIENT,
    DRIFT,
    GIVEN,
    METRICS,
    SHORT_BITS,
    SLOPE,
    TOKEN_LOSS,
    WEIGHT,
    Finished,
    GateRule,
    PositionRule,
    ReduceRule,
    RowData,
    Spacing,
    Weights,
    samples,
)
from .rows import RowInputs

SUM = ReduceRule(1.0, "given", False)


def data_of(
    rows: RowInputs,
    valid: Tensor,
    now: Tensor,
    measured: Tensor | None = None,
    spacing: Spacing | None = None,
) -> RowData:
    """What the row functions take of every row."""
    return RowData(
        valid, now, rows.old, rows.spans, rows.cu_seqlens, rows.length, measured, spacing
    )


def spacing_of(
    dtype: torch.dtype, maximum: Tensor, log_sum: Tensor, scale: float
) -> Spacing | None:
    """Of logits of this dtype; None where they are not rounded, or their statistics are [0]."""
    bits = SHORT_BITS.get(dtype)
    return None if bits is None or not len(maximum) else Spacing(maximum, log_sum, bits, scale)


def is_sampled(rows: RowInputs) -> bool:
    """Whether the gate measures the drift at some valid rows alone; it depends on options alone."""
    return rows.gate.sample_every > 1 and rows.old is not None


def most_measured(rows: RowInputs) -> int | None:
    """How many rows `measured_rows` gives at most, from shapes alone; None where these do not say
    (spans, sequences cut over ranks)."""
    gate, n, borders = rows.gate, rows.n_rows, rows.cu_seqlens
    if rows.context or gate.granularity == "span" or not n:
        return None
    every, size = gate.sample_every, gate.block_size if gate.granularity == "block" else n
    if borders is None:  # a sequence has most where all of its rows are valid
        blocks, rest = divmod(rows.length, size)
        return n // rows.length * (blocks * -(-size // every) + -(-rest // every))
    # A whole block has these rows beyond its share, and the last one of a sequence every - 1.
    beyond = n // size * (-size % every) + (borders.numel() - 1) * (every - 1)
    return (n + beyond) // every


def measured_rows(run: Any, rows: RowInputs, valid: Tensor) -> Tensor | None:
    """[N] bool: where the gate measures the drift, known without log-probs; None: wherever valid.

    The rows of a block that lies on several ranks are counted over all of them.
    """
    if rows.old is None or not is_sampled(rows):
        return None
    data = data_of(rows, valid, torch.zeros_like(rows.old))
    if rows.context:
        every, _, at = _whole_sequences(rows, data)
        assert every.measured is not None
        return every.measured[at]
    found: Tensor = run.measured_rows(data, rows.gate)
    return found


def finish(
    run: Any,
    rows: RowInputs,
    valid: Tensor,
    now: Tensor,
    target: Tensor,
    position: PositionRule,
    measured: Tensor | None = None,
    spacing: Spacing | None = None,
) -> Finished:
    """The loss of this call as a part of its batch; `totals` is [2, 4] beside a GateNormalizer.

    now [N]: log-probs of the labels. target [N]: see `passes.rules.PositionRule`. measured [N]:
    from `measured_rows`, where the caller needs it too. spacing: of the logits, for `drift_noise`.
    """
    data = data_of(rows, valid, now, measured, spacing)
    if rows.context:
        done, call, mine = _cut_sequences(run, rows, data, target, position)
    else:
        done = run.finish(
            data, rows.gate, rows.weights, rows.row_weights, target, position, rows.reduce
        )
        if not (rows.group or rows.divisor is not None or rows.collected):
            return done
        call = mine = totals(done.totals)
    if rows.divisor is not None:
        done = _multiplied(done, valid, None, inverse(rows.divisor, call.tokens))
    if not (rows.group or rows.collected):
        return done
    everyone = over_ranks(mine, rows.group)
    if rows.collected:
        return done._replace(totals=torch.stack([torch.stack(call), torch.stack(everyone)]))
    gate, size = scales(call, everyone, rows.reduce.denominator != "given")
    return _multiplied(done, valid, gate, size)


def inverse(divisor: Tensor, tokens: Tensor) -> Tensor:
    """Of a denominator; a batch without rows has loss 0 though its denominator is 0."""
    return torch.where(tokens > 0, divisor.to(tokens.dtype).reciprocal(), 0)


def _multiplied(done: Finished, valid: Tensor, gate: Tensor | None, size: Tensor) -> Finished:
    """The same with weights and denominators of another batch."""
    table, metrics = done.table, done.metrics
    both = size if gate is None else size * gate
    if gate is not None:
        for i in (WEIGHT, TOKEN_LOSS, SLOPE):
            table[i] = rescaled(table[i], gate, valid)
        metrics[1:3] *= gate.to(metrics.dtype)  # gate_min, gate_max
    table[COEFFICIENT] = rescaled(table[COEFFICIENT], size, valid)
    loss = torch.where(both == 0, 0, done.loss * both.to(done.loss.dtype))
    return done._replace(loss=loss)


def _cut_sequences(
    run: Any, rows: RowInputs, data: RowData, target: Tensor, position: PositionRule
) -> tuple[Finished, Totals, Totals]:
    """Where ranks have parts of a sequence: weights and denominators come from the whole of it.

    Also the totals of those sequences, which the results are relative to, and this rank's share.
    """
    gate, given, coefficient, call, begins, raw, numbers, measured = over_sequences(rows, data)
    data = data._replace(measured=measured)
    done = run.finish(data, gate, given, rows.row_weights, target, position, SUM)
    table = done.table
    table[COEFFICIENT] = coefficient
    loss = (table[COEFFICIENT].double() * table[TOKEN_LOSS].double()).sum().to(table.dtype)
    if raw is not None:
        done.metrics[0] = raw
    mine = totals(done.totals)
    if rows.gate.normalize == "batch":
        assert given is not None
        mean = given.to(call.peak.dtype).sum() / mine.tokens.clamp(min=1)
        mine = mine._replace(peak=call.peak, log_mean=call.log_mean + mean.log())
    size = begins if rows.reduce.denominator == "sequences" else mine.tokens
    return done._replace(loss=loss, first=numbers), call, mine._replace(size=size)


def over_sequences(
    rows: RowInputs, data: RowData
) -> tuple[GateRule, Tensor | None, Tensor, Totals, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Of this rank's rows: how they weigh ("given"), those weights, their coefficients; the totals
    of all ranks of the context; how many sequences begin here; the mean raw gate, with a gate; the
    numbers of their blocks; and where their drift is measured."""
    every, gate, at = _whole_sequences(rows, data)
    zeros = torch.zeros_like(every.now)
    everyones = plain.finish(
        every, gate if gate.normalize != "given" else gate._replace(normalize="off"), None, None,
        zeros, GIVEN, rows.reduce,
    )  # fmt: skip
    mine = everyones.table[:, at].to(data.now.dtype)
    raw = None
    if gate.normalize not in ("off", "given"):
        bare = plain.weigh(every, gate._replace(normalize="none", part=False))
        kept = data.valid.sum().clamp(min=1)
        raw = torch.where(data.valid, bare.weight[at], 0).sum() / kept
    begins = sequences.begin_here(every, at)
    rule, weights = rows.gate, rows.weights
    if rule.normalize != "off":
        rule = rule._replace(normalize="given")
        weights = mine[WEIGHT] if weights is None else weights
    numbers = number_blocks(everyones.first)[at]
    measured = None if every.measured is None else every.measured[at]
    coefficient = mine[COEFFICIENT]
    return rule, weights, coefficient, totals(everyones.totals), begins, raw, numbers, measured


def _whole_sequences(rows: RowInputs, data: RowData) -> tuple[RowData, GateRule, Tensor]:
    """The rows of all ranks of the context, the gate for them, and where this rank's are [N]."""
    assert rows.positions is not None
    context = sequences.context_of(rows.positions, rows.cu_seqlens, rows.length, rows.context)
    every, gate, at = sequences.whole_sequences(context, data, rows.gate)
    if samples(every, gate):
        every = every._replace(measured=plain.measured_rows(every, gate))
    return every, gate, at


def number_blocks(first: Tensor) -> Tensor:
    """Number blocks in the order in which they begin, from the first valid row of each row's."""
    begins = first == torch.arange(first.shape[0], device=first.device)
    number = begins.cumsum(0) - 1
    return torch.where(first >= 0, number[first.clamp(min=0).long()], -1)


def weigh(run: Any, rows: RowInputs, valid: Tensor, now: Tensor) -> Weights:
    """How the rows weigh; unit mean over the group where there is one. `first` numbers blocks."""
    data = data_of(rows, valid, now)
    if not rows.context and not rows.group:
        found: Weights = run.weigh(data, rows.gate, rows.weights)
        return found
    zeros = torch.zeros_like(now)
    done = finish(run, rows, valid, now, zeros, GIVEN)
    table = done.table
    return Weights(table[WEIGHT], table[DRIFT], done.first, done.metrics, done.totals)


def valid_rows(run: Any, rows: RowInputs, labels: Tensor | None, like: Tensor) -> Tensor:
    """valid [N] bool, on the device of `like`: in the response mask, and the label not ignored."""
    valid: Tensor = run.valid_rows(
        labels, rows.response_mask, rows.ignore_index, rows.vocab, rows.cu_seqlens, rows.n_rows,
        like.device, rows.check,
    )  # fmt: skip
    return valid


def empty_finished(rows: RowInputs, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, table, metrics and totals as `finish` returns them, empty; row data are as `like`."""
    wide = torch.float32 if like.device.type in ("mps", "xpu") else torch.float64
    shape = (2, 4) if rows.collected else (4,)
    return (
        like.new_empty(()),
        like.new_empty(5, rows.n_rows),
        like.new_empty(len(METRICS)),
        like.new_empty(shape, dtype=wide),
    )
