"""Runs side by side: on a CPU a process a core, of one thread each, so that results repeat."""

from __future__ import annotations

import multiprocessing
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import files, problems
from .jobs import BASE, Interrupted, Work, evaluate_base, train
from .models import BadModel
from .settings import Job

Show = Callable[[str, dict[str, Any]], None]
EXPECTED = (files.CannotWrite, problems.BadFile, BadModel)  # their message says it all


class Failed(Exception):
    """A run that failed; the message is one line."""


@contextmanager
def interruptible(stop: Any) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM set the event, a second one end the process; then as before."""

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def run_all(jobs: list[Job | str], work: Work, workers: int, show: Show) -> None:
    """Run jobs (a name of BASE is an evaluation) in `workers` processes; 1 means this one.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; checkpoints are saved.
        Failed: a run failed; the others were stopped and saved.
    """
    if workers == 1 or len(jobs) < 2:
        stop = threading.Event()
        with interruptible(stop), one_thread(work):
            for job in jobs:
                if message := _run(job, work, show, stop.is_set):
                    raise Failed(message)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with interruptible(stop):
        _spread(jobs, work, min(workers, len(jobs)), show, context, stop)


@contextmanager
def one_thread(work: Work) -> Iterator[None]:
    """One thread on a CPU: the same sums in the same order, however many workers there are."""
    before = torch.get_num_threads()
    if work.settings.device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(job: Job | str, work: Work, show: Show, stopped: Callable[[], bool]) -> str:
    """Run one job; returns why it failed, or nothing."""
    try:
        if isinstance(job, str):
            evaluate_base(job, work, stopped)
            show(job, dict(done=True))
        else:
            train(job, work, show, stopped)
    except EXPECTED as error:
        return str(error)
    except Interrupted:
        raise
    except Exception as error:  # a fault of the program: its traceback goes before the line
        traceback.print_exc()
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return ""


def _spread(
    jobs: list[Job | str], work: Work, workers: int, show: Show, context: Any, stop: Any
) -> None:
    todo, news = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * workers]:
        todo.put(job)
    processes = [
        context.Process(target=_worker, args=(todo, news, work, stop), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    running, failure, interrupted = workers, "", False
    while running:
        try:
            kind, key, state = news.get(timeout=1.0)
        except queue.Empty:
            if dead := [p for p in processes if p.exitcode not in (None, 0)]:
                stop.set()
                failure = failure or f"a worker ended with exit code {dead[0].exitcode}"
                running = sum(p.is_alive() for p in processes)
            continue
        if kind == "state":
            show(key, state)
        elif kind == "failed":
            failure = failure or key
            stop.set()
        elif kind == "interrupted":
            interrupted = True
        else:
            running -= 1
    todo.cancel_join_thread()  # what nobody takes any more must not keep this process
    for process in processes:
        process.join()
    if failure:
        raise Failed(failure)
    if interrupted or stop.is_set():
        raise Interrupted


def _worker(todo: Any, news: Any, work: Work, stop: Any) -> None:
    """Take jobs until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sets the event
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def stopped() -> bool:
        return stop.is_set() or (parent is not None and not parent.is_alive())

    with one_thread(work):
        while not stopped() and (job := todo.get()) is not None:
            try:
                message = _run(job, work, lambda *state: news.put(("state", *state)), stopped)
            except Interrupted:
                news.put(("interrupted", "", {}))
                break
            if message:
                news.put(("failed", message, {}))
                break
    news.put(("ended", "", {}))


def all_jobs(work: Work, jobs: list[Job]) -> list[Job | str]:
    """What is still to be run."""
    keys: list[Job | str] = [*BASE, *jobs]
    return [job for job in keys if work.done(job if isinstance(job, str) else job.key) is None]
