"""The PyTorch backend's threads: the same bits for any number, and nothing left behind."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest
import torch
from support.heads import draw_head, run_head
from support.judge import loss_and_grad
from support.problems import draw

from drift_gate import literals
from drift_gate.threads import share


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_threads_gives_the_same_bits(set_threads, dtype):
    problem = draw(3, 40, 9001, dtype=dtype, masked=0.3)
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        results.append(loss_and_grad(problem, "torch"))
        assert torch.get_num_threads() == threads
    (one, one_grad), *others = results
    for other, grad in others:
        assert torch.equal(other.loss, one.loss)
        assert torch.equal(other.entropy, one.entropy)
        assert torch.equal(grad, one_grad)


def test_in_place_and_from_several_threads_at_once(set_threads):
    set_threads(2)
    problem = draw(2, 30, 20_000, masked=0.2)
    _, expected = loss_and_grad(problem, "torch")
    results: list[torch.Tensor] = []

    def work():
        results.append(loss_and_grad(problem, "torch", inplace_backward=True)[1])

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


def test_options_are_read_in_one_thread_while_another_reads(busy_collector):
    problem = draw_head("opd", 1, 3)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                run_head(problem, "torch")
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


@pytest.mark.parametrize(
    "values", [[1, 0.1, None, True, False, [], [[2]]], ["", 'a"b\\c', "[1,2]"]]
)
def test_options_are_read_as_they_were_written(values):
    assert literals.read(literals.written(values)) == values
