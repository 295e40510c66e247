"""Suites of the benchmarks by name."""

import importlib

from drift_gate.bench.harness import Suite


def load_suite(name: str) -> Suite:
    """The suite of bench/suites/test_NAME.py."""
    return importlib.import_module(f"drift_gate.bench.suites.test_{name}").SUITE
