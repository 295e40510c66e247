"""Frontend `logits`: the checks of logits that the model has produced."""

from typing import Any

import torch
from torch import Tensor

from ..parallel.words import Shard
from ..passes.backends import resolve
from . import arguments
from .rows import Student


def of_logits(
    logits: Tensor, shard: Shard | None, inplace: bool, backend: str
) -> tuple[Student, Tensor, str, Shard]:
    """Logits [B, T, V] or [N, V], checked, and as [B, T, V]; the backend that runs; which words
    they are. inplace: whether their gradient is to be written in their place."""
    logits_like("logits", logits)
    if inplace:
        writable("logits", logits)
    vocab = logits.shape[-1] if shard is None else shard.total
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student = Student("logits", "logits without V", logits.shape[:-1], vocab, dtype, logits.device)
    chosen = resolve(backend, logits, sharded=shard is not None)
    batch = logits if logits.dim() == 3 else logits[None]
    return student, batch, chosen, Shard(vocab) if shard is None else shard


def logits_like(name: str, x: Any, any_rank: bool = False) -> None:
    """Raise unless x is [N, V] or [B, T, V] (or of any rank), its last dimension contiguous."""
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        arguments.floating(name, x)
    dims = x.dim()
    if dims == 0 or not (any_rank or dims == 2 or dims == 3):
        shapes = "[..., V]" if any_rank else "[N, V] or [B, T, V]"
        raise ValueError(f"{name} must be {shapes}; got shape {list(x.shape)}")
    vocab = x.shape[-1]
    if vocab == 0:
        raise ValueError(f"{name} must have at least one word; got shape {list(x.shape)}")
    if x.stride(-1) != 1 and vocab > 1 and x.numel() > 0:
        raise ValueError(
            f"{name} must be contiguous in their last dimension; got strides "
            f"{list(x.stride())}. {name}.contiguous() copies them once"
        )


def overlaps(x: Tensor) -> bool:
    """Whether elements of x may lie in the same memory, as those of expanded tensors do."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def writable(name: str, x: Tensor) -> None:
    """Raise where memory that is to hold a gradient overlaps itself; under torch.compile none is
    written in place."""
    if not torch.compiler.is_compiling() and overlaps(x):
        raise ValueError(
            f"inplace_backward needs {name} that do not overlap themselves in memory; got strides "
            f"{list(x.stride())} for shape {list(x.shape)}. {name}.contiguous() copies them once, "
            "inplace_backward=False writes the gradient elsewhere"
        )


def as_batch(x: Tensor) -> Tensor:
    """[..., V] as [B, T, V]: a view where the strides allow it, for [N, V] and [B, T, V] always."""
    dims = x.dim()
    if dims == 3:
        return x
    return x[None] if dims == 2 else x.reshape(1, -1, x.shape[-1])


def empty_scan(
    like: Tensor, n: int, k: int, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `scan` returns for ids [n, k], empty, in the accumulation dtype of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shapes = (n, k), (n, k), (n,), (n,), (n if with_entropy else 0,)
    a, b, c, d, e = (like.new_empty(shape, dtype=dtype) for shape in shapes)
    return a, b, c, d, e
