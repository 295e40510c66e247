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
from .jobs import BASE, Interrupted, Task, Work, evaluate_base, train
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


def run_all(tasks: list[Task], workers: int, show: Show) -> None:
    """Run tasks, of one folder or of several, in `workers` processes; 1 means this one.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; checkpoints are saved.
        Failed: a run failed; the others were stopped and saved.
    """
    if workers == 1 or len(tasks) < 2:
        stop = threading.Event()
        with interruptible(stop):
            for task in tasks:
                if message := _run(task, show, stop.is_set):
                    raise Failed(message)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with interruptible(stop):
        _spread(tasks, min(workers, len(tasks)), show, context, stop)


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


def _run(task: Task, show: Show, stopped: Callable[[], bool]) -> str:
    """Run one; returns why it failed, or nothing."""
    job, work = task
    try:
        with one_thread(work):
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


def _spread(tasks: list[Task], workers: int, show: Show, context: Any, stop: Any) -> None:
    todo, news = context.Queue(), context.Queue()
    for task in [*tasks, *[None] * workers]:
        todo.put(task)
    processes = [
        context.Process(target=_worker, args=(todo, news, stop), daemon=True)
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


def _worker(todo: Any, news: Any, stop: Any) -> None:
    """Take tasks until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sets the event
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def stopped() -> bool:
        return stop.is_set() or (parent is not None and not parent.is_alive())

    while not stopped() and (task := todo.get()) is not None:
        try:
            message = _run(task, lambda *state: news.put(("state", *state)), stopped)
        except Interrupted:
            news.put(("interrupted", "", {}))
            break
        if message:
            news.put(("failed", message, {}))
            break
    news.put(("ended", "", {}))


def all_tasks(work: Work, jobs: list[Job]) -> list[Task]:
    """What is still to be run in a folder; the models before training come first."""
    return unfinished([Task(job, work) for job in (*BASE, *jobs)])


def unfinished(tasks: list[Task]) -> list[Task]:
    """Those that have left no result yet."""
    return [task for task in tasks if task.work.done(task.key) is None]
