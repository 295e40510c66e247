"""Work shared by threads that do not wait for each other.

ATen splits every operation over its threads and joins them after it. A pass over a chunk of rows
is many short operations, and on a busy machine each join waits for a core. Here each thread takes
whole chunks instead, runs its operations alone, and all join once.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _workers(count: int) -> ThreadPoolExecutor:
    """At least `count` threads, in which ATen uses one thread."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < count:
            everyone = threading.Barrier(count)
            pool = ThreadPoolExecutor(count, thread_name_prefix="drift_gate")

            def settle() -> None:
                everyone.wait()  # so that each thread takes one
                torch.get_num_threads()  # reads the process's setting, which the next line replaces
                torch.set_num_threads(1)

            before = torch.get_num_threads()
            for started in [pool.submit(settle) for _ in range(count)]:
                started.result()
            torch.set_num_threads(before)  # the process's setting again, as threads leave it at 1
            _pool, _size = pool, count
        return _pool


def share(tasks: Sequence[T], work: Callable[[T, int], None], workers: int) -> None:
    """Call work(task, worker) for every task, worker in [0, workers); tasks go round in turn.

    `work` runs without autograd, and where workers > 1 in other threads: neither autograd's modes
    nor ATen's dispatch modes reach it, so its tensors must be detached.
    """
    workers = min(workers, len(tasks))
    if not workers:
        return

    def run(worker: int) -> None:
        with torch.no_grad():
            for task in tasks[worker::workers]:
                work(task, worker)

    if workers == 1:
        return run(0)
    for done in [_workers(workers).submit(run, worker) for worker in range(workers)]:
        done.result()
