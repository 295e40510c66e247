"""Kernels with small tiles, so that small problems have tiles' borders and shared rows."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

# Elements or bytes of a tile, lanes, rows a program: a module's constant and its small value.
SMALL = {
    "scan": {"LANES": 8},
    "expand": {"TILE_BYTES": 128},
    "divergence": {"LANES": 8},
    "divergence_grad": {"TILE_BYTES": 128, "ODD_TILE_BYTES": 64},
    "sampled_token": {"TILE": 16},
    "topk": {"ELEMENTS": 64},
}


@contextlib.contextmanager
def small_tiles(programs: int, *, small: bool) -> Iterator[None]:
    """Shrink the tiles, and let few rows be shared by this many programs."""
    from importlib import import_module

    def wanted(device: torch.device) -> int:
        return programs

    with contextlib.ExitStack() as stack:
        scan: Any = import_module("drift_gate.kernels.scan")
        stack.enter_context(mock.patch.object(scan, "programs_wanted", wanted))
        for name, constants in SMALL.items() if small else ():
            module = import_module(f"drift_gate.kernels.{name}")
            for constant, value in constants.items():
                stack.enter_context(mock.patch.object(module, constant, value))
        yield
