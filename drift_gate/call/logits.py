"""Frontend `logits`: the checks of logits that the model has produced."""

import torch
from torch import Tensor

from ..parallel.words import Shard, whole
from ..passes.backends import resolve
from . import arguments
from .rows import Student


def of_logits(
    logits: Tensor, shard: Shard | None, backend: str, teacher: Tensor | None = None
) -> tuple[Student, str, Shard]:
    """Logits [B, T, V] or [N, V], checked; the backend that runs; which words they are."""
    arguments.logits_like("logits", logits)
    vocab = logits.shape[-1] if shard is None else shard.total
    dtype = torch.promote_types(logits.dtype, torch.float32)
    student = Student("logits", "logits without V", logits.shape[:-1], vocab, dtype, logits.device)
    return student, resolve_for(backend, shard, logits), whole(vocab) if shard is None else shard


def resolve_for(backend: str, shard: Shard | None, *tensors: Tensor) -> str:
    """`backends.resolve`; the reference takes whole rows alone."""
    chosen = resolve(backend, *tensors)
    if shard is not None and chosen == "reference":
        raise ValueError(
            'backend "reference" takes whole rows of logits; got parallel.vocab_parallel_group'
        )
    return chosen


def empty_scan(
    like: Tensor, n: int, k: int, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `scan` returns for ids [n, k], empty, in the accumulation dtype of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shapes = (n, k), (n, k), (n,), (n,), (n if with_entropy else 0,)
    a, b, c, d, e = (like.new_empty(shape, dtype=dtype) for shape in shapes)
    return a, b, c, d, e
