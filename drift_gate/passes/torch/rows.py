"""The row functions: which rows count, what they weigh, their losses and the sum of those.

Row data is small, so it is computed in float64 where the device has it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...choices import ESTIMATORS
from ..rules import (
    DENOMINATORS,
    LARGEST_DRIFT,
    SNAP,
    TIED,
    Finished,
    GateRule,
    PositionRule,
    ReduceRule,
    RowData,
    Spacing,
    Weights,
    check_choice,
    check_gate,
    check_position,
    sampled,
)
from .blocks import Layout, Segments, wide

# Which rows count.


@torch.no_grad()
def valid_rows(
    labels: Tensor | None,  # [N]
    response_mask: Tensor | None,  # [N] bool, integer or float: 0 or 1
    ignore_index: int,
    vocab: int,
    cu_seqlens: Tensor | None,  # [B + 1]
    n_rows: int,
    device: torch.device,
    check: bool,
) -> Tensor:
    """valid [N] bool: in the response mask, and label not ignored.

    With `check` (it reads values: on a GPU it synchronises) ValueError is raised for a valid label
    outside [0, vocab), a floating-point mask with other values than 0 and 1, and `cu_seqlens` that
    do not cut N rows.
    """
    valid = torch.ones(n_rows, dtype=torch.bool, device=device)
    if labels is not None:
        valid = labels != ignore_index
    if response_mask is not None:
        if check and response_mask.is_floating_point():
            bad = (response_mask != 0) & (response_mask != 1)
            _refuse("response_mask", response_mask, bad, "be 0 or 1")
        valid &= response_mask.bool()
    if check and labels is not None:
        bad = valid & ((labels < 0) | (labels >= vocab))
        wanted = f"lie in [0, {vocab}) or equal ignore_index ({ignore_index})"
        _refuse("labels", labels, bad, wanted)
    if check and cu_seqlens is not None:
        check_borders(cu_seqlens, n_rows)
    return valid


def _refuse(name: str, values: Tensor, bad: Tensor, wanted: str) -> None:
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        value = values[tuple(where)].item()
        raise ValueError(f"{name} must {wanted}; got {value} at index {where}")


def check_borders(cu_seqlens: Tensor, n_rows: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to n_rows."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_rows or (cu_seqlens.diff() < 0).any():
        shown = cu_seqlens.tolist()
        shown = shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to {n_rows}, the number of rows; got {shown}"
        )


# What they weigh.


@torch.no_grad()
def measured_rows(data: RowData, gate: GateRule) -> Tensor:
    """[N] bool: the first valid row of each block, and every `sample_every`-th valid one after.

    The log-probs are not read."""
    check_gate(gate)
    units = Layout(data, gate.block_size).units(gate.granularity)
    return data.valid & (units.ranks(data.valid) % gate.sample_every == 0)


class _Gated(NamedTuple):
    """Row data [N] in the wide dtype, 0 on invalid rows."""

    layout: Layout
    units: Segments
    measured: Tensor  # bool
    now: Tensor
    old: Tensor
    drift: Tensor  # 0 where not measured
    block_drift: Tensor
    raw: Tensor  # gates before the mean is taken out
    weight: Tensor
    first: Tensor  # int32


def _gated(data: RowData, gate: GateRule, given: Tensor | None) -> _Gated:
    check_gate(gate)
    if (given is None) == (gate.normalize == "given"):
        raise ValueError('weights must be given where normalize is "given", and nowhere else')
    layout, valid = Layout(data, gate.block_size), data.valid
    units = layout.units(gate.granularity)
    now = torch.where(valid, wide(data.now), 0)
    old = now if data.old is None else torch.where(valid, wide(data.old), 0)
    drift = torch.zeros_like(now) if data.old is None else old - now
    measured = sampled(data, gate, measured_rows).measured
    if measured is None:
        measured = valid
    else:
        drift = torch.where(measured, drift, 0)
    a = torch.where(valid, _aggregate(drift, units, layout, measured, gate.aggregate), 0)
    if gate.part and gate.normalize == "batch" and gate.tau != 0:
        a = a.clamp(max=LARGEST_DRIFT)
    if given is not None:
        raw = weight = torch.where(valid, wide(given), 0)
    elif gate.normalize == "off":
        raw, weight = torch.ones_like(now), valid.to(now.dtype)
    else:
        raw = weight = torch.where(valid, torch.exp(-gate.tau * a), 0)
        if gate.normalize != "none":
            groups = layout.sequences if gate.normalize == "sequence" else None
            weight = _unit_mean(a, valid, gate.tau, groups)
    first = torch.where(valid, layout.first(units), -1).to(torch.int32)
    return _Gated(layout, units, measured, now, old, drift, a, raw, weight, first)


def _aggregate(
    drift: Tensor, units: Segments, layout: Layout, measured: Tensor, kind: str
) -> Tensor:
    """|aggregate of the drift| of each row's block, [N]."""
    if kind == "mean":
        return layout.mean(drift, units, measured).abs()
    if kind == "mean_abs":
        return layout.mean(drift.abs(), units, measured)
    largest = units.reduce(drift.abs(), "max")
    if kind == "max_abs":
        return largest
    unit = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
    return unit * layout.mean((drift / unit).square(), units, measured).sqrt()


