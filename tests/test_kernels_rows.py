"""`weigh` and `finish` on Triton kernels: every option, and every way in which rows are cut.

Judged by `support/row_truth.py` in float64, with the same in float32 as the error budget.
"""

from __future__ import annotations

import math

import pytest
import torch
from drift_gate.kernels import measured, row_sums, rows
from support.launches import record_launches, refused
from support.numerics import assert_as_good_as
from support.row_truth import GateRule, PositionRule, ReduceRule, RowData, measured_rows
from support.row_truth import finish as truth_of
from torch import Tensor

BLOCKS, PPO, TOKEN_MEAN = GateRule(), PositionRule(), ReduceRule()
NAMES = ("loss", "table", "first", "metrics", "totals")


@pytest.fixture
def tiles(monkeypatch):
    """Change the tiles of the row kernels."""
    return lambda **sizes: monkeypatch.setattr(rows, "TILES", rows.TILES._replace(**sizes))


def draw(
    n: int, length: int = 0, *, borders: tuple[int, ...] = (), masked: float = 0.2, seed: int = 0
) -> tuple[RowData, Tensor]:
    """Rows whose invalid ones hold NaN, and targets."""
    generator = torch.Generator().manual_seed(seed)
    now, drift, off = torch.randn(3, n, generator=generator)
    valid = torch.rand(n, generator=generator) >= masked
    now = -now.abs()
    old, target = now + 0.3 * drift, now + off
    for x in (now, old, target):
        x[~valid] = torch.nan
    ids = torch.randint(-3, 3, (n,), generator=generator) * 2**40  # ids that recur after others
    cut = torch.tensor(borders, dtype=torch.int32) if borders else None
    return RowData(valid, now, old, ids, cut, length or n), target


def moved(data: RowData, device: torch.device) -> RowData:
    found = RowData(*(x.to(device) if isinstance(x, Tensor) else x for x in data))
    if data.spacing is None:
        return found
    statistics = (x.to(device) for x in data.spacing[:2])
    return found._replace(spacing=(*statistics, *data.spacing[2:]))


