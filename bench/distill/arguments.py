"""From the command line to a run, and from its errors to one line and an exit code."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import command
from .jobs import Interrupted
from .settings import Settings
from .workers import EXPECTED, Failed

REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # exit codes


def given(context: Any) -> set[str]:
    """Options that stand on the command line."""
    names = {
        name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"
    }
    return {f"--{'eval' if name == 'evaluate' else name.replace('_', '-')}" for name in names}


def out_of_range(options: dict[str, Any], workers: int | None) -> str:
    """What is wrong with the first number that is too small; nothing, if none is."""
    numbers = {name: options[name] for name in ("steps", "seeds", "block_size", "max_tokens")}
    numbers |= dict(epochs=min(options["epochs"]), workers=1 if workers is None else workers)
    for name, value in numbers.items():
        if value < 1:
            return f"--{name.replace('_', '-')} must be at least 1; got {value}"
    if options["extra"] and options["block_size"] < 4:
        return f"--block-size must be at least 4 with --extra; got {options['block_size']}"
    if not 0 < options["learning_rate"] < 1:
        return f"--learning-rate must be between 0 and 1; got {options['learning_rate']}"
    return ""


def run(
    options: dict[str, Any], out: Path | None, resume: Path | None, workers: int | None
) -> tuple[int, str]:
    """Exit code and what to say about it; 0 and nothing if all went well."""
    if wrong := out_of_range(options, workers):
        return REFUSED, wrong
    out = resume or out or Path("runs") / time.strftime("distill-%Y-%m-%d-%H%M%S")
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        return REFUSED, f"--out {out} is not empty: --resume {out} goes on with it"
    try:
        work = command.resume(out) if resume else command.start(Settings(**options), out)
    except (*EXPECTED, ValueError) as error:
        return REFUSED, str(error)
    try:
        command.run(work, workers or _workers(work.settings.device), Console())
    except Interrupted:
        return INTERRUPTED, f"interrupted; drift-gate distill --resume {out} goes on"
    except Failed as error:
        return FAILED, f"{error}; drift-gate distill --resume {out} goes on"
    except EXPECTED as error:
        return FAILED, str(error)
    return 0, ""


def _workers(device: str) -> int:
    """One a core that this process may use; a GPU takes one."""
    if torch.device(device).type != "cpu":
        return 1
    return max(1, min(8, os.cpu_count() or 1))
