"""From the command line to a run, and from its errors to one line and an exit code."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from drift_gate.choices import ADVANTAGES, AGGREGATES

from . import command
from .jobs import Interrupted
from .settings import Settings, variants
from .workers import EXPECTED, Failed

COUNTS = (
    "steps", "seeds", "block_size", "max_tokens", "minibatch", "warmup", "sample_every",
)  # fmt: skip
REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # exit codes


def given(context: Any) -> set[str]:
    """Options that stand on the command line."""
    names = {
        name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"
    }
    return {f"--{'eval' if name == 'evaluate' else name.replace('_', '-')}" for name in names}


def settings_of(given: dict[str, Any], device: str) -> dict[str, Any]:
    """Options of `Settings` from those of the command line."""
    names = {field.name for field in dataclasses.fields(Settings)}
    found = {name: value for name, value in given.items() if name in names}
    student, teacher, train = (given[name] for name in ("student", "teacher", "train"))
    rate = given["learning_rate"]
    return found | dict(
        epochs=tuple(dict.fromkeys(given["epochs"] or (2,))), device=device,
        student=student and str(student), teacher=teacher and str(teacher),
        train=train and str(train), eval=tuple(map(str, given["evaluate"] or ())),
        variant=tuple(dict.fromkeys(given["variant"] or ())),
        learning_rate=(2e-6 if student else 2e-4) if rate is None else rate,
    )  # fmt: skip


def out_of_range(options: dict[str, Any], workers: int | None) -> str:
    """What is wrong with the first option that will not do; nothing, if all will."""
    numbers = {name: options[name] for name in COUNTS}
    numbers |= dict(epochs=min(options["epochs"]), workers=1 if workers is None else workers)
    for name, value in numbers.items():
        if value < 1:
            return f"--{name.replace('_', '-')} must be at least 1; got {value}"
    if options["extra"] and options["block_size"] < 4:
        return f"--block-size must be at least 4 with --extra; got {options['block_size']}"
    if not 0 < options["learning_rate"] < 1:
        return f"--learning-rate must be between 0 and 1; got {options['learning_rate']}"
    for name in ("gradient_norm", "clip"):
        if not 0 < options[name] < math.inf:
            return f"--{name.replace('_', '-')} must be finite and above 0; got {options[name]}"
    if not 0 <= options["tau"] < math.inf:
        return f"--tau must be finite and at least 0; got {options['tau']}"
    for name, known in (("advantage", ADVANTAGES), ("aggregate", AGGREGATES)):
        if options[name] not in known:
            return f"--{name} must be one of {', '.join(known)}; got {options[name]!r}"
    return _unknown(options)


def _unknown(options: dict[str, Any]) -> str:
    """What is wrong with the names of variants."""
    names = [variant.name for variant in variants(Settings(**options))]
    for name in options["variant"]:
        if name not in names:
            return f"--variant must be one of {', '.join(names)}; got {name!r}"
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