def _unit_mean(a: Tensor, valid: Tensor, tau: float, groups: Segments | None) -> Tensor:
    """exp(-tau a) over its mean on the valid rows, of each group or of all."""
    if a.shape[0] == 0:
        return a
    masked = torch.where(valid, a, torch.inf)
    count = valid.to(a.dtype)
    if groups is None:
        g = torch.where(valid, torch.exp(-tau * (a - masked.min())), 0)
        mean = g.sum() / count.sum().clamp(min=1)
    else:
        g = torch.where(valid, torch.exp(-tau * (a - groups.reduce(masked, "min"))), 0)
        mean = groups.reduce(g, "sum") / groups.reduce(count, "sum").clamp(min=1)
    return torch.where(valid, g / mean, 0)


def _spaced(z: Tensor, spacing: Spacing) -> Tensor:
    """How far apart logits lie at z; 0 at infinities."""
    size = (z / spacing.scale).abs() * SNAP
    size = torch.where(size.isinf(), 0, size)
    exponent = torch.frexp(size).exponent - 1 - spacing.bits
    return torch.where(size > 0, torch.ldexp(torch.ones_like(z), exponent), 0) * spacing.scale


def _noise(data: RowData, found: _Gated) -> Tensor:
    """The mean |drift| that rounding of the logits alone would show: see `rules.Spacing`."""
    spacing, now = data.spacing, found.now
    if spacing is None or data.old is None:
        return now.new_zeros(())
    measured = found.measured
    top, log_sum = (torch.where(measured, wide(x), 0) for x in spacing[:2])
    now = torch.where(measured, now, 0)
    p, largest = now.exp(), (-log_sum).exp()
    is_top = now + log_sum > -TIED
    rest = (1 - p - torch.where(is_top, 0, largest)).clamp(min=0)
    squares = torch.minimum(rest.square() / 3, largest * rest)
    squares = squares + torch.where(is_top, 0, largest.square())
    own = _spaced(now + top + log_sum, spacing) * (1 - p)
    noise = (own.square() + _spaced(top, spacing).square() * squares).sqrt() / 3
    return torch.where(measured, noise, 0).sum() / measured.sum().clamp(min=1)


def _metrics(
    data: RowData, found: _Gated, clipped: Tensor, floored: Tensor, valid: Tensor
) -> Tensor:
    """In the order of METRICS."""
    weight, drift = found.weight, found.drift
    n = valid.sum()
    over = over_drifts = 1 / n.clamp(min=1).to(weight.dtype)
    if found.measured is not valid:
        over_drifts = 1 / found.measured.sum().clamp(min=1).to(weight.dtype)
    zero = torch.zeros_like(over)
    some = weight.shape[0] > 0
    lowest = torch.where(valid, weight, torch.inf).min() if some else zero
    largest = torch.where(valid, weight, -torch.inf).max() if some else zero
    largest = torch.where(n > 0, largest, zero)
    # Of the largest: the squares of small weights may be too small for their dtype.
    share = weight / torch.where(largest == 0, 1, largest)
    total, square = share.sum(), share.square().sum()
    return torch.stack(
        [
            torch.where(valid, found.raw, 0).sum() * over,
            torch.where(n > 0, lowest, zero),
            largest,
            torch.where(square == 0, zero, total / square * total * over),
            drift.abs().sum() * over_drifts,
            drift.sum() * over_drifts,
            (clipped & valid).sum() * over,
            drift.clamp(-20, 20).sum() * over_drifts,
            _noise(data, found),
            n.to(weight.dtype),
            (floored & valid).sum().to(weight.dtype),
        ]
    )


def _totals(found: _Gated, gate: GateRule, valid: Tensor, size: Tensor) -> Tensor:
    """The row that weighs most tells the mean gate: w = exp(-tau a) / mean."""
    tokens = valid.sum().to(found.weight.dtype)
    peak = log_mean = torch.zeros_like(tokens)
    if gate.normalize == "batch" and len(valid):
        lowest = torch.where(valid, found.block_drift, torch.inf).amin()
        # -inf: all drifts are infinite
        unheld = torch.where(lowest == LARGEST_DRIFT, -torch.inf, -gate.tau * lowest)
        peak = torch.where(tokens > 0, unheld, 0)
        log_mean = torch.where(tokens > 0, -found.weight.amax().log(), 0)
    return torch.stack([peak, log_mean, tokens, size])


def _shown_drift(found: _Gated, valid: Tensor) -> Tensor:
    """The drift [N], NaN where it is not measured."""
    if found.measured is valid:
        return found.drift
    return found.drift.masked_fill(valid & ~found.measured, torch.nan)


