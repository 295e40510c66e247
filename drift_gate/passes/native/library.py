"""The compiled library: found once, its functions, and what they take.

Tensors are read by address, and so checked before. Options have the numbers that the library gives
their names.
"""

import ctypes
import functools
import importlib.machinery
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..threads import share
from .jobs import SIZES

FOLDER = Path(__file__).parent
# A call that reads and writes fewer words is not shared: to wake a thread takes longer.
FEW_WORDS = 1 << 18
# For a thread at a time: threads that touch one new huge page at a time each clear it.
MOST_WORDS = 1 << 22
TASKS_PER_WORKER = 8
NO_MEMORY = -1

CPU = torch.device("cpu")
FLOAT32, INT32, INT64, BOOL = torch.float32, torch.int32, torch.int64, torch.bool
KINDS = {torch.bfloat16: 0, torch.float16: 1, FLOAT32: 2}  # as rows.c numbers them

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


# Tensors.


def rows_of(x: Tensor, rows: int) -> tuple[int, int, int, int, int]:
    """`struct rows` of [B, T, V], B * T rows."""
    batch, length, vocab = x.shape
    of_batch, of_row, of_word = x.stride()
    if batch * length != rows or not (of_word == 1 or vocab < 2):
        raise _unfit("logits", x, f"[B, T, V], {rows} rows that are contiguous")
    return x.data_ptr(), of_batch, of_row, length or 1, KINDS[x.dtype]


def floats(count: int, *tensors: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Row data of so many elements: contiguous, to be kept, and their addresses, 0 for None."""
    kept, places = [], []
    for x in tensors:
        if x is None:
            places.append(0)
            continue
        if x.dtype is not FLOAT32 or x.numel() != count:
            raise _unfit("row data", x, f"float32 of {count} elements")
        x = x.contiguous()
        kept.append(x)
        places.append(x.data_ptr())
    return kept, places


def booleans(x: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """A mask of so many elements, contiguous, to be kept; and its address, 0 for None."""
    if x is None:
        return None, 0
    if x.dtype is not BOOL or x.numel() != count:
        raise _unfit("masks", x, f"bool of {count} elements")
    x = x.contiguous()
    return x, x.data_ptr()


def listed(ids: Tensor, count: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """int32 or int64 (or this one alone), contiguous, of so many elements."""
    kind = ids.dtype
    if (kind is not INT64 and kind is not INT32) or (dtype is not None and kind is not dtype):
        raise _unfit("ids", ids, str(dtype or "int32 or int64"))
    if count is not None and ids.numel() != count:
        raise _unfit("ids", ids, f"of {count} elements")
    return ids.contiguous()


# As valid.h numbers them: bytes of an integer, or floats.
MASKS = {torch.bfloat16: 16, torch.float16: 17, FLOAT32: 18, torch.float64: 19}


def mask_kind(x: Tensor, count: int) -> int:
    """How the elements of a mask of any dtype are read."""
    kind = MASKS.get(x.dtype, x.element_size())
    if x.numel() != count or x.is_complex() or (x.is_floating_point() and kind < 16):
        raise _unfit("response_mask", x, f"bool, integer or float of {count} elements")
    return kind


def _unfit(name: str, x: Tensor, wanted: str) -> TypeError:
    return TypeError(f"{name} must be {wanted}; got {x.dtype} {list(x.shape)}")
