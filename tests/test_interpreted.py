"""Run the kernel tests a second time, under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import KERNELS

HERE = Path(__file__).parent
FILES = [HERE / "test_support.py", *sorted(HERE.glob("test_kernels_*.py"))]
# Other values through accesses that other tests make: the emulator's run of them is enough.
ONCE = ["reductions", "nan_input", "without_valid", "may_hold", "same_bits", "however_large"]


@pytest.mark.skipif(KERNELS != "ttsem", reason=f"DRIFT_GATE_KERNELS={KERNELS}")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_under_the_interpreter() -> None:
    # pytest-xdist's variables would make the child believe that it is a worker
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    options = ["-q", "-p", "no:cacheprovider", "-k", f"not ({' or '.join(ONCE)})"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, FILES)]
    run = subprocess.run(
        command,
        cwd=HERE.parent,
        env=inherited | {"DRIFT_GATE_KERNELS": "interpret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}"
