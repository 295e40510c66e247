"""See the kernel launches that Python code makes: compile them without a GPU, or count them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from .compile_check import TARGETS

_COMPILE_AND_RUN = JITFunction.run  # Triton's own, whatever replaces it during a test


@dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # kernel parameters by name, defaults included
    options: dict[str, Any]  # num_warps, num_stages, ...
    kernel: CompiledKernel | None = None  # where compiled: `compile_check.report(launch.kernel)`


class _AbsentGPU:
    """Answers what Triton asks of a driver before it compiles. It can launch nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return hash(self._target)  # Triton caches by device: a device for each target

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For autotuners: all configurations take the same time, so the first one wins."""

        def benchmark(launch: Callable[[], None], quantiles: Any = None, **_: Any) -> list[float]:
            launch()
            return [0.0] * len(quantiles or [0])

        return benchmark

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: Any) -> None:
        return None

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


@contextmanager
def absent_gpu(target: str = "sm90") -> Iterator[None]:
    """Let Triton believe in a GPU of that kind, for compiling."""
    driver = triton.runtime.driver
    previous = driver._active  # `driver.active` would look for a GPU and raise
    driver.set_active(_AbsentGPU(TARGETS[target]))
    try:
        yield
    finally:
        driver._active = previous


@contextmanager
def compile_only(target: str = "sm90") -> Iterator[list[Launch]]:
    """Run launching code on CPU tensors; each launch compiles for `target` and does nothing else.

    Checks what a launcher really passes: its argument types, alignment, divisibility, block sizes
    and warps. Outputs keep whatever `torch.empty` left in them, so code that branches on results
    goes its own way. Needs compilable kernels: not under TRITON_INTERPRET.
    """
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = _COMPILE_AND_RUN(self, *args, grid=grid, warmup=True, **kwargs)
        if not warmup:
            launches.append(_launch(self, args, kwargs, grid, kernel))
        return kernel

    with absent_gpu(target), _replaced(JITFunction, "run", run):
        yield launches


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """List the launches made, and let them happen: on a GPU, checked on the CPU or interpreted."""
    launches: list[Launch] = []
    if triton.knobs.runtime.interpret:
        from triton.runtime.interpreter import GridExecutor

        interpret = GridExecutor.__call__

        def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
            launches.append(_launch(self, args, kwargs, self.grid))
            interpret(self, *args, **kwargs)

        with _replaced(GridExecutor, "__call__", call):
            yield launches
        return

    execute = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not warmup:
            launches.append(_launch(self, args, kwargs, grid))
        return execute(self, *args, grid=grid, warmup=warmup, **kwargs)

    with _replaced(JITFunction, "run", run):
        yield launches


@contextmanager
def refused() -> Iterator[None]:
    """The launches in the block fail to compile, at a `tl.static_assert` that says "unknown"."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        yield
    reasons, error = [], caught.value
    while error is not None:
        reasons.append(str(error))
        error = error.__cause__
    assert any("unknown" in reason for reason in reasons), reasons


def _launch(
    function: Any,  # JITFunction or GridExecutor
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grid: Any,
    kernel: CompiledKernel | None = None,
) -> Launch:
    names = function.arg_names
    bound = {p.name: p.default for p in getattr(function, "params", ()) if p.has_default}
    bound |= dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    options = {k: v for k, v in kwargs.items() if k not in names}
    grid = grid(bound) if callable(grid) else grid
    grid = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
    return Launch(function.fn.__name__, grid, bound, options, kernel)


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    previous = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, previous)
