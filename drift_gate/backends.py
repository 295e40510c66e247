"""Which implementation runs: Triton kernels on a GPU, chunked PyTorch anywhere."""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch", "reference"]

_triton_on_cpu = False


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed (it exists for Linux alone)."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Let backend="triton" take CPU tensors: for Triton's interpreter and for emulators."""
    global _triton_on_cpu
    before, _triton_on_cpu = _triton_on_cpu, True
    try:
        yield
    finally:
        _triton_on_cpu = before


def resolve(backend: str, tensor: Tensor) -> str:
    """Name the backend that will run on `tensor`: "triton", "torch" or "reference".

    "auto" takes Triton for CUDA (and ROCm) tensors of up to 32 bits, and PyTorch for the rest.

    Raises:
        ValueError: an unknown backend, or one that cannot run on the tensor's device.
        TypeError: Triton asked for float64.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    on_gpu = tensor.is_cuda or _triton_on_cpu
    wide = tensor.dtype == torch.float64
    if backend == "auto":
        return "triton" if tensor.is_cuda and not wide and has_triton() else "torch"
    if backend == "triton":
        if not has_triton():
            raise ValueError('backend "triton" needs the package triton; it is not installed')
        if not on_gpu:
            raise ValueError(
                f'backend "triton" needs tensors on a CUDA device; got {tensor.device} '
                '(backend="auto" chooses by device)'
            )
        if wide:
            raise TypeError(
                'backend "triton" takes bfloat16, float16 and float32; got float64 '
                '(backend="torch" computes in float64)'
            )
    return backend
