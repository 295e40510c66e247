"""Threads that share a pass: the same bits for any number, and nothing left behind."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
from support.heads import draw_head, run_head
from support.judge import EACH_FUSED, loss_and_grad
from support.problems import draw

from drift_gate.passes.threads import share


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@EACH_FUSED
def test_any_number_of_threads_gives_the_same_bits(set_threads, dtype, backend):
    problem = draw(3, 40, 9001, dtype=dtype, masked=0.3)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(loss_and_grad(problem, backend))
        assert torch.get_num_threads() == threads
    (one, one_grad), *others = results
    for other, grad in others:
        assert torch.equal(other.loss, one.loss)
        assert torch.equal(other.entropy, one.entropy)
        assert torch.equal(grad, one_grad)


@EACH_FUSED
def test_in_place_and_from_several_threads_at_once(set_threads, backend):
    set_threads(2)
    problem = draw(2, 30, 20_000, masked=0.2)
    _, expected = loss_and_grad(problem, backend)
    results: list[torch.Tensor] = []

    def work():
        results.append(loss_and_grad(problem, backend, inplace_backward=True)[1])

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 3
    assert all(torch.equal(grad, expected) for grad in results)


def test_the_processs_setting_is_left_alone(set_threads):
    """New threads still start with it, and ATen still splits what others run."""
    set_threads(2)
    share(range(4), lambda task, worker: None, 2)
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]
    assert torch.get_num_threads() == 2


def test_an_error_in_a_thread_reaches_the_caller():
    def fail(task: int, worker: int) -> None:
        if task == 3:
            raise RuntimeError("of task 3")

    for workers in (1, 2):
        with pytest.raises(RuntimeError, match="of task 3"):
            share(range(5), fail, workers)
    share([], fail, 2)


def test_every_task_is_done_once():
    done: list[tuple[int, int]] = []
    share(range(7), lambda task, worker: done.append((task, worker)), 3)
    assert sorted(done) == [(i, i % 3) for i in range(7)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_threads_of_its_own():
    share(range(2), lambda task, worker: None, 2)
    child = os.fork()
    if child == 0:  # no assertion of pytest's may run here
        done: list[int] = []
        share(range(4), lambda task, worker: done.append(task), 2)
        os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def busy_collector():
    """Garbage is collected all the time, and each time another thread may run."""

    def yields(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    before = gc.get_threshold()
    gc.set_threshold(10)
    gc.callbacks.append(yields)
    yield
    gc.callbacks.remove(yields)
    gc.set_threshold(*before)


@EACH_FUSED
def test_calls_in_several_threads_while_garbage_is_collected(busy_collector, backend):
    problem = draw_head("opd", 1, 3)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                run_head(problem, backend)
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed
