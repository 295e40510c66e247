"""Where Triton kernels run during the tests.

DRIFT_GATE_KERNELS says how they run on a machine without a GPU:

    ttsem       execute the compiled TTIR, checked (the default: ttsem, Triton 3.7, Python 3.11)
    interpret   Triton's interpreter, checked; on the CPU even where there is a GPU
    off         not at all: tests that need them are skipped

The two cannot share a process; `test_interpreted.py` starts another one for `interpret`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from importlib.util import find_spec

import pytest
import torch
from beyond import BEYOND

KERNELS = os.environ.get("DRIFT_GATE_KERNELS", "ttsem")

if KERNELS == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any import


def pytest_configure() -> None:
    if KERNELS not in ("ttsem", "interpret", "off"):
        raise pytest.UsageError(f"DRIFT_GATE_KERNELS={KERNELS}: not one of ttsem, interpret, off")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        name = f"{item.path.name}::{item.name.split('[')[0]}"
        reason = BEYOND.get(item.path.name) or BEYOND.get(name)
        if reason is not None:
            item.add_marker(pytest.mark.beyond(reason))
    if torch.cuda.is_available() and KERNELS != "interpret":
        return
    reason = "kernels are interpreted" if KERNELS == "interpret" else "no CUDA device"
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


@pytest.fixture
def kernels_on_cpu() -> Iterator[torch.device]:
    """Make Triton kernels run, and yield the device to put tensors on.

    That is the GPU where there is one, and nothing is checked there; else the CPU, where an
    out-of-bounds access or a race fails the test and uninitialised memory holds NaN.
    """
    if torch.cuda.is_available() and KERNELS != "interpret":
        yield torch.device("cuda")
        return
    if KERNELS == "off":
        pytest.skip("no GPU, and DRIFT_GATE_KERNELS=off")
    from drift_gate.passes.backends import triton_on_cpu

    with _checked_kernels(), triton_on_cpu():
        yield torch.device("cpu")


def _checked_kernels() -> AbstractContextManager[object]:
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if KERNELS == "interpret":
        from drift_gate.fuzz import interpreter

        stack = ExitStack()
        stack.enter_context(interpreter.corrected())
        stack.enter_context(interpreter.sanitize())
        return stack
    try:
        from support import ttsem_session
    except ImportError as missing:
        pytest.skip(f"no GPU, and no ttsem ({missing}); DRIFT_GATE_KERNELS=interpret needs neither")
    return ttsem_session.run_kernels_on_cpu()
