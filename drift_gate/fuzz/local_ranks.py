"""Ranks as threads of this process, and process groups that join them.

Its collectives are what the losses use: an all-gather, a sum and a maximum. Each goes through a
board on which every rank lays down its tensor, and sums are in the order of the ranks.
"""

import functools
import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel import ranks

T = TypeVar("T")
Groups = dict[str, list[list[int]]]
PATIENCE = 60.0  # seconds that a rank waits for the others
_numbers = itertools.count()


def run_ranks(
    count: int, work: Callable[[int, dict[str, Any]], T], groups: Groups | None = None
) -> list[T]:
    """work(rank, its groups) in `count` threads; what each returned. One that fails, fails.

    groups: by name (of a field of `Parallel`), the members of every group; None: all, as `group`.
    """
    groups = {"group": [list(range(count))]} if groups is None else groups
    boards = {name: [_Board(members) for members in every] for name, every in groups.items()}
    threads = torch.get_num_threads()
    found: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(threads)  # which is a thread's own
        named = {
            name: _group(board.members.index(rank), board)
            for name, every in boards.items()
            for board in every
            if rank in board.members
        }
        try:
            found[rank] = work(rank, named)
        except threading.BrokenBarrierError as error:  # another rank failed first
            errors.append(error)
        except BaseException as error:
            errors.insert(0, error)
        else:
            return
        for board in itertools.chain(*boards.values()):
            board.barrier.abort()

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for board in itertools.chain(*boards.values()):
        for rank in range(len(board.members)):
            ranks.forget(board.name(rank))
    if errors:
        raise errors[0]
    return found


class _Board:
    def __init__(self, members: list[int]) -> None:
        self.members = members
        self.barrier = threading.Barrier(len(members), timeout=PATIENCE)
        self.places: list[Any] = [None] * len(members)
        self.number = next(_numbers)

    def name(self, rank: int) -> str:
        return f"thread {rank} of {self.number}"

    def every(self, rank: int, x: Tensor) -> list[Tensor]:
        """x of every rank."""
        self.places[rank] = x.clone()
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()  # nobody lays down the next one before all have read
        return found


def _group(rank: int, board: _Board) -> Any:
    return _local_group()(rank, board)


@functools.cache
def _local_group() -> Any:
    """The class; a PyTorch may be built without torch.distributed."""

    work: Any = dist.Work  # whose signatures differ between versions
    process_group: Any = dist.ProcessGroup

    class Done(work):  # type: ignore[misc]
        def wait(self, timeout: Any = None) -> bool:
            return True

    class LocalGroup(process_group):  # type: ignore[misc]
        def __init__(self, rank: int, board: _Board) -> None:
            super().__init__(rank, len(board.places))
            self.number, self.board = rank, board

        @property
        def group_name(self) -> str:
            return self.board.name(self.number)

        def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
            (x,) = tensors
            every = self.board.every(self.number, x)
            largest = options.reduceOp == dist.ReduceOp.MAX
            join = torch.maximum if largest else torch.add
            x.copy_(functools.reduce(join, every))
            return Done()

        def allgather(self, outs: list[list[Tensor]], tensors: list[Tensor], *_: Any) -> Any:
            (mine,), (x,) = outs, tensors  # of objects: what ranks that disagree say
            for out, other in zip(mine, self.board.every(self.number, x), strict=True):
                out.copy_(other)
            return Done()

        def all_gather_single(self, out: Tensor, x: Tensor, options: Any = None) -> Any:
            out.copy_(torch.cat(self.board.every(self.number, x)))
            return Done()

        _allgather_base = all_gather_single  # its name until torch 2.12

    return LocalGroup
