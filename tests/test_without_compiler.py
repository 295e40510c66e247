"""Run the losses' tests a second time, as where there was no C compiler at installation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drift_gate.passes import native

HERE = Path(__file__).parent
NAMES = "opd_loss", "topk_loss", "full_loss", "full_loss_special", "limits", "threads", "reports"
FILES = [HERE / f"test_{name}.py" for name in NAMES]


@pytest.mark.skipif(native.instruction_set() is None, reason="there is no compiled library")
def test_losses_through_aten() -> None:
    # pytest-xdist's variables would make the child believe that it is a worker
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES)]
    run = subprocess.run(
        command,
        cwd=HERE.parent,
        env=inherited | {"DRIFT_GATE_NATIVE": "0", "DRIFT_GATE_KERNELS": "off"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout}"
