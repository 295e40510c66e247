"""The row functions in plain PyTorch, against a walk over the rows one by one in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drift_gate.passes import torch as passes
from drift_gate.passes.rules import METRICS, GateRule, PositionRule, ReduceRule, RowData

NAN, INF = torch.nan, torch.inf
N, LENGTH = 36, 12
GRANULARITIES = ("token", "block", "span", "sequence")
AGGREGATES = ("mean", "mean_abs", "rms", "max_abs")
EACH_ESTIMATOR = pytest.mark.parametrize(
    "estimator", ["ppo", "importance", "cispo", "k1", "k2", "k3", "given"]
)
PLAIN = GateRule("token", 1, "mean", 0.0, "off", False)


def draw(
    seed: int = 0, packed: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[RowData, Tensor]:
    """Rows with NaN where not valid, one sequence without any; and a teacher's log-probs."""
    generator = torch.Generator().manual_seed(seed)
    now, old, teacher = (
        -torch.rand(N, generator=generator).to(dtype) * scale for scale in (2.0, 2.3, 2.0)
    )
    valid = torch.rand(N, generator=generator) > 0.25
    valid[LENGTH : 2 * LENGTH] = False
    now[~valid], old[~valid], teacher[~valid] = NAN, NAN, INF
    spans = torch.randint(-2, 2, (N,), generator=generator) * 2**40
    borders = torch.tensor([0, 0, 5, LENGTH, 2 * LENGTH, N]) if packed else None
    return RowData(valid, now, old, spans, borders, 0 if packed else LENGTH), teacher


def sequence_of(data: RowData, row: int) -> int:
    if data.cu_seqlens is None:
        return row // data.length
    return sum(border <= row for border in data.cu_seqlens.tolist())


