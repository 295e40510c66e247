"""Machine and source of a measurement; time and memory are measured by `drift_gate.measure`."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drift_gate.measure import Memory, device_name, peak_bytes, quartiles, seconds

from . import internals

__all__ = [
    "Memory",
    "available_bytes",
    "device_here",
    "device_name",
    "environment",
    "peak_bytes",
    "quartiles",
    "seconds",
    "slug",
]


@contextmanager
def device_here() -> Iterator[torch.device]:
    """The GPU; or the CPU, where kernels that are imported from now on are interpreted."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from ..fuzz import interpreter  # Triton's, which reads the variable

    with interpreter.corrected():
        yield torch.device("cpu")


def slug(name: str) -> str:
    """A file name out of a device name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def available_bytes() -> float:
    """Memory of the host that can be had without swapping; infinite where it cannot be told."""
    meminfo = Path("/proc/meminfo")
    found = meminfo.exists() and re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
    return int(found[1]) * 1024 if found else float("inf")


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "native": internals.instruction_set(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }


def _commit() -> str:
    """Commit of this source tree, with "+" where it was changed since; "unknown" outside one.

    New results are no change.
    """
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        sources = ":(top)", ":(top,exclude)bench/results"
        changed = "+" if git("status", "--porcelain", "--", *sources) else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
