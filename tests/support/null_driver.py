"""A GPU that launches nothing: Triton's own launch code runs on CPU tensors, down to the driver."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from .compile_check import TARGETS

_devices = itertools.count(1000, 10)  # Triton keeps compiled kernels by device
Launched = list[tuple[str, tuple[int, int, int], tuple[Any, ...]]]


class _Utils:
    """Loads nothing, too."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 18, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return name, name, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: Any) -> None:
        return None


class NullDriver:
    """Answers what Triton asks of a driver, and writes down what is launched."""

    def __init__(self, target: str = "sm90") -> None:
        self.device = next(_devices)
        self.launched: Launched = []
        self.utils = _Utils()
        self._target = TARGETS[target]

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
            args = rest[4:]  # after packed metadata, launch metadata and hooks
            self.launched.append((function, (x, y, z), tuple(args)))

        return run

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def null_driver(target: str = "sm90") -> Iterator[NullDriver]:
    """Let launches in the block end at a `NullDriver`."""
    manager = triton.runtime.driver
    previous = manager._active  # `manager.active` would look for a GPU and raise
    found = NullDriver(target)
    manager.set_active(found)
    try:
        yield found
    finally:
        manager._active = previous
