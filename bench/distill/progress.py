"""What is shown while runs go on: a bar a variant, and the time to go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .jobs import BASE, Work
from .settings import Job

SAMPLING = (
    2.0  # what a rollout batch costs beside its epochs, in epochs: measured with the defaults
)
ALL = "all runs"


def bars(console: Console) -> Progress:
    """Empty; `Shown` fills it."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"), TimeElapsedColumn(), console=console,
    )  # fmt: skip


def step_cost(job: Job) -> float:
    """Of a rollout batch, in epochs over one."""
    return SAMPLING + job.epochs


def whole_cost(work: Work, job: Job | str) -> float:
    """Of a run with its evaluation, or of a name of BASE, in epochs over a rollout batch."""
    settings = work.settings
    responses = settings.evaluation_samples * sum(map(len, work.benchmarks.values()))
    evaluation = responses / (settings.prompts * settings.samples)
    return evaluation + (0 if isinstance(job, str) else settings.steps * step_cost(job))


class Clock:
    """Time to go, at the pace since the start of this process.

    Work is counted in epochs over a rollout batch; what an earlier process has done is no part of
    the pace.
    """

    def __init__(
        self, work: Work, jobs: list[Job], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.now, self.begun = now, now()
        self.step = {job.key: step_cost(job) for job in jobs}
        self.whole = {name: whole_cost(work, name) for name in BASE}
        self.whole |= {job.key: whole_cost(work, job) for job in jobs}
        self.done = {key: self.whole[key] * (work.done(key) is not None) for key in self.whole}
        self.before = {key: done for key, done in self.done.items() if done}

    def take(self, key: str, state: dict[str, Any]) -> None:
        """A job's news: its first say how far an earlier process came."""
        if "completed" in state:
            self.done[key] = self.step[key] * state["completed"]
        self.before.setdefault(key, self.done[key])
        if "done" in state:
            self.done[key] = self.whole[key]

    def finished(self) -> int:
        """Runs of which nothing is to be done, evaluations of the first models included."""
        return sum(self.done[key] == self.whole[key] for key in self.whole)

    def seconds_left(self) -> float | None:
        """None as long as nothing shows the pace."""
        done = sum(self.done.values())
        paced = done - sum(self.before.values())
        if not paced:
            return None
        return (self.now() - self.begun) / paced * (sum(self.whole.values()) - done)

    def __str__(self) -> str:
        if (left := self.seconds_left()) is None:
            return ""
        minutes = round(left / 60)
        if minutes < 1:
            return "less than a minute to go" if left else "nothing to go"
        hours, minutes = divmod(minutes, 60)
        return f"about {f'{hours} h ' if hours else ''}{minutes} min to go"


class Shown:
    """A bar over all runs, one for the models before training, and one a variant."""

    def __init__(self, progress: Progress, work: Work, everything: list[Job]) -> None:
        self.progress, self.clock = progress, Clock(work, everything)
        self.names = dict.fromkeys(BASE, "before training")
        self.names |= {job.key: job.variant.name for job in everything}
        steps = work.settings.steps
        self.done = {
            key: (1 if key in BASE else steps) if work.done(key) is not None else 0
            for key in self.names
        }
        self.bars: dict[str, Any] = {ALL: progress.add_task(ALL, total=len(self.names), state="")}
        self.shown: dict[str, str] = {}
        for name in dict.fromkeys(self.names.values()):
            keys = [key for key in self.names if self.names[key] == name]
            total = sum(1 if key in BASE else steps for key in keys)
            self.bars[name] = progress.add_task(name, total=total, state="", start=False)
            self._advance(name)
        self.progress.update(self.bars[ALL], completed=self.clock.finished())

    def take(self, key: str, state: dict[str, Any]) -> None:
        """Show a job's news; where there is no terminal, a line for each job that is finished."""
        name = self.names[key]
        bar = self.bars[name]
        self.progress.start_task(bar)
        if key in BASE:
            self.done[key] = 1
        elif "completed" in state:
            self.done[key] = state["completed"]
        if "loss" in state:
            self.shown[name] = "loss {loss:+.4f}  drift {drift:.3f}  gate {gate:.3f}".format(
                **state
            )
        shown = "evaluating" if "evaluating" in state else self.shown.get(name, "")
        self.progress.update(bar, state=shown)
        self._advance(name)
        if self.progress.tasks[bar].finished and "done" in state:
            self.progress.stop_task(bar)
        self.clock.take(key, state)
        finished, console = self.clock.finished(), self.progress.console
        self.progress.update(self.bars[ALL], completed=finished, state=str(self.clock))
        if "done" in state and not console.is_terminal:
            console.print(f"{key}: {finished} of {len(self.names)} runs, {self.clock}")

    def _advance(self, name: str) -> None:
        keys = [key for key in self.names if self.names[key] == name]
        self.progress.update(self.bars[name], completed=sum(self.done[key] for key in keys))
