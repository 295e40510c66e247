"""The suite `host`: every public function, counts that repeat, and launches of nothing."""

from __future__ import annotations

import inspect

import pytest
import torch
from drift_gate.bench import host, inert, report
from drift_gate.bench.bounds import Bounds
from drift_gate.bench.cases import Case
from drift_gate.bench.internals import HAS_TRITON
from drift_gate.bench.names import HOST, UNIT
from drift_gate.bench.peers.guard import LeftOut
from rich.console import Console

import drift_gate

CPU = torch.device("cpu")


def sizes() -> tuple[Case, Case]:
    """As installed; and through Triton, nothing launched."""
    installed, launchless = host.SUITE.cases("star", False)
    return installed, launchless


def test_every_public_function_has_a_row():
    public = {name for name in drift_gate.__all__ if inspect.isfunction(getattr(drift_gate, name))}
    assert {entry.name for entry in host.OURS} == public


def test_a_call_is_counted_the_same_every_time():
    inputs = host.draw(sizes()[0], CPU)
    run = next(entry for entry in host.OURS if entry.name == "token_log_probs").make(inputs)
    run()
    found = host.counts(run, CPU, None)
    assert found == host.counts(run, CPU, None)
    assert found["python_calls"] > 10 and found["ops"] > 5 and "launches" not in found


def test_python_calls_by_hand():
    def inner() -> None:
        pass

    def three() -> None:
        inner()
        inner()
        [inner for _ in range(1)].pop()()

    # A comprehension is a call of its own before Python 3.12.
    assert host.python_calls(three) in (3, 4)


def test_the_installed_route_and_its_table():
    wanted = ("gate_weights", "opd_loss", "Liger cross_entropy")
    kept: list[int] = []
    found = host.SUITE.measure(sizes()[0], CPU, Bounds(1), wanted, lambda r: kept.append(len(r)))
    assert set(found) == {*wanted, UNIT} and kept == [4, 4]
    assert found["Liger cross_entropy"].left_out and found["Liger cross_entropy"].host is None
    ours = found["opd_loss"]
    assert ours.left_out is None and len(ours.seconds) == host.ROUNDS and ours.suite == HOST
    assert ours.ratio_quartiles is not None and found[UNIT].ratio_quartiles == (1, 1, 1)
    (table,) = report.tables(found.values(), 100)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert "Python calls" in text and "gate_weights: forward alone" in text
    assert "left out: Liger cross_entropy" in text


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="launches of Triton's")
def test_launches_of_nothing_are_counted():
    """Compiles the kernels of one pass; the driver of before is put back."""
    import triton

    if triton.knobs.runtime.interpret:
        with pytest.raises(LeftOut, match="interpreted"), inert.launching_nothing():
            pass
        return
    before = triton.runtime.driver._active
    found = host.SUITE.measure(sizes()[1], CPU, Bounds(1), ("token_log_probs", "gate_weights"))
    assert triton.runtime.driver._active is before and torch.empty is not torch.zeros
    assert set(found) == {UNIT, "token_log_probs"}  # the gate alone takes no backend
    assert found[UNIT].host["launches"] == 0
    ours = found["token_log_probs"]
    assert ours.left_out is None and ours.host["launches"] >= 2 and ours.seconds
