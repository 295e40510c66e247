"""Which implementation runs: Triton kernels on a GPU, C on a CPU, plain PyTorch anywhere."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..choices import BACKENDS
from . import native

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed (it exists for Linux alone); known at import, as it cannot be found
out while `torch.compile` traces."""

_triton_on_cpu = False


@functools.cache
def passes_of(backend: str) -> Any:
    """The module with a backend's passes."""
    return importlib.import_module(f"{__package__}.{backend}")


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Let backend="triton" take CPU tensors: for Triton's interpreter and for emulators."""
    global _triton_on_cpu
    before, _triton_on_cpu = _triton_on_cpu, True
    try:
        yield
    finally:
        _triton_on_cpu = before


def _has_native() -> bool:
    return native.library.find() is not None


# What torch.compiler.assume_constant_result does, beside loading torch._dynamo (seconds): the
# compiler cannot look for a library.
_has_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(backend: str, *tensors: Tensor, sharded: bool = False) -> str:
    """Name the backend that will run on these tensors, of one device: none of them is "auto".

    "auto" takes Triton for CUDA (and ROCm) tensors of up to 32 bits, C for such tensors on a CPU
    where it was compiled, and PyTorch for the rest. sharded: the words are spread over ranks.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the tensors' device, or on shards.
        TypeError: Triton or C asked for float64.
    """
    first = tensors[0]
    narrow = True
    for x in tensors:  # a comprehension is one more call
        narrow = narrow and x.dtype in native.KINDS
    if backend == "auto":
        if first.is_cuda and narrow and HAS_TRITON:
            return "triton"
        in_c = narrow and first.is_cpu and native.enabled and _has_native()
        return "native" if in_c else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "reference" and sharded:
        raise ValueError(
            'backend "reference" takes whole rows of logits; got parallel.vocab_parallel_group'
        )
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend "triton" needs the package triton; it is not installed')
        if not (first.is_cuda or _triton_on_cpu):
            _wrong_device(backend, "a CUDA device", first)
    if backend == "native":
        if not first.is_cpu:
            _wrong_device(backend, "a CPU", first)
        if not (native.enabled and _has_native()):
            raise ValueError(
                'backend "native" needs the functions in C, which are built at installation where '
                "there is a C compiler, and DRIFT_GATE_NATIVE other than 0"
            )
    if backend in ("triton", "native") and not narrow:
        raise TypeError(
            f"backend {backend!r} takes bfloat16, float16 and float32; got "
            f'{", ".join(str(x.dtype) for x in tensors)} (backend="torch" computes in float64)'
        )
    return backend


def backends_on(device: torch.device) -> tuple[str, ...]:
    """The backends that run on a device's tensors, the one that "auto" takes first."""
    found = []
    for name in BACKENDS:
        try:
            resolve(name, torch.empty(0, device=device))
        except ValueError:
            continue
        found.append(name)
    return tuple(name for name in found if name not in ("auto", "reference"))


def _wrong_device(backend: str, wanted: str, x: Tensor) -> None:
    raise ValueError(
        f'backend "{backend}" needs tensors on {wanted}; got {x.device} (backend="auto" chooses by '
        "device)"
    )
