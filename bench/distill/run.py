"""`drift-gate distill`: one student, one teacher, with and without the gate."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from drift_gate import DriftGate

from . import task
from .model import SIZES, WEIGHTS, Model, respond
from .train import EPOCHS, MINIBATCH, ROLLOUT, Step, distill

HELD_OUT = 1000  # problems
VARIANTS = {"OPD": None, "OPD + Block8 gate": DriftGate(block_size=8)}  # responses: 25 to 40 tokens


class Row(NamedTuple):
    """One line of the table; without training, no curve."""

    name: str
    accuracy: float
    seconds: float = 0.0
    curve: tuple[Step, ...] = ()


def load(name: str, device: torch.device) -> Model:
    """The "teacher" or the "student" that `pretrain.py` made."""
    model = Model(**SIZES[name])
    model.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True)[name])
    return model.to(device)


def compare(
    *, steps: int, seed: int, device: torch.device, quick: bool = False, backend: str = "auto"
) -> list[Row]:
    """Train every variant from the same student on the same prompts; print and return the table.

    `quick` takes 4 steps at most and a tenth of the held-out problems.
    """
    steps = min(steps, 4) if quick else steps
    draw = torch.Generator().manual_seed(seed + 1)
    pairs = task.draw_pairs(HELD_OUT // 10 if quick else HELD_OUT, draw, held_out=True)
    prompts = task.prompts(pairs).to(device)

    def accuracy(model: Model) -> float:
        sample = torch.Generator(device).manual_seed(seed + 2)
        return task.accuracy(pairs, respond(model, prompts, sample).cpu())

    console = Console()
    teacher = load("teacher", device)
    rows = [
        Row("student before", accuracy(load("student", device))),
        Row("teacher", accuracy(teacher)),
    ]
    columns = (
        TextColumn("{task.description:18}"), BarColumn(30), MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for name, gate in VARIANTS.items():
            student, curve = load("student", device), []
            bar = progress.add_task(name, total=steps, state="")
            start = time.perf_counter()
            for step in distill(
                student, teacher, gate=gate, steps=steps, seed=seed, backend=backend
            ):
                curve.append(step)
                state = f"loss {step.loss:+.4f}  drift {step.drift:.3f}  gate {step.gate:.3f}"
                progress.update(bar, advance=1, state=state)
            elapsed = time.perf_counter() - start
            rows.append(Row(name, accuracy(student), elapsed, tuple(curve)))
    console.print(_table(rows, len(pairs), steps))
    return rows


def _table(rows: list[Row], problems: int, steps: int) -> Table:
    table = Table(
        title=f"adding {task.DIGITS}-digit numbers, answers checked exactly",
        caption=f"accuracy: one sampled response to each of {problems} held-out problems; "
        f"{steps} rollouts of {ROLLOUT} responses, each used for {EPOCHS} epochs of "
        f"{ROLLOUT // MINIBATCH} optimiser steps; "
        "drift: mean |old - new| log-prob in nats; gate: mean before the unit mean",
    )
    table.add_column("model", no_wrap=True)
    for name in ("accuracy", "drift", "gate", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        trained = ["", "", ""]
        if row.curve:
            drift, gate = (sum(x) / len(row.curve) for x in list(zip(*row.curve, strict=True))[1:])
            trained = [f"{drift:.4f}", f"{gate:.4f}", f"{row.seconds:.1f}"]
        table.add_row(row.name, f"{row.accuracy:.1%}", *trained)
    return table
