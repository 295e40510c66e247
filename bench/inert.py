"""A driver for Triton that launches nothing: what a launch costs the host, told without a GPU.

Tensors of the CPU stand in. Kernels are compiled for a GPU, once, and every launch goes Triton's
own way through Python down to the driver, which counts it and returns. Outputs are zero, so that
code which goes by them goes a sane way: an allocation takes a microsecond and two ops more than
elsewhere. Left out is what the driver itself takes, some microseconds a launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import internals
from .peers.guard import LeftOut

TARGET = "cuda", 90, 32  # backend, compute capability 9.0, threads of a warp
DEVICE = 1 << 20  # Triton keeps kernels by device: no other driver has this one


class Counter:
    """Launches so far."""

    launches = 0


class _Binaries:
    """What Triton asks about a device, and where it would load a kernel to."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, name: str, *arguments: Any) -> tuple[object, int, int, int, int]:
        """(module, function, registers, spills, most threads)."""
        return object(), 0, 0, 0, 1024


class _Driver:
    """The part of Triton's driver interface that a launch takes."""

    def __init__(self, counter: Counter) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.counter, self.utils = GPUTarget(*TARGET), counter, _Binaries()

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What would put a kernel's arguments into the driver's form, and launch it."""
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.counter.launches += 1


@contextmanager
def launching_nothing() -> Iterator[Counter]:
    """Let backend="triton" take CPU tensors, and launch nothing.

    Raises:
        LeftOut: there is no Triton, or its kernels are interpreted in this process.
    """
    if not internals.HAS_TRITON:
        raise LeftOut("triton is not installed")
    import triton

    if triton.knobs.runtime.interpret:
        raise LeftOut("kernels are interpreted in this process")
    driver, counter = triton.runtime.driver, Counter()
    before = driver._active  # `driver.active` would look for a GPU, and raise
    driver.set_active(_Driver(counter))
    try:
        with internals.triton_on_cpu(), _zeroed():
            yield counter
    finally:
        driver._active = before


@contextmanager
def _zeroed() -> Iterator[None]:
    """Let what Python allocates uninitialised be zero."""
    zeros = {
        (torch, "empty"): torch.zeros,
        (torch, "empty_like"): torch.zeros_like,
        (torch.Tensor, "new_empty"): torch.Tensor.new_zeros,
    }
    before = {place: getattr(*place) for place in zeros}
    try:
        for place, function in zeros.items():
            setattr(*place, function)
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)
