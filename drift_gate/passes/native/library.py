"""The compiled library: found once, its functions and the names of options that it knows."""

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ..threads import share
from .jobs import SIZES

FOLDER = Path(__file__).parent
# A call that reads and writes fewer words is not shared: to wake a thread takes longer.
FEW_WORDS = 1 << 18
# For a thread at a time: threads that touch one new huge page at a time each clear it.
MOST_WORDS = 1 << 22
TASKS_PER_WORKER = 8
NO_MEMORY = -1

Run = Callable[[bytes, int, int], int]


@functools.cache
def find() -> ctypes.CDLL | None:
    """None where there is no compiled library, or none that fits this machine and these sources."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [path for suffix in suffixes if (path := FOLDER / f"_rows{suffix}").exists()]
    if not built:
        return None
    try:
        found = ctypes.CDLL(str(built[0]))
        _declare(found)
    except (OSError, AttributeError) as error:  # built on another machine, from other sources
        warnings.warn(f"CPU losses run without their functions in C: {error}", stacklevel=2)
        return None
    return found


def _declare(found: ctypes.CDLL) -> None:
    """Types of arguments and results. Raises AttributeError where the sources do not fit."""
    found.drift_gate_instruction_set.restype = ctypes.c_char_p
    found.drift_gate_choice.restype = ctypes.c_char_p
    found.drift_gate_choice.argtypes = ctypes.c_char_p, ctypes.c_int64
    found.drift_gate_size.restype = ctypes.c_int64
    found.drift_gate_size.argtypes = (ctypes.c_char_p,)
    found.drift_gate_share.restype = ctypes.c_int64
    found.drift_gate_share.argtypes = (
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    for name, size in SIZES.items():
        if found.drift_gate_size(name.encode()) != size:
            raise AttributeError(f"the library was built from other sources ({name})")


def _loaded() -> ctypes.CDLL:
    found = find()
    assert found is not None
    return found


def instruction_set() -> str:
    """ "avx512", "avx2" or "any": which functions run."""
    return _loaded().drift_gate_instruction_set().decode()


@functools.cache
def function(name: str, for_set: bool = True) -> Run:
    """f(job, first, last) on rows first ... last; `for_set`: there is one an instruction set.

    Returns 0, NO_MEMORY or what is wrong with the arguments.
    """
    suffix = f"_{instruction_set()}" if for_set else ""
    found = getattr(_loaded(), f"drift_gate_{name}{suffix}")
    found.restype = ctypes.c_int64
    found.argtypes = ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64
    return found


@functools.cache
def choice(option: str, name: str) -> int:
    """The number of an option's name. Raises ValueError where it has no such name."""
    names = choices(option)
    if name not in names:
        raise ValueError(f"{option} must be one of {', '.join(names)}; got {name!r}")
    return names.index(name)


@functools.cache
def choices(option: str) -> tuple[str, ...]:
    """The names that an option can have, in the order of their numbers."""
    names: list[str] = []
    while (name := _loaded().drift_gate_choice(option.encode(), len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def run(name: str, job: bytes, rows: int, words: int, for_set: bool = True) -> int:
    """Call a function on all rows, by one thread or shared; `words` of work in a row.

    Returns 0, or the first thing wrong: the threads of a shared call may find several.
    """
    work = function(name, for_set)
    if rows * words < FEW_WORDS or (workers := torch.get_num_threads()) == 1:
        code = work(job, 0, rows)
        if code == NO_MEMORY:
            raise no_memory()
        return code
    address = ctypes.cast(work, ctypes.c_void_p).value  # type: ignore[arg-type]
    size = max(1, min(MOST_WORDS // words, rows // (workers * TASKS_PER_WORKER)))
    taken = ctypes.c_int64(0)
    shared = _loaded().drift_gate_share
    found: list[int] = []

    def take_part(part: int, worker: int) -> None:
        found.append(shared(address, job, rows, size, ctypes.addressof(taken)))

    share(range(workers), take_part, workers)
    if NO_MEMORY in found:
        raise no_memory()
    return min((code for code in found if code), default=0)


def no_memory() -> MemoryError:
    """What to raise where a function has returned NO_MEMORY."""
    return MemoryError("drift_gate found no memory for a few rows of data")
