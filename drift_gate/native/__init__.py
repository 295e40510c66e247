"""Row functions in C, for CPU tensors of up to 32 bits: a row passes through the cache once.

ATen goes over a row once for each operation, and stores what lies between in memory; here a tile of
a row is read, computed on in registers, and written. `setup.py` builds the library where there is a
C compiler. Where there is none, or `DRIFT_GATE_NATIVE=0` in the environment, the passes go through
ATen, slower and to the same formulas: see `torch_passes` and `torch_divergence`.

Every function takes [B, T, V] tensors, last dimension contiguous, any outer strides, and a mask [N]
of the chosen rows, N = B * T. Arithmetic is float32, sums of rows are float64, and each result is
rounded once.
"""

import ctypes
import functools
import importlib.machinery
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..row_chunks import worker_count
from ..threads import share

KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # as rows.c numbers them
enabled = os.environ.get("DRIFT_GATE_NATIVE", "1") != "0"
FOLDER = Path(__file__).parent
DIRECTIONS = "reverse", "forward", "jsd"
# For a call: threads that touch one new huge page at a time each clear it.
MOST_WORDS = 1 << 22
TASKS_PER_WORKER = 4
INT, FLOAT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_void_p


class _Rows(ctypes.Structure):
    """`struct rows`: data, offset of each row in elements, dtype."""

    _fields_ = (("data", POINTER), ("offsets", POINTER), ("kind", INT))


SIGNATURES: dict[str, tuple[Any, ...]] = {  # after first, last and vocab
    "zero": (_Rows,),
    "scan": (_Rows, FLOAT, INT, POINTER, INT),
    "softmax": (_Rows, _Rows, FLOAT, POINTER, INT),
    "divergence": (_Rows, _Rows, FLOAT, FLOAT, INT, DOUBLE, INT, POINTER, INT),
    "divergence_grad": (_Rows, _Rows, _Rows, FLOAT, FLOAT, INT, DOUBLE, POINTER, INT),
}


def takes(*tensors: Tensor) -> bool:
    """Whether the functions here run on these tensors."""
    fit = all(x.is_cpu and x.dtype in KINDS for x in tensors)
    return fit and enabled and _library() is not None


def instruction_set() -> str | None:
    """ "avx512", "avx2" or "any": what the functions were compiled for; None without them."""
    library = _library() if enabled else None
    return None if library is None else library.drift_gate_instruction_set().decode()


@functools.cache
def _library() -> ctypes.CDLL | None:
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = [path for suffix in suffixes if (path := FOLDER / f"_rows{suffix}").exists()]
    if not built:
        return None
    try:
        library = ctypes.CDLL(str(built[0]))
    except OSError as error:  # built on another machine
        warnings.warn(f"CPU losses run without their functions in C: {error}", stacklevel=2)
        return None
    library.drift_gate_instruction_set.restype = ctypes.c_char_p
    return library


@functools.cache
def _function(name: str) -> Callable[..., None]:
    library = _library()
    assert library is not None
    suffix = "" if name == "zero" else f"_{instruction_set()}"
    function = getattr(library, f"drift_gate_{name}{suffix}")
    function.restype, function.argtypes = None, (INT, INT, INT, *SIGNATURES[name])
    return function


def _offsets(x: Tensor, chosen: Tensor | None) -> Tensor:
    """Where the chosen rows of [B, T, V] begin, in elements."""
    batch, length, _ = x.shape
    of_batch, of_row, _ = x.stride()
    offsets = torch.arange(length, device="cpu") * of_row
    if batch != 1:
        of_first = torch.arange(batch, device="cpu") * of_batch
        offsets = (of_first[:, None] + offsets).flatten()
    return offsets if chosen is None else offsets[chosen]


def _new(results: int, x: Tensor, chosen: Tensor | None) -> Tensor:
    """[results, chosen rows], whatever the caller's default dtype and device."""
    count = x.shape[0] * x.shape[1] if chosen is None else int(chosen.sum())
    return torch.empty(results, count, dtype=torch.float32, device="cpu")


def _run(name: str, tensors: tuple[Tensor, ...], chosen: Tensor | None, *options: Any) -> None:
    """Call the function on the chosen rows of the tensors, shared by threads."""
    offsets = [_offsets(x, chosen) for x in tensors]
    places = [
        _Rows(x.data_ptr(), at.data_ptr(), KINDS[x.dtype])
        for x, at in zip(tensors, offsets, strict=True)
    ]
    function, count, vocab = _function(name), len(offsets[0]), tensors[-1].shape[2]
    workers = worker_count(tensors[0])
    size = max(1, min(MOST_WORDS // vocab, count // (workers * TASKS_PER_WORKER)))

    def work(first: int, worker: int) -> None:
        function(first, min(first + size, count), vocab, *places, *options)

    share(range(0, count, size), work, workers)


def _row_data(chosen: Tensor, *rows: Tensor) -> Tensor:
    """[k, chosen rows] float32."""
    return torch.stack([x[chosen].float() for x in rows])


def scan(logits: Tensor, chosen: Tensor | None, scale: float, with_entropy: bool) -> Tensor:
    """[3, rows] float32: maximum of z = scale * logits, log sum exp(z - maximum), entropy.

    A row with a NaN or +inf gives NaN (its maximum may be inf); all -inf gives -inf twice and NaN.
    """
    out = _new(3, logits, chosen)
    _run("scan", (logits,), chosen, scale, with_entropy, out.data_ptr(), out.shape[1])
    return out


def expand(
    logits: Tensor,
    active: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    alpha: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """out = scale * alpha * softmax(scale * logits) in active rows, 0 in the others.

    Row data are [N]. `out` has the dtype of the logits, and may be the logits.
    """
    factor = (-log_sum.double()).exp_().mul_(alpha).mul_(scale)
    row_data = _row_data(active, maximum, factor)
    _run("zero", (out,), ~active)
    _run("softmax", (logits, out), active, scale, row_data.data_ptr(), row_data.shape[1])


def divergence(
    student: Tensor,
    teacher: Tensor,
    chosen: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
) -> Tensor:
    """[7, rows]: loss, maximum and log_sum of student and teacher, centre, entropy."""
    out = _new(7, student, chosen)
    options = scale, teacher_scale, DIRECTIONS.index(direction), beta, with_entropy
    _run("divergence", (student, teacher), chosen, *options, out.data_ptr(), out.shape[1])
    return out


def divergence_grad(
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    active: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    out: Tensor,
) -> None:
    """out = upstream * d loss / d student in active rows, 0 in the others; as `expand`.

    statistics [5, N] from `divergence`, upstream [N].
    """
    row_data = _row_data(active, *statistics, upstream * scale)
    options = scale, teacher_scale, DIRECTIONS.index(direction), beta
    pointers = row_data.data_ptr(), row_data.shape[1]
    _run("zero", (out,), ~active)
    _run("divergence_grad", (student, teacher, out), active, *options, *pointers)
