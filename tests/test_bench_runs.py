"""How the benchmarks measure: side by side, within a time budget, kept as they come."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch
from drift_gate.bench import floors, harness, inputs, record, runs
from drift_gate.bench.bounds import Bounds, TooLong, within
from drift_gate.bench.cases import Case
from drift_gate.bench.harness import Implementation, Suite
from drift_gate.bench.peers import guard
from drift_gate.bench.record import Result
from drift_gate.bench.truth import Expected
from torch import Tensor

SMALL = Case("work", 70, 259, "float32", k=8)  # a block of rows and a part; an odd vocabulary
CPU = torch.device("cpu")


def square(work: Any) -> Any:
    return runs.train(lambda logits: (logits**2).mean())


def overwriting(work: Any) -> Any:
    def run(logits: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"grad": logits.mul_(2 / logits.numel())}

    return run


def absent(work: Any) -> Any:
    raise guard.LeftOut("nobody is here")


def broken(work: Any) -> Any:
    def run(logits: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("no such kernel")

    return run


def toy(*implementations: Implementation) -> Suite:
    """A mean of squares, whose gradient is 2 z / n."""

    def truths(work: inputs.Work) -> dict[str, Any]:
        grad = 2 * work.logits64(work.checked) / work.logits.numel()
        return {"same": {"grad": Expected(grad, work.checked)}}

    eager = Implementation("eager", square)
    return Suite(
        "toy", ("work",), lambda gpu: SMALL, inputs.draw, lambda case: floors.Floor(10**6, 10**6),
        truths, (eager, *implementations),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, Result]:
    suite = toy(
        Implementation("in place", overwriting, overwrites=True),
        Implementation("after it", square, "note"),
        Implementation("absent", absent),
        Implementation("broken", broken),
        Implementation("large", square, temporaries=1e15),
    )
    return harness.measure(suite, SMALL, CPU, Bounds(rounds=3))


def test_every_implementation_is_measured_on_the_same_inputs(measured):
    """One that overwrites the logits leaves nothing of it to the next."""
    for name in ("eager", "in place", "after it"):
        found = measured[name]
        assert found.errors["grad"]["max"] <= 1e-6 * found.errors["grad"]["scale"]
        assert len(found.seconds) == 3 and found.ratio_quartiles is not None
    assert measured["eager"].ratio_quartiles == (1, 1, 1)
    logits = 70 * 259 * 4
    assert measured["in place"].extra_bytes < logits <= measured["eager"].extra_bytes
    assert measured["in place"].gradient_bytes == 0
    assert measured["eager"].gradient_bytes == logits


def test_what_cannot_run_is_left_out(measured):
    assert measured["absent"].left_out == "nobody is here"
    assert measured["broken"].left_out == "RuntimeError: no such kernel"
    assert "GB are free" in measured["large"].left_out
    for name in ("absent", "broken", "large"):
        assert measured[name].seconds == []


def test_this_package_may_not_fail():
    with pytest.raises(RuntimeError, match="no such kernel"):
        harness.measure(toy(Implementation("drift_gate", broken)), SMALL, CPU, Bounds(rounds=1))


# What bounds a run.


def delayed(seconds: float) -> Any:
    def make(work: Any) -> Any:
        def run(logits: Tensor) -> dict[str, Tensor]:
            for _ in range(round(seconds / 0.01)):
                time.sleep(0.01)
            return square(work)(logits)

        return run

    return make


def test_a_call_is_stopped_at_its_limit():
    start = time.monotonic()
    with pytest.raises(TooLong), within(0.2):
        time.sleep(30)
    assert time.monotonic() - start < 10
    with within(0.2):
        pass
    time.sleep(0.3)  # no alarm is left behind


def test_a_slow_peer_is_called_once_and_a_slower_one_is_stopped():
    suite = toy(
        Implementation("quick", square),
        Implementation("slow", delayed(0.5)),
        Implementation("slower", delayed(60)),
        Implementation("slow once compiled", delayed(0.5), compiles=True),
    )
    bounds = Bounds(rounds=2, slack=0.2, slowest=0, compiling=0)
    found = harness.measure(suite, SMALL, CPU, bounds._replace(slack=2))
    assert [len(found[name].seconds) for name in ("quick", "slow")] == [2, 2]
    assert found["slower"].left_out == "one call takes more than 2 s"
    # An eager call of a millisecond, and 100 times as long allowed.
    bounds = bounds._replace(slack=0.2, slowest=2000, slow=1.5)
    found = harness.measure(suite, SMALL, CPU, bounds, ("quick", "slow", "slow once compiled"))
    for name in ("slow", "slow once compiled"):
        assert found[name].one_call and len(found[name].samples) == 1
        assert found[name].samples[0] > 0.5 and found[name].ratio_quartiles[1] > 1.5
        assert found[name].extra_bytes > 0 and found[name].errors["grad"]["scale"] > 0
    assert not found["quick"].one_call


def test_what_the_time_budget_does_not_reach_is_left_out():
    compiled = Implementation("torch.compile of eager", square)
    suite = toy(compiled, Implementation("late", square), Implementation("drift_gate", square))
    bounds = Bounds(rounds=5, end=time.monotonic() - 1)
    found = harness.measure(suite, SMALL, CPU, bounds)
    assert found["late"].left_out == harness.UNREACHED and found["late"].seconds == []
    assert found["torch.compile of eager"].left_out is None  # a row may need it
    for name in ("eager", "drift_gate"):  # must run, for one round
        assert len(found[name].seconds) == 1 and found[name].left_out is None


def test_nothing_goes_on_beyond_a_hard_end():
    """Neither this package and the baseline, nor what sets a case up."""
    suite = toy(Implementation("drift_gate", square), Implementation("peer", square))
    past = Bounds(rounds=5, end=time.monotonic() - 1, hard=True)
    found = harness.measure(suite, SMALL, CPU, past)
    assert {r.left_out for r in found.values()} == {harness.UNREACHED}
    slow = Implementation("eager", delayed(60))
    start = time.monotonic()
    for stuck in (
        suite._replace(implementations=(slow, *suite.implementations[1:])),
        suite._replace(truths=lambda work: time.sleep(60)),
    ):
        bounds = Bounds(rounds=5, end=time.monotonic() + 1, hard=True)
        found = harness.measure(stuck, SMALL, CPU, bounds)
        assert {r.left_out for r in found.values()} == {harness.UNREACHED}
        assert not any(r.seconds for r in found.values())
    assert time.monotonic() - start < 30


def test_where_no_round_fits_the_warm_call_counts():
    suite = toy(Implementation("drift_gate", delayed(1.0)))
    bounds = Bounds(rounds=5, end=time.monotonic() + 4.5, hard=True)
    found = harness.measure(suite, SMALL, CPU, bounds)
    ours = found["drift_gate"]
    assert ours.left_out in (None, harness.UNREACHED)  # a busy machine gets no further
    assert ours.left_out or 1 <= len(ours.seconds) <= 2


def test_results_are_kept_as_they_come():
    seen = []

    def keep(results: dict[str, Result]) -> None:
        seen.append({name: (len(r.seconds), r.left_out) for name, r in results.items()})
        if seen[-1]["eager"][0] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.measure(toy(Implementation("absent", absent)), SMALL, CPU, Bounds(5), keep=keep)
    cut = (0, harness.CUT)
    assert seen[0] == {"eager": cut, "absent": cut}
    assert seen[-3:] == [
        {"eager": (n, None if n else harness.CUT), "absent": (0, "nobody is here")}
        for n in range(3)
    ]


# Results.


def test_schema_of_a_result(measured, tmp_path):
    path = tmp_path / "a.json"
    wanted = list(measured.values())
    record.write(path, wanted)
    back = record.read(path)
    assert json.dumps([r.as_dict() for r in back]) == json.dumps([r.as_dict() for r in wanted])
    data = json.loads(path.read_text())["results"][0]
    assert data["bytes_must_move"] == 10**6
    median = sorted(s for one in data["seconds"] for s in one)[1]
    assert data["gb_per_s"] == pytest.approx(1e-3 / median)
    assert data["fraction_of_copy"] == pytest.approx(1e6 / median / data["copy_bytes_per_s"])
    assert data["machine"]["torch"] == torch.__version__
    assert {"device", "commit", "date", "threads", "python"} <= set(data["machine"])
    path.write_text("[]")
    with pytest.raises(ValueError, match="no benchmark results of schema"):
        record.read(path)


def test_the_device_is_timed_beside_the_products_and_of_the_others_at_once(monkeypatch, measured):
    """A graph holds memory: those of peers are gone before the rounds begin."""
    monkeypatch.setattr(harness.device_time, "timer", lambda *run: (lambda: 0.5, "graph"))
    timers: dict[str, Any] = {}
    for name in ("drift_gate, in place", "bare GEMMs", "a peer"):
        result = dataclasses.replace(measured["eager"], implementation=name, device_seconds=[])
        harness._time_device(result, (lambda: None, lambda: None), timers, CPU)
        at_once = [0.5] * harness.DEVICE_SAMPLES if name == "a peer" else []
        assert result.device_seconds == at_once and result.device_by == "graph"
    assert list(timers) == ["drift_gate, in place", "bare GEMMs"]
    result = dataclasses.replace(measured["eager"], device_seconds=[])
    monkeypatch.setattr(harness.device_time, "timer", lambda *run: None)
    harness._time_device(result, (lambda: None, lambda: None), timers, CPU)
    assert result.device is None and result.fastest == result.median
