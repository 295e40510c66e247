"""Row functions in C beside those in PyTorch, and beside formulas where those lack the option."""

from __future__ import annotations

import math

import pytest
import torch

from drift_gate.passes import native
from drift_gate.passes import torch as plain
from drift_gate.passes.rules import (
    METRICS,
    POSITION_LOSSES,
    GateRule,
    PositionRule,
    ReduceRule,
    RowData,
)

pytestmark = pytest.mark.skipif(
    native.instruction_set() is None, reason="there is no compiled library"
)
inf, nan = math.inf, math.nan
GRANULARITIES = ("token", "block", "span", "sequence")
AGGREGATES = ("mean", "mean_abs", "rms", "max_abs")
NORMALIZE = ("batch", "sequence", "none", "off", "given")
GATE = GateRule("token", 1, "mean", 0.0, "off", False)
PPO = PositionRule("ppo", 0.2, 0.3, 3.0, -inf, inf, "old", "token", True, -inf)
SUM = ReduceRule(1.0, "given", False)
CPU = torch.device("cpu")


class Draw:
    """Random row data and choices."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integer(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))

    def one_of(self, *choices):
        return choices[self.integer(len(choices))]

    def floats(self, n: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(n, generator=self.generator) * scale

    def data(self, spread: float = 1.0, *, old: bool = True) -> RowData:
        """Padded or packed, some sequences empty or without a valid row; invalid rows hold NaN."""
        borders = None
        n, length = 1 + self.integer(60), 1 + self.integer(12)
        if self.integer(2):
            cuts = torch.randint(n + 1, (self.integer(6),), generator=self.generator)
            borders = torch.cat([torch.zeros(1).long(), cuts.sort().values, torch.tensor([n])])
            borders = borders.to(self.one_of(torch.int32, torch.int64))
        else:
            n = (n + length - 1) // length * length
        valid = torch.rand(n, generator=self.generator) < self.one_of(0.0, 0.5, 0.9, 1.0)
        now, before = -self.floats(n).abs(), -self.floats(n).abs()
        before = now + spread * (before - now)
        spans = torch.randint(-1, 4, (n,), generator=self.generator)
        now[~valid], before[~valid], spans[~valid] = nan, inf, 1
        return RowData(valid, now, before if old else None, spans, borders, length)

    def gate(self, **fixed) -> GateRule:
        options = dict(
            granularity=self.one_of(*GRANULARITIES), block_size=self.one_of(1, 3, 64),
            aggregate=self.one_of(*AGGREGATES), tau=self.one_of(0.0, 1.0, 30.0),
            normalize=self.one_of(*NORMALIZE), part=self.one_of(False, True),
            sample_every=self.one_of(1, 1, 2, 5),
        )  # fmt: skip
        return GateRule(**options | fixed)


def assert_close(got, expected, name, tolerance=3e-6):
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def draw_position(draw: Draw) -> PositionRule:
    high = draw.one_of(inf, 0.4)
    estimator = draw.one_of(*POSITION_LOSSES)
    return PositionRule(
        estimator, 0.2, 0.3, draw.one_of(inf, 1.5), -high, high, "old", "token", True, -inf
    )


@pytest.mark.parametrize("seed", range(400))
def test_finish_and_weigh_as_in_torch(seed):
    draw = Draw(seed)
    data = draw.data(draw.one_of(0.01, 1.0, 30.0), old=seed % 7 > 0)
    gate, position = draw.gate(), draw_position(draw)
    reduce = ReduceRule(
        draw.one_of(1.0, 0.5), draw.one_of("given", "tokens", "sequences"), seed % 3 == 0
    )
    n = len(data.valid)
    given, target = draw.floats(n).abs(), -draw.floats(n).abs()
    target[~data.valid] = nan
    given = given if gate.normalize == "given" else None
    got = native.finish(data, gate, given, None, target, position, reduce)
    expected = plain.finish(data, gate, given, None, target, position, reduce)
    for name, one, other in zip(got._fields, got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        assert_close(one, other, f"{name} of {gate}, {position}")
    assert (got.table[:, ~data.valid] == 0).all()
    weights = native.weigh(data, gate, given)
    assert torch.equal(weights.weight, got.table[0])
    assert_close(weights.drift, got.table[4], "drift", 0)
    assert torch.equal(weights.first, got.first)
    clipped = METRICS.index("pg_clipfrac")
    assert weights.metrics[clipped] == 0 and weights.metrics[-1] == 0
    assert torch.equal(weights.metrics[:clipped], got.metrics[:clipped])
    assert torch.equal(weights.totals[:3], got.totals[:3])
    assert weights.totals[3] == weights.totals[2] == data.valid.sum()


@pytest.mark.parametrize("seed", range(120))
def test_infinite_and_nan_drifts_as_in_torch(seed):
    draw = Draw(1000 + seed)
    data = draw.data()
    n = len(data.valid)
    assert data.old is not None
    some = torch.rand(n, generator=draw.generator) < draw.one_of(0.1, 0.5, 1.0)
    data.old[some] = draw.one_of(inf, -inf, nan, 3e38)
    gate = draw.gate(tau=draw.one_of(1.0, 0.5))
    position = PPO._replace(estimator=draw.one_of("importance", "k1"))
    target = -draw.floats(n).abs()
    given = target if gate.normalize == "given" else None
    got = native.finish(data, gate, given, None, target, position, SUM)
    expected = plain.finish(data, gate, given, None, target, position, SUM)
    for name, one, other in zip(got._fields, got, expected, strict=True):
        assert_close(one, other, f"{name} of {gate}")


def test_a_part_whose_drifts_are_all_infinite_has_weights_and_no_peak():
    valid = torch.ones(4, dtype=torch.bool)
    data = RowData(valid, torch.zeros(4), torch.full((4,), inf), None, None, 4)
    gate = GATE._replace(normalize="batch", tau=1.0)
    found = native.weigh(data, gate._replace(part=True))
    assert found.weight.tolist() == [1.0] * 4 and found.totals[0] == -inf
    assert native.weigh(data, gate).weight.isnan().all()


def test_huge_drifts_keep_their_differences():
    """In float32 1e9 and 1e9 + 1 are one number; the gate of a mean is computed before rounding."""
    valid = torch.ones(4, dtype=torch.bool)
    old = torch.tensor([1e9, 1e9, 1e9, 1e9 + 64])
    data = RowData(valid, torch.zeros(4), old, None, None, 2)
    found = native.weigh(data, GateRule("sequence", 1, "mean", 1.0, "batch", False))
    share = math.exp(-32)
    expected = torch.tensor([1.0, 1, share, share]) * (2 / (1 + share))
    torch.testing.assert_close(found.weight, expected, rtol=1e-6, atol=0)


def test_weights_too_small_for_their_squares_have_effective_rows():
    valid = torch.ones(4, dtype=torch.bool)
    data = RowData(valid, torch.zeros(4), torch.full((4,), 400.0), None, None, 4)
    metrics = native.weigh(data, GATE._replace(normalize="none", tau=1.0)).metrics
    assert metrics[METRICS.index("gate_ess")] == 1 and metrics[METRICS.index("gate_max")] == 0


def unit_of(data: RowData, granularity: str, block_size: int) -> list[tuple[int, ...]]:
    """A name for each row's block: sequence, and what tells its blocks apart."""
    n = len(data.valid)
    if data.cu_seqlens is None:
        sequence = [row // data.length for row in range(n)]
    else:
        borders = data.cu_seqlens.tolist()
        sequence = [max(i for i, b in enumerate(borders) if b <= row) for row in range(n)]
    first: dict[int, int] = {}
    for row in range(n):
        if data.valid[row]:
            first.setdefault(sequence[row], row)
    parts = {
        "token": lambda row: row,
        "block": lambda row: (row - first.get(sequence[row], row)) // block_size,
        "span": lambda row: int(data.spans[row]),
        "sequence": lambda row: 0,
    }
    return [(sequence[row], parts[granularity](row)) for row in range(n)]


def formula(data, weight, block_size, target, position, by):
    """Token loss and slope of every row, as the rules say, in Python's floats."""
    n = len(data.valid)
    now = data.now.double().tolist()
    old = now if data.old is None else data.old.double().tolist()
    units = unit_of(data, position.ratio, block_size)
    losses, slopes, clips, floored = [0.0] * n, [0.0] * n, 0, 0
    for t in range(n):
        if not data.valid[t]:
            continue
        goal = max(float(target[t]), position.floor)
        floored += float(target[t]) < position.floor
        same = [s for s in range(n) if data.valid[s] and units[s] == units[t]]
        log_ratio = sum(now[s] - old[s] for s in same) / len(same)
        base = {"old": old[t], "current": now[t], "given": 0.0}[position.advantage]
        a = min(max(goal - base, position.advantage_low), position.advantage_high)
        r = math.exp(min(max(log_ratio, -20), 20))
        within = min(max(r, 1 - position.low), 1 + position.high)
        if position.estimator == "cispo":
            loss, slope, clipped = -within * a * now[t], -within * a, r != within
        elif position.estimator == "k3":
            x = goal - now[t]
            loss, slope, clipped = math.exp(x) - x - 1, 1 - math.exp(x), False
        else:
            loss, clipped = max(-r * a, -within * a), -within * a > -r * a
            capped = a < 0 and loss > -position.dual * a
            slope = 0 if clipped or capped or abs(log_ratio) > 20 else -r * a
            loss = -position.dual * a if capped else loss
        v = 1.0 if by is None else float(by[t])
        clips += clipped
        losses[t], slopes[t] = (float(weight[t]) * v * x if v else 0.0 for x in (loss, slope))
    rows_ = max(int(data.valid.sum()), 1)
    return torch.tensor(losses), torch.tensor(slopes), clips / rows_, floored


@pytest.mark.parametrize("seed", range(250))
def test_new_options_by_their_formulas(seed):
    draw = Draw(5000 + seed)
    data = draw.data(draw.one_of(0.1, 1.0, 60.0), old=seed % 5 > 0)
    n, gate = len(data.valid), draw.gate(normalize=draw.one_of("batch", "none", "off"))
    position = PositionRule(
        draw.one_of("cispo", "ppo", "k3"), 0.1, 0.3, draw.one_of(inf, 1.5),
        draw.one_of(-inf, -0.3), draw.one_of(inf, 0.5), draw.one_of("old", "current", "given"),
        draw.one_of(*GRANULARITIES), False, draw.one_of(-inf, -1.0),
    )  # fmt: skip
    target = -draw.floats(n).abs()
    by = None
    if seed % 2:
        by = draw.floats(n).abs()
        by[torch.rand(n, generator=draw.generator) < 0.3] = 0
        by[~data.valid] = nan
    reduce = ReduceRule(2.0, draw.one_of("given", "tokens", "sequences"), seed % 3 == 0)
    got = native.finish(data, gate, None, by, target, position, reduce)
    expected = formula(data, got.table[0], gate.block_size, target, position, by)
    losses, slopes, clip_share, floored = expected
    assert_close(got.table[1], losses, "token loss")
    assert_close(got.table[2], slopes, "slope")
    assert_close(got.metrics[METRICS.index("pg_clipfrac")], torch.tensor(clip_share), "clips")
    assert got.metrics[METRICS.index("floored")] == floored
    total = (losses.double() * got.table[3].double()).sum().float()
    assert_close(got.loss, total, "loss", 1e-5)
    coefficient = native.finish(data, gate, None, None, target, position, reduce).table[3]
    assert torch.equal(got.table[3], coefficient)  # D counts rows, whatever they weigh


def test_k3_with_and_without_its_clamps_far_out():
    valid, now = torch.ones(2, dtype=torch.bool), torch.tensor([-1.0, -26.0])
    data, target = RowData(valid, now, None, None, None, 2), torch.tensor([-31.0, -1.0])
    for clamp, losses, slopes in (
        (True, [10, 10], [0, 0]),
        (False, [29 + math.exp(-30), math.expm1(25) - 25], [-math.expm1(-30), -math.expm1(25)]),
    ):
        position = PPO._replace(estimator="k3", clamp=clamp)
        table = native.finish(data, GATE, None, None, target, position, SUM).table
        torch.testing.assert_close(table[1], torch.tensor(losses, dtype=torch.float32))
        torch.testing.assert_close(table[2], torch.tensor(slopes, dtype=torch.float32))


def test_rows_of_weight_0_may_hold_anything_but_count():
    valid = torch.ones(4, dtype=torch.bool)
    now = torch.tensor([-1.0, nan, -inf, -2.0])
    data = RowData(valid, now, None, None, None, 4)
    by = torch.tensor([1.0, 0.0, 0.0, 1.0])
    position = PPO._replace(estimator="k1")
    reduce = ReduceRule(1.0, "tokens", False)
    found = native.finish(data, GATE, None, by, torch.tensor([0.0, nan, 0, 0]), position, reduce)
    assert found.table[1].tolist() == [-1, 0, 0, -2] and found.table[2].tolist() == [1, 0, 0, 1]
    assert found.loss == -0.75 and found.metrics[METRICS.index("valid_tokens")] == 4


def test_equal_ids_of_a_sequence_are_one_block_and_many_are_fast():
    n = 50_000
    spans = torch.randint(-(2**62), 2**62, (n // 2,), generator=torch.Generator().manual_seed(0))
    spans = torch.cat([spans, spans.flip(0)])
    valid = torch.ones(n, dtype=torch.bool)
    data = RowData(valid, torch.zeros(n), torch.zeros(n), spans, None, n)
    found = native.weigh(data, GATE._replace(granularity="span"))
    order = torch.arange(n // 2, dtype=torch.int32)
    assert torch.equal(found.first, torch.cat([order, order.flip(0)]))
    halves = data._replace(length=n // 2)
    assert torch.equal(
        native.weigh(halves, GATE._replace(granularity="span")).first,
        torch.arange(n, dtype=torch.int32),
    )


def test_no_rows():
    none = torch.zeros(0)
    data = RowData(none.bool(), none, none, none.long(), None, 5)
    gate = GateRule("span", 1, "rms", 1.0, "sequence", False)
    found = native.finish(data, gate, None, None, none, PPO, ReduceRule(1.0, "tokens", True))
    assert found.loss == 0 and found.table.shape == (5, 0) and found.first.shape == (0,)
    assert (found.metrics == 0).all() and (found.totals == 0).all()


def test_unknown_names_and_missing_tensors_raise():
    valid, zero = torch.ones(2, dtype=torch.bool), torch.zeros(2)
    data = RowData(valid, zero, zero, None, None, 2)
    for field, value in (("granularity", "word"), ("aggregate", "sum"), ("normalize", "all")):
        with pytest.raises(ValueError, match=f"{field} must be one of .*; got '{value}'"):
            native.weigh(data, GATE._replace(**{field: value}))
    for field in ("estimator", "advantage", "ratio"):
        with pytest.raises(ValueError, match=f"{field} must be one of .*; got 'new'"):
            native.finish(data, GATE, None, None, zero, PPO._replace(**{field: "new"}), SUM)
    with pytest.raises(ValueError, match="denominator must be one of given, tokens, sequences"):
        native.finish(data, GATE, None, None, zero, PPO, SUM._replace(denominator="rows"))
    with pytest.raises(ValueError, match="spans must be a tensor"):
        native.weigh(data, GATE._replace(granularity="span"))
    with pytest.raises(ValueError, match="given must be a tensor"):
        native.weigh(data, GATE._replace(normalize="given"))
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        native.weigh(data, GATE._replace(block_size=0))
    with pytest.raises(TypeError, match="row data must be float32 of 2 elements"):
        native.weigh(data._replace(now=zero.double()), GATE)


def valid_rows(labels, mask=None, borders=None, ignore=-100, vocab=10, check=True, n=None):
    n = len(labels) if n is None else n
    return native.valid_rows(labels, mask, ignore, vocab, borders, n, CPU, check)


MASKS = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.bfloat16, torch.float16, torch.float32, torch.float64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_valid_rows_by_label_and_mask(dtype):
    labels = torch.tensor([3, -100, 0, 9, 5, -100])
    mask = torch.tensor([1, 1, 0, 1, 0, 0]).to(dtype)
    expected = [True, False, False, True, False, False]
    for kind in (torch.int32, torch.int64):
        assert valid_rows(labels.to(kind), mask).tolist() == expected
    assert valid_rows(None, mask, n=6).tolist() == mask.bool().tolist()
    assert valid_rows(labels).tolist() == (labels != -100).tolist()
    if not dtype.is_floating_point and dtype != torch.bool:
        assert valid_rows(labels, mask * 2).tolist() == expected  # not 0 is valid


@pytest.mark.parametrize("dtype", MASKS[-4:], ids=str)
@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, nan, inf])
def test_a_float_mask_holds_0_and_1_alone(dtype, value):
    mask = torch.tensor([1.0, -0.0, 0.0, value], dtype=dtype)
    labels = torch.zeros(4, dtype=torch.int64)
    message = rf"response_mask must hold 0 and 1 alone; got {value} at index \[3\] \(row_weights"
    with pytest.raises(ValueError, match=message):
        valid_rows(labels, mask)
    assert valid_rows(labels, mask, check=False).tolist() == [True, False, False, True]
    assert valid_rows(labels[:3], mask[:3]).tolist() == [True, False, False]


def test_labels_and_borders_are_checked_as_in_torch():
    cases = [
        (torch.tensor([0, 10, -3]), None, None),
        (torch.tensor([0, -3, 10], dtype=torch.int32), torch.tensor([1, 1, 1]), None),
        (torch.zeros(6, dtype=torch.int64), None, torch.tensor([0, 3, 2, 6])),
        (torch.zeros(6, dtype=torch.int64), None, torch.tensor([1, 6], dtype=torch.int32)),
        (torch.zeros(6, dtype=torch.int64), None, torch.tensor([0, 1, 2, 3, 3, 3, 3, 4, 5])),
    ]
    for labels, mask, borders in cases:
        with pytest.raises(ValueError, match="must") as expected:
            plain.valid_rows(labels, mask, -100, 10, borders, len(labels), CPU, True)
        with pytest.raises(ValueError, match="must") as got:
            valid_rows(labels, mask, borders)
        assert str(got.value) == str(expected.value)
        assert valid_rows(labels, mask, borders, check=False).all()
    masked = valid_rows(torch.tensor([0, 10, -3]), torch.tensor([1, 0, 0]), torch.tensor([0, 0, 3]))
    assert masked.tolist() == [True, False, False]
    assert valid_rows(torch.zeros(0).long(), None, torch.tensor([0])).shape == (0,)
