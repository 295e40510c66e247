"""Run Triton launches on CPU tensors by executing their real TTIR with `ttsem`, checked.

Import only where ttsem is installed (Triton 3.7 and Python 3.11 or later) and TRITON_INTERPRET is
not set.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
from triton._C.libtriton import ir
from ttsem import harness, mlir
from ttsem._fakedriver import unstub_torch_cuda
from ttsem.memory import Memory, MemoryFault
from ttsem.sanitize import KernelFault as TtsemFault
from ttsem.sanitize import Session, Unjudged, session

from drift_gate.fuzz.bounds import Extents, KernelFault
from drift_gate.fuzz.memory import nan_filled_memory

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    raise ImportError(f"ttsem needs Triton 3.7 or later, not {triton.__version__}")
if sys.version_info < (3, 11):  # it adds notes to exceptions
    raise ImportError(f"ttsem needs Python 3.11 or later, not {platform.python_version()}")


@contextmanager
def run_kernels_on_cpu() -> Iterator[Session]:
    """Execute every `kernel[grid](...)` in the block; raise `KernelFault` where it does harm.

    Harm: an access outside the tensors passed (exact: row padding is outside), two programs that
    touch one element of which one writes another value, lanes of one store that disagree, an
    undefined operation. Memory nobody wrote holds NaN. Not seen: an access that lands on an element
    of another argument, races between the lanes of one program across operations, and what happens
    below TTIR (layouts, shared memory, barriers). Locks made of atomics are reported as races.
    """
    _print_generic_ir()
    driver = triton.runtime.driver
    previous = driver._active  # the session leaves its own behind
    try:
        launches = session(cuda_is_cpu=False, on_stop=_raise_our_fault)
        with nan_filled_memory(), _exact_bounds(), launches as state:
            unstub_torch_cuda()  # torch.cuda.is_available() stays honest
            yield state
    finally:
        driver._active = previous
    assert state.races_unchecked == 0, "a launch too large for the race check: use a smaller shape"


def _print_generic_ir() -> None:
    """Have Triton print the form of IR that ttsem reads.

    ttsem asks for it once a process, but a compilation for an AMD GPU links in this process, and
    the linker sets every option of LLVM back.
    """
    if _prints_generic_ir():
        return
    mlir._generic_printing_enabled[0] = False
    mlir.enable_generic_printing()
    assert _prints_generic_ir(), "Triton does not print IR in the generic form"


def _prints_generic_ir() -> bool:
    context = ir.context()
    ir.load_dialects(context)
    return '"builtin.module"' in str(ir.builder(context).create_module())


class _OutsideElements(MemoryFault):
    """An access inside the storage of an argument, but not on one of its elements."""

    def __init__(self, addresses: np.ndarray, itemsize: int, where: str) -> None:
        super().__init__(int(addresses[0]), addresses, itemsize)
        self.where = where


class _ExactMemory(Memory):
    """ttsem bounds accesses by the storages; this bounds them by the elements of the views."""

    def __init__(self, extents: Extents) -> None:
        super().__init__()
        self._extents = extents

    def _resolve(self, addrs: np.ndarray, itemsize: int) -> tuple[np.ndarray, np.ndarray]:
        resolved = super()._resolve(addrs, itemsize)
        outside = self._extents.outside(addrs)
        if outside.any():
            where = self._extents.describe(int(addrs[outside][0]))
            raise _OutsideElements(addrs[outside], itemsize, where)
        return resolved


@contextmanager
def _exact_bounds() -> Iterator[None]:
    execute = harness.execute

    def execute_exactly(record: Any, *args: Any, **kwargs: Any) -> Any:
        extents = Extents(record.bound.items())
        harness.Memory = lambda: _ExactMemory(extents)
        return execute(record, *args, **kwargs)

    harness.execute = execute_exactly
    try:
        yield
    finally:
        harness.execute, harness.Memory = execute, Memory


def _raise_our_fault(stop: TtsemFault | Unjudged) -> None:
    """One exception type for both ways of running kernels on the CPU."""
    if isinstance(stop, Unjudged):
        return  # ttsem cannot execute this kernel: let it say so
    fault, cause = stop.fault, stop.__context__
    if isinstance(cause, _OutsideElements):
        raise KernelFault(
            f"out-of-bounds {cause.kind} in `{fault.kernel}`, {fault.source_file}:"
            f"{fault.source_line}: `{fault.source_text}`: {cause.where}"
        ) from None
    kinds = {"oob_write": "out-of-bounds write", "oob_read": "out-of-bounds read"}
    raise KernelFault(f"{kinds.get(fault.kind, fault.kind)}: {stop}") from None
