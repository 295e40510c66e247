"""Kernels with small tiles, so that small problems have tiles' borders and shared rows."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

# Elements or bytes of a tile, threads of a warp, loads: a module's constant and its small value.
SMALL: dict[str, dict[str, Any]] = {
    "lanes": {"WARP": 8},
    "scan": {"TILES": ((2**31, 1, 1),)},
    "select": {"COLUMNS": 64, "WORDS": 32, "CAPACITY": 16},
    "expand": {"TILE_BYTES": 128},
    "divergence": {"NUM_WARPS": 1, "LOADS": 1},
    "divergence_grad": {"TILE_BYTES": 128, "ODD_TILE_BYTES": 64},
    "topk": {"ELEMENTS": 64, "PAIRS": 64},
    "gather": {"CACHE": 256, "SLICE": 8, "SUM_TILE": 16},
    "sparse": {"SEGMENT": 4, "KEYS": 32},
}
SMALL_ROWS = {
    "lanes": 32, "tokens": 32, "walk": 32, "places": 16, "columns": 8, "ends": 4, "alone": 32,
    "rows": 16, "sequence": 32, "sums": 16,
}  # fmt: skip
"""Of the row functions, by field of their `TILES`."""


@contextlib.contextmanager
def small_tiles(programs: int, *, small: bool) -> Iterator[None]:
    """Shrink the tiles, and let few rows be shared by this many programs."""
    from importlib import import_module

    def wanted(device: torch.device) -> int:
        return programs

    with contextlib.ExitStack() as stack:
        scan: Any = import_module("drift_gate.kernels.scan")
        stack.enter_context(mock.patch.object(scan, "programs_wanted", wanted))
        if small:
            rows: Any = import_module("drift_gate.kernels.rows")
            tiles = rows.TILES._replace(**SMALL_ROWS)
            stack.enter_context(mock.patch.object(rows, "TILES", tiles))
        for name, constants in SMALL.items() if small else ():
            module = import_module(f"drift_gate.kernels.{name}")
            for constant, value in constants.items():
                stack.enter_context(mock.patch.object(module, constant, value))
        yield
