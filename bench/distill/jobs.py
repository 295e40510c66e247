"""Training runs one by one: each leaves its result in a file, and a checkpoint if interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import files
from .evaluation import evaluate
from .models import load_pair
from .problems import Problem
from .settings import Job, Settings
from .training import Sampler, Trainer

CHECKPOINT_EVERY = 60.0  # seconds
BASE = ("student", "teacher")  # evaluated before any training, under these names


class Interrupted(Exception):
    """Asked to stop; what was done is saved."""


class Work(NamedTuple):
    """What every run of a folder needs."""

    settings: Settings
    out: Path
    training: list[Problem]
    benchmarks: dict[str, list[Problem]]

    def result(self, key: str) -> Path:
        """Where a finished run's result is."""
        return self.out / "runs" / f"{key}.json"

    def done(self, key: str) -> dict[str, Any] | None:
        """The result, if the run is finished."""
        path = self.result(key)
        return json.loads(path.read_text()) if path.exists() else None


class Task(NamedTuple):
    """A run, or of a name of BASE the evaluation, and the folder that it belongs to."""

    job: Job | str
    work: Work

    @property
    def key(self) -> str:
        """Its name among the folder's files."""
        return self.job if isinstance(self.job, str) else self.job.key


Report = Callable[[str, dict[str, Any]], None]  # key of the job, what its bar shows


def evaluate_base(name: str, work: Work, stopped: Callable[[], bool]) -> None:
    """The starting student or the teacher on every benchmark."""
    pair = load_pair(*work.settings.model_paths(), torch.device(work.settings.device))
    model = dict(zip(BASE, pair, strict=False))[name]
    found = evaluate(
        Sampler(pair, work.settings), work.benchmarks, seed=work.settings.seed, model=model,
        between=lambda: _stop_if(stopped),
    )  # fmt: skip
    files.write_json(work.result(name), dict(right=found))


def train(job: Job, work: Work, report: Report, stopped: Callable[[], bool]) -> None:
    """Train (or go on training) one variant and evaluate it.

    Raises:
        Interrupted: `stopped` said so; there is a checkpoint of the last whole step.
        CannotWrite: the result or the checkpoint.
    """
    settings = work.settings
    pair = load_pair(*settings.model_paths(), torch.device(settings.device))
    trainer = Trainer(pair, job, settings, work.training)
    checkpoint = work.result(job.key).with_suffix(".pt")
    if checkpoint.exists():
        trainer.load_state(torch.load(checkpoint, map_location="cpu", weights_only=True))
    report(job.key, dict(completed=len(trainer.curve)))
    saved = time.monotonic()
    while len(trainer.curve) < settings.steps:
        shown = trainer.step()
        last = shown["epochs"][-1]
        state = dict(loss=shown["loss"], drift=last["drift_abs"], gate=last["gate_mean_raw"])
        report(job.key, dict(completed=len(trainer.curve), **state))
        whole = len(trainer.curve) == settings.steps
        if whole or stopped() or time.monotonic() - saved > CHECKPOINT_EVERY:
            files.write_tensors(checkpoint, trainer.state())
            saved = time.monotonic()
        _stop_if(stopped)
    report(job.key, dict(evaluating=True))
    found = evaluate(
        trainer.sampler, work.benchmarks, seed=job.seed, between=lambda: _stop_if(stopped)
    )
    result = dict(
        variant=job.variant.name, epochs=job.epochs, seed=job.seed, right=found,
        curve=trainer.curve, heat=trainer.heat, heat_by_epoch=trainer.heat_by_epoch,
        seconds=trainer.seconds,
    )  # fmt: skip
    files.write_json(work.result(job.key), result)
    checkpoint.unlink(missing_ok=True)
    report(job.key, dict(done=True))


def _stop_if(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise Interrupted
