"""Host time of every public function on tiny inputs; see host.py."""

from __future__ import annotations

from drift_gate.bench.host import SUITE  # noqa: F401  (the suite that is run)
from drift_gate.bench.replay import replay


def test_host(measured, benchmark):
    replay(measured, benchmark)
