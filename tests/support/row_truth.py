"""`weigh` and `finish` in plain PyTorch loops, in any dtype: what the row kernels are judged by."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drift_gate.reference.gate import aggregate


class RowData(NamedTuple):
    valid: Tensor
    now: Tensor
    old: Tensor | None
    spans: Tensor | None = None
    cu_seqlens: Tensor | None = None
    length: int = 1
    measured: Tensor | None = None
    spacing: Any = None  # see drift_gate/passes/rules.py


class GateRule(NamedTuple):
    granularity: str = "block"
    block_size: int = 64
    aggregate: str = "mean"
    tau: float = 1.0
    normalize: str = "batch"
    part: bool = False
    sample_every: int = 1


class PositionRule(NamedTuple):
    estimator: str = "ppo"
    low: float = 0.2
    high: float = 0.2
    dual: float = math.inf
    advantage_low: float = -math.inf
    advantage_high: float = math.inf
    advantage: str = "old"
    ratio: str = "token"
    clamp: bool = True
    floor: float = -math.inf


class ReduceRule(NamedTuple):
    factor: float = 1.0
    denominator: str = "tokens"
    token_mean: bool = False


def sequences_of(data: RowData) -> list[range]:
    n = data.valid.shape[0]
    if data.cu_seqlens is None:
        return [range(a, a + data.length) for a in range(0, n, max(data.length, 1))]
    borders = data.cu_seqlens.tolist()
    return [range(a, b) for a, b in pairwise(borders)]


def members(data: RowData, granularity: str, size: int) -> list[list[int]]:
    """The valid rows of each block."""
    blocks: dict[Any, list[int]] = {}
    for s, rows in enumerate(sequences_of(data)):
        live = [t for t in rows if data.valid[t]]
        for t in live:
            key = {
                "token": t,
                "block": (t - live[0]) // size,
                "span": None if data.spans is None else int(data.spans[t]),
                "sequence": 0,
            }[granularity]
            blocks.setdefault((s, key), []).append(t)
    return list(blocks.values())


def measured_rows(data: RowData, gate: GateRule) -> Tensor:
    """[N] bool: every `sample_every`-th of a block's valid rows, the first among them."""
    out = torch.zeros_like(data.valid)
    for rows in members(data, gate.granularity, gate.block_size):
        out[rows[:: gate.sample_every]] = True
    return out


def gated(data: RowData, gate: GateRule, given: Tensor | None, drift: Tensor) -> tuple[Tensor, ...]:
    """raw, weight, first, smallest block drift."""
    valid = data.valid
    first = torch.where(valid, torch.arange(len(valid)), -1).to(torch.int32)
    lowest = drift.new_zeros(())
    if gate.normalize == "given":
        assert given is not None
        weight = torch.where(valid, given.to(drift.dtype), 0)
        return weight, weight, first, lowest
    raw = valid.to(drift.dtype)
    if gate.normalize == "off" or data.old is None or not valid.any():
        return raw, raw, first, lowest
    a = torch.zeros_like(drift)
    for rows in members(data, gate.granularity, gate.block_size):
        seen = rows if data.measured is None else [t for t in rows if data.measured[t]]
        a[rows] = aggregate(drift[seen], gate.aggregate).abs()
        first[rows] = rows[0]
    if gate.part and gate.normalize == "batch" and gate.tau > 0:
        a = a.clamp(max=2.0**126)
    raw = torch.where(valid, torch.exp(-gate.tau * a), 0)
    lowest = a[valid].min()
    if gate.normalize == "none":
        return raw, raw, first, lowest
    groups = sequences_of(data) if gate.normalize == "sequence" else [range(len(valid))]
    weight = torch.zeros_like(a)
    for rows in groups:
        live = [t for t in rows if valid[t]]
        if live:
            g = torch.exp(-gate.tau * (a[live] - a[live].min()))
            weight[live] = g / (g.sum() / len(live))
    return raw, weight, first, lowest


def log_ratios(data: RowData, gate: GateRule, position: PositionRule, drift: Tensor) -> Tensor:
    found = -drift
    for rows in members(data, position.ratio, gate.block_size):
        found[rows] = -drift[rows].mean()
    return found


def position_loss(
    now: Tensor, old: Tensor, log_ratio: Tensor, target: Tensor, rule: PositionRule
) -> tuple[Tensor, Tensor, Tensor]:
    """L, slope and clipped of valid rows."""
    never = torch.zeros_like(now, dtype=torch.bool)
    kind = rule.estimator
    if kind == "given":
        return target, torch.ones_like(now), never
    x = target - now
    if kind == "k1":
        return -x, torch.ones_like(now), never
    if kind == "k2":
        return 0.5 * x * x, -x, never
    if kind == "k3":
        if not rule.clamp:
            return x.exp() - x - 1, 1 - x.exp(), never
        bounded = x.clamp(-20, 20)
        loss = bounded.exp() - bounded - 1
        slope = torch.where((x.abs() > 20) | (loss > 10), 0, 1 - bounded.exp())
        return loss.clamp(max=10), slope, never
    base = {"old": target - old, "current": target - now, "given": target}[rule.advantage]
    advantage = base.clamp(rule.advantage_low, rule.advantage_high)
    ratio = log_ratio.clamp(-20, 20).exp()
    clip = ratio.clamp(1 - rule.low, 1 + rule.high)
    if kind == "cispo":
        return -clip * advantage * now, -clip * advantage, clip != ratio
    loss = -ratio * advantage
    slope = torch.where(log_ratio.abs() > 20, 0, loss)
    if kind == "importance":
        return loss, slope, never
    limit = -clip * advantage
    clipped = limit > loss
    loss = torch.maximum(loss, limit)
    ceiling = torch.where(advantage < 0, -rule.dual * advantage, torch.inf)
    slope = torch.where(clipped | (loss > ceiling), 0, slope)
    return torch.minimum(loss, ceiling), slope, clipped


