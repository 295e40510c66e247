"""Shrunk cases of the fuzzer as tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drift_gate.passes.backends import backends_on

CPU = torch.device("cpu")


def each(found: dict[str, dict[str, Any]]) -> pytest.MarkDecorator:
    """Every case on every backend that runs here and takes its dtype."""
    cases = [
        pytest.param(case, backend, id=f"{name}, {backend}")
        for name, case in found.items()
        for backend in backends_on(CPU)
        if backend == "torch" or case.get("dtype") != "float64"
    ]
    return pytest.mark.parametrize(("case", "backend"), cases)