def check(
    device: torch.device,
    data: RowData,
    target: Tensor,
    gate: GateRule = BLOCKS,
    position: PositionRule = PPO,
    reduce: ReduceRule = TOKEN_MEAN,
    given: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`finish` and `weigh` are as good as plain float32."""
    on = [None if x is None else x.to(device) for x in (given, row_weights, target)]
    got = rows.finish(moved(data, device), gate, *on, position, reduce)
    again = rows.finish(moved(data, device), gate, *on, position, reduce)
    weighed = rows.weigh(moved(data, device), gate, on[0])
    everything = data, gate, given, row_weights, target, position, reduce
    eager, truth = (truth_of(*everything, dtype) for dtype in (torch.float32, torch.float64))
    for name, x, y in zip(NAMES, got, again, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7)), name
    assert torch.equal(got[2].cpu(), truth[2])
    unseen = truth[1][4].isnan() if data.measured is not None else torch.zeros_like(data.valid)
    assert got[1][4].cpu()[unseen].isnan().all()
    for i, name in enumerate(("weight", "token_loss", "slope", "coefficient", "drift")):
        x, y, z = (q[i].masked_fill(unseen, 0) for q in (got[1].cpu(), eager[1], truth[1]))
        assert_as_good_as(x, y, z, name=name)
    losses = (torch.cat([x[1][1], x[0][None]]) for x in (tuple(y.cpu() for y in got), eager, truth))
    assert_as_good_as(*losses, name="loss")
    # How far the terms of a signed mean cancel is chance: it is judged beside the largest of them.
    scale = truth[1][4].abs().nan_to_num(0.0, 0.0).max() if len(target) else 0.0
    for name, x, y, z in zip(row_sums.METRICS, got[3].cpu(), eager[3], truth[3], strict=True):
        if name == "drift_signed" or name == "ppo_kl":
            x, y, z = (torch.stack([q, q.new_tensor(float(scale))]) for q in (x, y, z))
        assert_as_good_as(*(q.reshape(-1) for q in (x, y, z)), name=name)
    for x, y, z in zip(got[4].float().cpu(), eager[4], truth[4], strict=True):
        x, y, z = (torch.stack([q, q.new_tensor(float(scale))]) for q in (x, y, z))
        assert_as_good_as(x, y, z, name="totals")
    for x, y in zip(weighed, (got[1][0], got[1][4], got[2], got[3], got[4]), strict=True):
        if x.shape == (11,):
            x, y = (q[[0, 1, 2, 3, 4, 5, 7, 8, 9]] for q in (x, y))
        if x.shape == (4,):
            x, y = x[:3], y[:3]
        # Two kernels: on a device each contracts its products as it is compiled.
        ulps = 0.0 if x.device.type == "cpu" else 4 * torch.finfo(torch.float32).eps
        assert torch.allclose(x.nan_to_num(7), y.nan_to_num(7), rtol=ulps, atol=ulps)
    return got


@pytest.mark.parametrize("estimator", ["ppo", "importance", "cispo", "k1", "k2", "k3", "given"])
def test_estimators(kernels_on_cpu, estimator):
    data, target = draw(90, 45)
    bounds = dict(dual=1.5, advantage_low=-1.5, advantage_high=1.0)
    check(kernels_on_cpu, data, target, position=PositionRule(estimator, **bounds))
    loose = PositionRule(estimator, 0.1, 0.28, advantage="current", clamp=False, floor=-2.0)
    check(kernels_on_cpu, data, target, position=loose)
    check(kernels_on_cpu, data, target, position=PositionRule(estimator, advantage="given"))
    check(kernels_on_cpu, data._replace(old=None), target, position=PositionRule(estimator))


@pytest.mark.parametrize(("bits", "scale"), [(7, 1.0), (10, 0.7)])
@pytest.mark.parametrize("n", [90, 5000])  # one program; several
def test_the_drift_that_rounding_would_show(kernels_on_cpu, bits, scale, n):
    """Labels that are the largest word, likely ones, unlikely ones; rows not measured hold NaN."""
    data, target = draw(n, n // 2)
    generator = torch.Generator().manual_seed(1)
    maximum = 30 * torch.rand(n, generator=generator) - 5
    log_sum = 3 * torch.rand(n, generator=generator)
    now = -log_sum - 4 * torch.rand(n, generator=generator)
    now[::3] = -log_sum[::3]
    measured = data.valid & (torch.arange(n) % 2 == 0)
    for x in (maximum, log_sum, now):
        x[~measured] = torch.nan
    old = (now + 0.1).masked_fill(~measured, 0)
    now = now.masked_fill(data.valid & ~measured, -1.0)
    data = data._replace(
        now=now, old=old, measured=measured, spacing=(maximum, log_sum, bits, scale)
    )
    got = check(kernels_on_cpu, data, target)
    assert got[3][row_sums.METRICS.index("drift_noise")] > 1e-3
    alone = data._replace(old=None, measured=None)
    alone = check(kernels_on_cpu, alone, target, gate=GateRule(normalize="off"))
    assert alone[3][row_sums.METRICS.index("drift_noise")] == 0


@pytest.mark.parametrize("estimator", ["ppo", "importance", "cispo", "k3"])
def test_ratios_beyond_every_clip(kernels_on_cpu, estimator):
    data, target = draw(64)
    data.old[:8] += torch.tensor([-30, 30, -19, 19, -5, 5, -2, 2])
    target[8:16] += torch.tensor([-30, 30, -19, 19, -5, 5, -2, 2])
    check(kernels_on_cpu, data, target, position=PositionRule(estimator, dual=3.0))


@pytest.mark.parametrize("granularity", ["block", "span", "sequence"])
@pytest.mark.parametrize("estimator", ["ppo", "importance", "cispo"])
def test_ratios_of_units(kernels_on_cpu, granularity, estimator):
    """Of the gate's own blocks, of others, and without a gate."""
    data, target = draw(150, borders=(0, 17, 17, 100, 150))
    position = PositionRule(estimator, 0.02, 0.03, ratio=granularity)
    ungated = GateRule("block", 20, normalize="off")
    for gate in (GateRule(granularity, 20, "max_abs"), GateRule("token"), ungated):
        check(kernels_on_cpu, data, target, gate, position)


@pytest.mark.parametrize("denominator", ["given", "tokens", "sequences"])
@pytest.mark.parametrize("token_mean", [False, True])
@pytest.mark.parametrize("granularity", ["off", "token", "block", "span", "sequence"])
def test_reductions(kernels_on_cpu, denominator, token_mean, granularity):
    data, target = draw(90, 30, masked=0.3)
    data.valid[30:60] = False  # a sequence without a valid row
    reduce = ReduceRule(0.7, denominator, token_mean)
    gate = GateRule(granularity, 7)
    if granularity == "off":
        gate = GateRule(normalize="off")
    check(kernels_on_cpu, data, target, gate, reduce=reduce)


GATES = [
    GateRule("block", 7, "mean_abs", 2.5),
    GateRule("block", 64, "rms", 1.0, "sequence"),
    GateRule("block", 1000, "max_abs", 1.0, "none"),
    GateRule("block", 1, "rms"),
    GateRule("token", 64, "mean", 1.0, "sequence"),
    GateRule("sequence", 64, "rms"),
    GateRule("span", 64, "mean"),
    GateRule("span", 64, "rms", 1.0, "sequence"),
    GateRule("span", 64, "mean_abs"),
    GateRule("span", 64, "max_abs"),
    GateRule("block", 64, "mean", 0.0),
    GateRule("block", 64, "mean", 40.0, "batch", True),
]


@pytest.mark.parametrize("cut", ["padded", "packed"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(kernels_on_cpu, gate, cut, tiles):
    """Spans cross tiles of 32 places; blocks cross 32 lanes and walks of 64 rows."""
    tiles(places=32, lanes=32, walk=64)
    if cut == "packed":  # the second sequence is empty, the third begins within a tile
        data, target = draw(140, borders=(0, 17, 17, 100, 140))
    else:
        data, target = draw(140, 70)
    check(kernels_on_cpu, data, target, gate)


@pytest.mark.parametrize("cut", ["padded", "packed"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_measured_rows(kernels_on_cpu, gate, cut, tiles, monkeypatch):
    """Every 3rd row: blocks cross 32 lanes and a span's rows tiles; unmeasured ones hold NaN."""
    tiles(places=32, lanes=32, walk=64)
    monkeypatch.setattr(measured, "TILES", rows.TILES)
    borders = (0, 17, 17, 100, 140) if cut == "packed" else ()
    data, target = draw(140, 0 if borders else 70, borders=borders)
    gate = gate._replace(sample_every=3)
    seen = measured_rows(data, gate)
    if gate.granularity in ("block", "sequence"):
        found = measured.measured_rows(moved(data, kernels_on_cpu), gate)
        assert torch.equal(found.cpu(), seen)
    data.now[data.valid & ~seen] = torch.nan
    check(kernels_on_cpu, data._replace(measured=seen), target, gate, PositionRule("given"))


@pytest.mark.parametrize("granularity", ["block", "span", "sequence"])
def test_measured_rows_beside_a_ratio(kernels_on_cpu, granularity, tiles):
    """The ratio is of all valid rows of a unit, the gate of the measured ones; many programs."""
    tiles(alone=32, rows=16, sums=4, programs=20, places=32)
    data, target = draw(150, borders=(0, 17, 17, 100, 150))
    gate = GateRule(granularity, 20, "rms", sample_every=4)
    data = data._replace(measured=measured_rows(data, gate))
    position = PositionRule("ppo", 0.02, 0.03, ratio=granularity)
    for denominator in ("tokens", "sequences"):
        check(kernels_on_cpu, data, target, gate, position, ReduceRule(1.0, denominator, True))
    given = torch.rand(150, generator=torch.Generator().manual_seed(1))
    check(kernels_on_cpu, data, target, GateRule(normalize="given"), position, given=given)


def test_measured_rows_without_any(kernels_on_cpu):
    data, _ = draw(8, 4, masked=1.1)
    for gate in (GateRule(sample_every=2), GateRule("sequence", sample_every=2)):
        assert not measured.measured_rows(moved(data, kernels_on_cpu), gate).any()
    empty = RowData(*(x[:0] if isinstance(x, Tensor) else x for x in data))
    assert len(measured.measured_rows(moved(empty, kernels_on_cpu), GateRule())) == 0


@pytest.mark.parametrize("normalize", ["batch", "sequence", "none", "off", "given"])
def test_many_programs(kernels_on_cpu, normalize, tiles):
    """Several tiles of rows, of parts and of columns; several blocks a program."""
    tiles(alone=32, rows=16, sums=4, sequence=16, programs=20, tokens=32, places=32)
    data, target = draw(150, borders=tuple(torch.linspace(0, 150, 8).int().tolist()))
    weights = torch.rand(150, generator=torch.Generator().manual_seed(1))
    position = PositionRule(floor=-1.5)
    for granularity in ("block", "token", "span"):
        gate = GateRule(granularity, 5, "mean", 1.0, normalize)
        by_sequence = ReduceRule(1.0, "sequences", True)
        for reduce in (by_sequence, TOKEN_MEAN) if granularity == "block" else (by_sequence,):
            check(kernels_on_cpu, data, target, gate, position, reduce, weights)


def test_spans_of_all_kinds(kernels_on_cpu, tiles):
    """One span over all tiles; one row a span; runs; and as many tiles as exceed a look."""
    tiles(places=8, columns=4, ends=2)
    data, target = draw(60, 30)
    for ids in (
        torch.zeros(60).long(), torch.arange(60), torch.arange(60) // 7, -torch.arange(60) % 13,
    ):  # fmt: skip
        for aggregate in ("mean", "rms"):
            gate = GateRule("span", 64, aggregate)
            check(kernels_on_cpu, data._replace(spans=ids), target, gate)


def test_a_response_that_begins_late(kernels_on_cpu, tiles):
    tiles(walk=32)
    data, target = draw(300, 150, masked=0.0)
    starts = torch.tensor([[100], [149]])
    valid = (torch.arange(150).expand(2, 150) >= starts).flatten()
    check(kernels_on_cpu, data._replace(valid=valid), target, GateRule("block", 8))


@pytest.mark.parametrize("mode", ["weights", "gate"])
def test_row_weights(kernels_on_cpu, mode):
    """A row with weight 0 may hold anything, and still counts."""
    data, target = draw(80, 40)
    v = torch.rand(80, generator=torch.Generator().manual_seed(0)) - 0.2
    v[v < 0.2] = 0
    target[v == 0] = torch.nan
    v[~data.valid] = torch.nan
    given = torch.rand(80, generator=torch.Generator().manual_seed(2)) * 1e-25
    gate = GateRule(normalize="given") if mode == "weights" else GateRule("block", 9)
    loss, *_ = check(
        kernels_on_cpu, data, target, gate, given=given if mode == "weights" else None,
        row_weights=v,
    )  # fmt: skip
    assert loss.isfinite()


@pytest.mark.parametrize("granularity", ["token", "block", "span", "sequence"])
@pytest.mark.parametrize("part", [False, True])
def test_infinite_drift(kernels_on_cpu, granularity, part):
    """Some blocks, and then all of them; a part of a batch tells all of them from none."""
    data, target = draw(60, 30, masked=0.0)
    data.old[:5] = -math.inf
    position = PositionRule("k1")
    gate = GateRule(granularity, 10, "mean_abs", part=part)
    monotone = data._replace(spans=torch.arange(60) // 10)
    check(kernels_on_cpu, monotone, target, gate, position)
    data.old[:] = -math.inf
    if part:
        *_, totals = check(kernels_on_cpu, monotone, target, gate, position)
        assert totals[0] == -math.inf
    else:
        *_, totals = rows.finish(
            moved(monotone, kernels_on_cpu), gate, None, None, target.to(kernels_on_cpu), position,
            ReduceRule(),
        )  # fmt: skip
        assert totals[1].isnan()


@pytest.mark.parametrize("name", ["now", "target"])
@pytest.mark.parametrize("estimator", ["ppo", "importance", "cispo", "k1", "k2", "k3"])
@pytest.mark.parametrize("clamp", [False, True])
def test_nan_stays_in_the_loss(kernels_on_cpu, name, estimator, clamp):
    data, target = draw(60, 30, masked=0.0)
    (target if name == "target" else data.now)[3] = torch.nan
    position = PositionRule(estimator, advantage_high=2.0, floor=-5.0, clamp=clamp)
    loss, table, *_ = rows.finish(
        moved(data, kernels_on_cpu), GateRule(normalize="off"), None, None,
        target.to(kernels_on_cpu), position, ReduceRule(),
    )  # fmt: skip
    assert loss.isnan()
    assert table[1, 3].isnan()
    assert table[2, 3].isnan() or estimator == "k1"


@pytest.mark.parametrize("granularity", ["token", "block", "span", "sequence"])
@pytest.mark.parametrize("aggregate", ["mean", "mean_abs", "rms", "max_abs"])
def test_nan_stays_in_the_gate(kernels_on_cpu, granularity, aggregate):
    data, _ = draw(60, 30, masked=0.0)
    data.old[3] = torch.nan
    weight, _, _, metrics, totals = rows.weigh(
        moved(data, kernels_on_cpu), GateRule(granularity, 10, aggregate)
    )
    assert weight.isnan().all()
    assert metrics[:7].isnan()[[0, 1, 2, 3, 4, 5]].all()
    assert totals[1].isnan()


@pytest.mark.parametrize("length", [0, 1, 5])
def test_no_valid_row(kernels_on_cpu, length):
    data, target = draw(2 * length, length, masked=1.1)
    for gate in (GateRule(), GateRule("span"), GateRule(normalize="sequence")):
        for reduce in (ReduceRule(), ReduceRule(1.0, "sequences", True)):
            loss, table, first, metrics, totals = check(
                kernels_on_cpu, data, target, gate, reduce=reduce
            )
            assert loss == 0 and (table == 0).all() and (first == -1).all()
            assert (metrics == 0).all() and (totals == 0).all()


def names(run) -> list[str]:
    with record_launches() as launches:
        run()
    return [launch.name for launch in launches]


def test_launches(kernels_on_cpu, tiles):
    data, target = draw(60, 30)
    data, target = moved(data, kernels_on_cpu), target.to(kernels_on_cpu)

    def run(gate: GateRule, ratio: str = "token", *reduce) -> list[str]:
        arguments = data, gate, None, None, target, PositionRule(ratio=ratio), ReduceRule(*reduce)
        return names(lambda: rows.finish(*arguments))

    two = ["_row_blocks", "_sampled_token"]
    assert run(GateRule()) == run(GateRule(), "block", 1.0, "sequences", True) == two
    assert run(GateRule(normalize="off")) == two[1:]
    assert run(GateRule(normalize="off"), "sequence") == two
    assert run(GateRule(), "sequence") == ["_row_blocks", *two]
    assert run(GateRule(normalize="sequence")) == [two[0], "_sequence_gates", two[1]]
    assert run(GateRule("span")) == ["_span_parts", "_span_blocks", two[1]]
    assert names(lambda: rows.weigh(data, GateRule())) == two
    tiles(alone=32, rows=16)
    assert run(GateRule()) == run(GateRule(normalize="off")) == [*two, "_total"]


@pytest.mark.parametrize(
    "change",
    [
        dict(gate=GateRule(aggregate="median")),
        dict(gate=GateRule(normalize="epoch")),
        dict(gate=GateRule(granularity="word")),
        dict(position=PositionRule("k4")),
        dict(position=PositionRule(advantage="new")),
        dict(position=PositionRule(ratio="word")),
        dict(reduce=ReduceRule(denominator="words")),
    ],
    ids=str,
)
def test_nothing_falls_through(kernels_on_cpu, change):
    data, target = draw(30)
    data = RowData(*[x.to(kernels_on_cpu) if isinstance(x, Tensor) else x for x in data])
    target = target.to(kernels_on_cpu)
    arguments = dict(gate=GateRule(), position=PositionRule(), reduce=ReduceRule()) | change
    with refused():
        rows.finish(
            data, arguments["gate"], None, None, target, arguments["position"], arguments["reduce"]
        )