def finish(
    data: RowData,
    gate: GateRule,
    given: Tensor | None,
    row_weights: Tensor | None,
    target: Tensor,
    position: PositionRule,
    reduce: ReduceRule,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """loss, table, first, metrics, totals."""
    valid, n = data.valid, max(int(data.valid.sum()), 1)
    now = torch.where(valid, data.now.to(dtype), 0)
    old = now if data.old is None else torch.where(valid, data.old.to(dtype), 0)
    drift = old - now if data.old is not None else torch.zeros_like(now)
    raw, weight, first, lowest = gated(data, gate, given, drift)
    target = torch.where(valid, target.to(dtype), 0)
    floored = valid & (target < position.floor)
    target = torch.where(floored, position.floor, target)
    log_ratio = log_ratios(data, gate, position, drift)
    loss, slope, clipped = position_loss(now, old, log_ratio, target, position)
    v = torch.ones_like(now) if row_weights is None else row_weights.to(dtype)
    on = valid & (v != 0)
    loss = torch.where(on, v * weight * loss, 0)
    slope = torch.where(on, v * weight * slope, 0)
    begun = sum(any(valid[t] for t in rows) for rows in sequences_of(data))
    size = {"given": 1, "tokens": n, "sequences": max(begun, 1)}[reduce.denominator]
    coefficient = valid.to(dtype) * reduce.factor / size
    if reduce.token_mean:
        for rows in sequences_of(data):
            coefficient[rows] = coefficient[rows] / (valid[rows].sum() + 1e-8)
    seen = valid if data.measured is None else data.measured
    shown = torch.where(valid & ~seen, torch.nan, drift)
    table = torch.stack([weight, loss, slope, coefficient, shown])
    metrics = _metrics(raw, weight, drift[seen], clipped & valid, floored, valid, noise(data, seen))
    gate_found = gate.normalize == "batch" and valid.any() and data.old is not None
    peak = log_mean = torch.zeros((), dtype=dtype)
    if gate_found:
        peak, log_mean = -gate.tau * lowest, -weight.max().log()
        peak = torch.where(gate.part & (lowest == 2.0**126), -torch.inf, peak)
    tokens = valid.sum().to(dtype)
    last = torch.tensor(begun, dtype=dtype) if reduce.denominator == "sequences" else tokens
    totals = torch.stack([peak, log_mean, tokens, last])
    return (coefficient * loss).sum(), table, first, metrics, totals


def spacing_at(z: float, bits: int, scale: float) -> float:
    """How far apart short floats lie at z / scale, in units of z."""
    size = abs(z / scale) * (1 + 2**-13)
    return math.ldexp(scale, math.frexp(size)[1] - 1 - bits) if 0 < size < math.inf else 0.0


def noise(data: RowData, seen: Tensor) -> float:
    """`drift_noise`, row by row; see drift_gate/passes/rules.py."""
    if data.spacing is None or data.old is None or not seen.any():
        return 0.0
    tops, log_sums, bits, scale = data.spacing
    total = 0.0
    for row in seen.nonzero()[:, 0].tolist():
        now, top, log_sum = (float(x[row]) for x in (data.now, tops, log_sums))
        p, largest = math.exp(now), math.exp(-log_sum)
        beside = 0 if now + log_sum > -1e-4 else largest
        rest = max(1 - p - beside, 0)
        squares = min(rest**2 / 3, largest * rest) + beside**2
        own = spacing_at(now + top + log_sum, bits, scale) * (1 - p)
        total += math.sqrt(own**2 + spacing_at(top, bits, scale) ** 2 * squares) / 3
    return total / int(seen.sum())


def _metrics(
    raw: Tensor,
    weight: Tensor,
    drift: Tensor,
    clipped: Tensor,
    floored: Tensor,
    valid: Tensor,
    noise: float,
) -> Tensor:
    n, drifts = valid.sum().clamp(min=1), max(len(drift), 1)
    zero = weight.new_zeros(())
    some = bool(valid.any())
    top = weight[valid].max() if some else zero
    share = weight / top if top != 0 else weight
    return torch.stack([
        raw.sum() / n,
        weight[valid].min() if some else zero,
        top,
        share.sum() ** 2 / share.square().sum() / n if top != 0 else zero,
        drift.abs().sum() / drifts,
        drift.sum() / drifts,
        clipped.sum().to(weight.dtype) / n,
        drift.clamp(-20, 20).sum() / drifts,
        torch.tensor(noise, dtype=weight.dtype),
        valid.sum().to(weight.dtype),
        floored.sum().to(weight.dtype),
    ])  # fmt: skip