def unit_rows(data: RowData, granularity: str, size: int) -> list[list[int]]:
    """For each row the valid rows of its unit."""
    valid = data.valid.nonzero()[:, 0].tolist()
    keys: dict[int, Any] = {}
    for row in valid:
        sequence = sequence_of(data, row)
        begin = min(r for r in valid if sequence_of(data, r) == sequence)
        keys[row] = {
            "token": row,
            "block": (sequence, (row - begin) // size),
            "span": (sequence, int(data.spans[row])),
            "sequence": sequence,
        }[granularity]
    return [[r for r in valid if keys[r] == keys.get(row)] for row in range(N)]


def block_drift(d: Tensor, aggregate: str) -> Tensor:
    return {
        "mean": d.mean().abs(),
        "mean_abs": d.abs().mean(),
        "rms": d.square().mean().sqrt(),
        "max_abs": d.abs().max(),
    }[aggregate]


def weights_by_hand(data: RowData, gate: GateRule) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, a, first) of each row."""
    units = unit_rows(data, gate.granularity, gate.block_size)
    a, first = torch.zeros(N, dtype=torch.float64), torch.full((N,), -1, dtype=torch.int32)
    drift = data.old.double() - data.now.double()
    for row, unit in enumerate(units):
        if unit:
            seen = unit[:: gate.sample_every]
            a[row], first[row] = block_drift(drift[seen], gate.aggregate), unit[0]
    weight = torch.where(data.valid, torch.exp(-gate.tau * a), 0)
    groups = {"none": [], "batch": [data.valid.nonzero()[:, 0].tolist()]}.get(gate.normalize)
    for rows in unit_rows(data, "sequence", 1) if groups is None else groups:
        if rows:
            weight[rows] = torch.exp(-gate.tau * a[rows]) / torch.exp(-gate.tau * a[rows]).mean()
    return weight, a, first


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("normalize", ["batch", "sequence", "none"])
@pytest.mark.parametrize("every", [1, 2])
def test_weigh(granularity: str, aggregate: str, normalize: str, every: int) -> None:
    for packed in (False, True):
        data, _ = draw(packed=packed)
        gate = GateRule(granularity, 3, aggregate, 1.7, normalize, False, every)
        units = unit_rows(data, granularity, 3)
        seen = torch.tensor([row in unit[::every] for row, unit in enumerate(units)])
        unseen = data.valid & ~seen
        assert unseen.any() == (every > 1 and granularity != "token")
        assert torch.equal(passes.measured_rows(data, gate), seen)
        weight, a, first = weights_by_hand(data, gate)
        drifts = torch.where(data.valid, data.old - data.now, 0).masked_fill(unseen, NAN)
        data.now[unseen] = INF  # not read
        got = passes.weigh(data, gate)
        torch.testing.assert_close(got.weight, weight)
        torch.testing.assert_close(got.drift, drifts, equal_nan=True)
        assert torch.equal(got.first, first)
        w, drift = weight[data.valid], drifts[seen]
        raw = torch.exp(-gate.tau * a[data.valid])
        n = len(w)
        metrics = [
            raw.mean(), w.min(), w.max(), w.sum() ** 2 / w.square().sum() / n, drift.abs().mean(),
            drift.mean(), 0, drift.mean(), 0, n, 0,
        ]  # fmt: skip
        expected = torch.tensor([float(m) for m in metrics], dtype=torch.float64)
        torch.testing.assert_close(got.metrics, expected)
        peak, log_mean, tokens, size = got.totals.tolist()
        assert tokens == size == n
        mean = raw.mean().log().item() if normalize == "batch" else 0.0
        assert peak + log_mean == pytest.approx(mean)
        lowest = -gate.tau * float(a[data.valid].min()) if normalize == "batch" else 0.0
        assert peak == pytest.approx(lowest, rel=1e-12)


def loss_by_hand(
    data: RowData, now: Tensor, target: Tensor, rule: PositionRule, size: int
) -> Tensor:
    """L of each row, differentiable in now; 0 where not valid."""
    units = unit_rows(data, rule.ratio, size)
    losses = []
    for row, unit in enumerate(units):
        if not unit:
            losses.append(torch.zeros((), dtype=now.dtype))
            continue
        x, y = now[row], target[row].clamp(min=rule.floor)
        if rule.estimator == "given":
            losses.append(y)
            continue
        old = x.detach() if data.old is None else data.old[row].double()
        mean = torch.zeros((), dtype=now.dtype)
        if data.old is not None:
            mean = (now.detach()[unit] - data.old[unit].double()).mean()
        ratio = (mean + x - x.detach()).clamp(-20, 20).exp()
        a = {"old": y - old, "current": y - x.detach(), "given": y}[rule.advantage]
        a = a.clamp(rule.advantage_low, rule.advantage_high)
        held = ratio.clamp(1 - rule.low, 1 + rule.high)
        if rule.estimator == "importance":
            loss = -ratio * a
        elif rule.estimator == "cispo":
            loss = -held.detach() * a * x
        elif rule.estimator == "ppo":
            loss = torch.maximum(-ratio * a, -held * a)
            if a < 0:
                loss = loss.clamp(max=-rule.dual * float(a))
        elif rule.estimator == "k1":
            loss = x - y
        elif rule.estimator == "k2":
            loss = (x - y).square() / 2
        else:
            z = (y - x).clamp(-20, 20) if rule.clamp else y - x
            loss = z.exp() - z - 1
            loss = loss.clamp(max=10) if rule.clamp else loss
        losses.append(loss)
    return torch.stack(losses)


RULES: list[dict[str, Any]] = [
    {},
    {"advantage": "current", "ratio": "sequence", "dual": 1.1},
    {"advantage": "given", "ratio": "block", "low": 0.05, "high": 0.3},
    {"ratio": "span", "advantage_low": -0.2, "advantage_high": 0.1},
    {"floor": -1.2, "clamp": False},
]


@EACH_ESTIMATOR
@pytest.mark.parametrize("options", RULES, ids=range(len(RULES)))
@pytest.mark.parametrize("without_old", [False, True])
def test_finish(estimator: str, options: dict[str, Any], without_old: bool) -> None:
    data, target = draw(1, packed=True)
    if without_old:
        data = data._replace(old=None)
    rule = PositionRule(estimator)._replace(**options)
    gate = PLAIN if without_old else GateRule("span", 3, "mean", 1.3, "batch", False)
    gate = gate._replace(block_size=3)
    v = torch.rand(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    v[data.valid.nonzero()[3]] = 0
    count = int(data.valid.sum())
    factor = 1.5
    got = passes.finish(data, gate, None, v, target, rule, ReduceRule(factor, "tokens", False))

    now = torch.where(data.valid, data.now, 0).requires_grad_()
    losses = loss_by_hand(data, now, torch.where(data.valid, target, 0), rule, 3)
    weight = data.valid.double() if without_old else weights_by_hand(data, gate)[0]
    token_loss = v * weight * losses
    torch.testing.assert_close(got.table[0], weight)
    torch.testing.assert_close(got.table[1], token_loss.detach())
    if estimator == "given":
        slope = v * weight
    else:
        (slope,) = torch.autograd.grad(token_loss.sum(), now)
    torch.testing.assert_close(got.table[2], slope)
    torch.testing.assert_close(got.table[3], data.valid.double() * (factor / count))
    torch.testing.assert_close(got.loss, (token_loss.sum() * factor / count).detach())
    drift = 0 * data.now if data.old is None else data.old - data.now
    torch.testing.assert_close(got.table[4], torch.where(data.valid, drift, 0))
    floored = (target[data.valid] < rule.floor).sum()
    assert got.metrics[METRICS.index("floored")] == floored
    weighed = passes.weigh(data, gate)
    assert torch.equal(got.first, weighed.first) and torch.equal(got.totals, weighed.totals)
    assert torch.equal(got.table[0], weighed.weight)


def test_what_ppo_and_cispo_count_as_clipped() -> None:
    """Log-ratios -1, 0, 1 with an advantage of either sign."""
    old = torch.zeros(6, dtype=torch.float64)
    now = torch.tensor([-1.0, 0.0, 1.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    target = torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=torch.float64)
    data = RowData(torch.ones(6, dtype=torch.bool), now, old, None, None, 6)
    for estimator, share in (("ppo", 2 / 6), ("cispo", 4 / 6), ("importance", 0.0)):
        rule = PositionRule(estimator, advantage="given")
        got = passes.finish(data, PLAIN, None, None, target, rule, ReduceRule())
        assert got.metrics[METRICS.index("pg_clipfrac")] == pytest.approx(share)


def test_reductions() -> None:
    for packed in (False, True):
        data, target = draw(3, packed)
        rule = PositionRule("k1")
        sequences = {tuple(rows) for rows in unit_rows(data, "sequence", 1) if rows}
        of_row = unit_rows(data, "sequence", 1)
        for denominator, divisor in (
            ("given", 1),
            ("tokens", int(data.valid.sum())),
            ("sequences", len(sequences)),
        ):
            for token_mean in (False, True):
                reduce = ReduceRule(2.0, denominator, token_mean)
                got = passes.finish(data, PLAIN, None, None, target, rule, reduce)
                expected = [2.0 / divisor if rows else 0.0 for rows in of_row]
                if token_mean:
                    expected = [c / (len(r) + 1e-8) for c, r in zip(expected, of_row, strict=True)]
                coefficient = torch.tensor(expected, dtype=torch.float64)
                torch.testing.assert_close(got.table[3], coefficient)
                torch.testing.assert_close(got.loss, (coefficient * got.table[1]).sum())
                size = len(sequences) if denominator == "sequences" else int(data.valid.sum())
                assert got.totals.tolist() == [0, 0, int(data.valid.sum()), size]


@EACH_ESTIMATOR
def test_a_row_of_weight_0_has_no_loss_whatever_its_data_are(estimator: str) -> None:
    data, target = draw(4)
    row = int(data.valid.nonzero()[2])
    target[row] = NAN
    v = torch.ones(N)
    v[row] = 0
    got = passes.finish(data, PLAIN, None, v, target, PositionRule(estimator), ReduceRule())
    assert got.table[1:3, row].eq(0).all() and got.loss.isfinite()
    assert got.metrics[METRICS.index("valid_tokens")] == data.valid.sum()
    v[row] = NAN
    got = passes.finish(data, PLAIN, None, v, target, PositionRule(estimator), ReduceRule())
    assert got.loss.isnan()


def test_given_weights() -> None:
    data, target = draw(5)
    given = torch.rand(N, generator=torch.Generator().manual_seed(0))
    given[~data.valid] = NAN
    rule = PLAIN._replace(normalize="given")
    got = passes.finish(data, rule, given, None, target, PositionRule("k1"), ReduceRule())
    expected = torch.where(data.valid, given.double(), 0)
    torch.testing.assert_close(got.table[0], expected)
    torch.testing.assert_close(
        got.table[1], torch.where(data.valid, expected * (data.now - target), 0)
    )
    for rule_, weights in ((rule, None), (PLAIN, given)):
        with pytest.raises(ValueError, match="weights must be given where"):
            passes.weigh(data, rule_, weights)


def test_infinite_drifts_of_a_part() -> None:
    """Its weights are those of equals, and its peak says that the rest of the batch is alone."""
    data, _ = draw(6, dtype=torch.float32)
    data = data._replace(old=torch.full((N,), INF))
    gate = GateRule("sequence", 1, "mean", 2.0, "batch", True)
    got = passes.weigh(data, gate)
    assert torch.equal(got.weight, data.valid.float())
    assert got.totals[0] == -INF and got.totals[1] == 0
    one = data._replace(old=torch.where(torch.arange(N) < LENGTH, data.now, data.old))
    alone = passes.weigh(one, gate)
    assert alone.weight[LENGTH:].eq(0).all() and alone.totals[0] == 0


@pytest.mark.parametrize("rows", [0, 5])
def test_no_valid_row(rows: int) -> None:
    data = RowData(
        torch.zeros(rows, dtype=torch.bool), torch.full((rows,), NAN), torch.full((rows,), NAN),
        torch.zeros(rows, dtype=torch.int64), None, rows,
    )  # fmt: skip
    reduce = ReduceRule(1.0, "sequences", True)
    for granularity in GRANULARITIES:
        for normalize in ("batch", "sequence", "none", "off"):
            gate = GateRule(granularity, 2, "rms", 1.0, normalize, True)
            rule = PositionRule("ppo", ratio=granularity)
            got = passes.finish(data, gate, None, None, data.now, rule, reduce)
            assert got.loss == 0 and got.table.eq(0).all() and got.first.eq(-1).all()
            assert got.metrics.eq(0).all() and got.totals.eq(0).all()


def test_log_ratios_are_held_within_20() -> None:
    gap = torch.tensor([25.0, -25.0, 0.5], dtype=torch.float64)
    zero = torch.zeros_like(gap)
    data = RowData(torch.ones(3, dtype=torch.bool), gap, zero, None, None, 3)
    rule = PositionRule("importance", advantage="given")
    got = passes.finish(data, PLAIN, None, None, zero - 1, rule, ReduceRule())
    torch.testing.assert_close(got.table[1], gap.clamp(-20, 20).exp())
    torch.testing.assert_close(got.table[2], torch.tensor([0, 0, math.exp(0.5)]).double())


def test_valid_rows() -> None:
    labels, cpu = torch.tensor([0, 5, -100, 4]), torch.device("cpu")

    def call(labels: Tensor | None, mask: Tensor | None, cu: Tensor | None = None) -> list[bool]:
        return passes.valid_rows(labels, mask, -100, 6, cu, 4, cpu, True).tolist()

    assert call(labels, None) == [True, True, False, True]
    assert call(labels, torch.tensor([1.0, 0.0, 1.0, 1.0])) == [True, False, False, True]
    assert call(labels, torch.tensor([2, 0, 1, 1])) == [True, False, False, True]
    assert call(None, None, torch.tensor([0, 4])) == [True] * 4
    assert call(None, torch.tensor([True, False, True, True])) == [True, False, True, True]
    with pytest.raises(ValueError, match=r"response_mask must be 0 or 1; got 0.5 at index \[1\]"):
        call(labels, torch.tensor([1.0, 0.5, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 6\) or .* got 6 at index \[3\]"):
        call(torch.tensor([0, 5, -100, 6]), None)
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to 4.*got \[0, 3\]"):
        call(labels, None, torch.tensor([0, 3]))
    bad = torch.tensor([0, 9, -100, 4])
    assert passes.valid_rows(bad, None, -100, 6, None, 4, cpu, False).tolist()[1]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("gate", "granularity", "word"),
        ("gate", "aggregate", "median"),
        ("gate", "normalize", "all"),
        ("position", "estimator", "k4"),
        ("position", "advantage", "new"),
        ("position", "ratio", "row"),
        ("reduce", "denominator", "rows"),
    ],
)
def test_unknown_choices_are_refused(part: str, name: str, value: str) -> None:
    data, target = draw()
    rules = {"gate": PLAIN, "position": PositionRule("k1"), "reduce": ReduceRule()}
    rules[part] = rules[part]._replace(**{name: value})
    with pytest.raises(ValueError, match=f"{name} must be one of .*; got '{value}'"):
        passes.finish(data, rules["gate"], None, None, target, rules["position"], rules["reduce"])