@torch.no_grad()
def weigh(data: RowData, gate: GateRule, given: Tensor | None = None) -> Weights:
    """The weights of the rows, without a position loss."""
    found, valid, dtype = _gated(data, gate, given), data.valid, data.now.dtype
    nothing = torch.zeros_like(valid)
    return Weights(
        found.weight.to(dtype),
        _shown_drift(found, valid).to(dtype),
        found.first,
        _metrics(data, found, nothing, nothing, valid).to(dtype),
        _totals(found, gate, valid, valid.sum().to(found.weight.dtype)),
    )


# Their losses.


@torch.no_grad()
def finish(
    data: RowData,
    gate: GateRule,
    given: Tensor | None,  # [N], the weights, where `normalize` is "given"
    row_weights: Tensor | None,  # [N]; None: all 1
    target: Tensor,  # [N]: see `PositionRule`
    position: PositionRule,
    reduce: ReduceRule,
) -> Finished:
    """Weights, position losses with their slopes, and the loss.

    A row of weight 0 in `row_weights` has no loss and no slope, whatever its data are; it counts in
    everything else.
    """
    check_position(position)
    check_choice("denominator", reduce.denominator, DENOMINATORS)
    found, valid, dtype = _gated(data, gate, given), data.valid, data.now.dtype
    target = torch.where(valid, wide(target), 0)
    floored = valid & (target < position.floor)
    value, slope, clipped = _position_loss(found, target.clamp(min=position.floor), position)
    weight, counts = found.weight, valid
    if row_weights is not None:
        counts = valid & (row_weights != 0)
        weight = weight * wide(row_weights)
    value = torch.where(counts, weight * value, 0)
    slope = torch.where(counts, weight * slope, 0)

    layout, tokens = found.layout, valid.sum().to(weight.dtype)
    size = tokens
    if reduce.denominator == "sequences":
        begins = valid & (layout.rows == layout.first(layout.sequences))
        size = begins.sum().to(weight.dtype)
    coefficient = valid.to(weight.dtype) * reduce.factor
    if reduce.denominator != "given":
        coefficient = coefficient / size.clamp(min=1)
    if reduce.token_mean:
        coefficient = coefficient / (layout.count + 1e-8)
    table = torch.stack([found.weight, value, slope, coefficient, _shown_drift(found, valid)])
    return Finished(
        (value * coefficient).sum().to(dtype),
        table.to(dtype),
        found.first,
        _metrics(data, found, clipped, floored, valid).to(dtype),
        _totals(found, gate, valid, size),
    )


def _position_loss(
    found: _Gated, target: Tensor, rule: PositionRule
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its slope in the log-prob, clipped), [N] each."""
    clipped = torch.zeros_like(found.layout.valid)
    if rule.estimator == "given":
        return target, torch.ones_like(target), clipped
    if not ESTIMATORS[rule.estimator].ratio:
        return *_divergence_loss(found.now, target, rule), clipped
    if rule.advantage == "given":
        advantage = target
    else:
        advantage = target - (found.old if rule.advantage == "old" else found.now)
    advantage = advantage.clamp(rule.advantage_low, rule.advantage_high)
    log_ratio = found.now - found.old
    if rule.ratio != "token" and found.old is not found.now:
        units = found.layout.units(rule.ratio)
        log_ratio = found.layout.mean(log_ratio, units, found.layout.valid)
    return _ratio_loss(log_ratio, advantage, found.now, rule)


def _ratio_loss(
    log_ratio: Tensor, advantage: Tensor, now: Tensor, rule: PositionRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Importance-weighted surrogate -r A; with PPO's clip and dual clip; or CISPO's -r A log p."""
    ratio = log_ratio.clamp(-20, 20).exp()
    bounded = ratio.clamp(1 - rule.low, 1 + rule.high)
    if rule.estimator == "cispo":
        slope = -advantage * bounded
        return slope * now, slope, (ratio < 1 - rule.low) | (ratio > 1 + rule.high)
    loss = -advantage * ratio
    slope = torch.where(log_ratio.abs() > 20, 0, loss)
    if rule.estimator == "importance":
        return loss, slope, torch.zeros_like(loss, dtype=torch.bool)
    held = -advantage * bounded
    clipped = held > loss
    loss = torch.maximum(loss, held)
    ceiling = -advantage * rule.dual
    dual = (advantage < 0) & (loss > ceiling)
    slope = torch.where(clipped | dual, 0, slope)
    return torch.where(dual, ceiling, loss), slope, clipped


def _divergence_loss(now: Tensor, target: Tensor, rule: PositionRule) -> tuple[Tensor, Tensor]:
    """k1, k2, k3 of the reverse KL (Schulman 2020), k3 with verl's clamps; and the slope."""
    log_ratio = now - target
    if rule.estimator == "k1":
        return log_ratio, torch.ones_like(log_ratio)
    if rule.estimator == "k2":
        return 0.5 * log_ratio.square(), log_ratio
    bounded = (-log_ratio).clamp(-20, 20) if rule.clamp else -log_ratio
    growth = torch.expm1(bounded)
    loss = growth - bounded
    if not rule.clamp:
        return loss, -growth
    slope = torch.where((log_ratio.abs() > 20) | (loss > 10), 0, -growth)
    return loss.clamp(max=10), slope
