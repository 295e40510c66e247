"""A whole training step under each loss; see train_step.py."""

from __future__ import annotations

from drift_gate.bench.replay import replay
from drift_gate.bench.train_step import SUITE  # noqa: F401  (the suite that is run)


def test_train_step(measured, benchmark):
    replay(measured, benchmark)
