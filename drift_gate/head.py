"""The LM head of the `linear_` forms: its checks, and the logits of a few rows.

z = logit_scale * cap(hidden W^T + bias) / temperature,  cap(x) = softcap * tanh(x / softcap)
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_floating, check_number, check_tensor
from .batch import Student
from .literals import read, written
from .ranks import copy_to_ranks
from .vocab_parallel import Shard, local_words, resolve_for, unwrap_words

READ_BYTES = 56 << 20  # of logits that are only read, on a CPU
SMALL_BYTES = 4 << 20  # of logits, that a small vocabulary may have at a time on a CPU
SLICE_WORDS = 1 << 21  # elements that softcap widens at a time: 8 MiB of float32


class Head(NamedTuple):
    """What makes logits of hidden states."""

    weight: Tensor  # [V, H], the dtype of the hidden states
    bias: Tensor | None  # [V]
    softcap: float  # 0: none
    scale: float  # logit_scale / temperature
    shard: Shard | None = None  # which words these are, where other ranks have the rest


class Inputs(NamedTuple):
    """The checked arguments of a `linear_` form."""

    student: Student
    hidden: Tensor  # [N, H]
    head: Head
    chunk_size: int
    scan_size: int  # of chunks that are only read
    backend: str


def check_head(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    chunk_size: int | None,
    backend: str,
    prefix: str = "",
    shard: Shard | None = None,
) -> Inputs:
    """Check a head and its hidden states; under autocast, cast them as `F.linear` would.

    A DTensor weight or bias is gathered; its gradient is averaged over the mesh, as FSDP does.
    With a shard, weight and bias are this rank's and the hidden states are all ranks' alike.
    """
    names = [prefix + name for name in ("hidden_states", "weight", "bias")]
    check_floating(names[0], hidden_states)
    if hidden_states.dim() not in (2, 3):
        shape = list(hidden_states.shape)
        raise ValueError(f"{names[0]} must be [N, H] or [B, T, H]; got shape {shape}")
    tensors = [hidden_states, _whole(names[1], weight)]
    if bias is not None:
        tensors.append(_whole(names[2], bias))
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind) and hidden_states.dtype != torch.float64:
        tensors = [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    _check_parts(names, tensors)
    hidden, weight, *biases = tensors
    if softcap is not None:
        check_number(f"{prefix}softcap", softcap, above=0)
    check_number(f"{prefix}logit_scale", logit_scale, above=0)
    check_number(f"{prefix}temperature", temperature, above=0)
    scale = float(logit_scale) / float(temperature)
    head = Head(weight, biases[0] if biases else None, float(softcap or 0), scale, shard)
    vocab = weight.shape[0] if shard is None else shard.total
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    student = Student(names[0], hidden.shape[:-1], vocab, dtype, hidden.device, shard)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if shard is not None:
        rows = copy_to_ranks(rows, shard.group)
    sizes = _chunk_sizes(chunk_size, weight, vocab if shard is None else shard.largest)
    return Inputs(student, rows, head, *sizes, resolve_for(backend, hidden, shard))


def _check_parts(names: list[str], tensors: list[Tensor]) -> None:
    hidden, weight = tensors[:2]
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(
            f"{names[1]} must be [V, H] with H = {width}, the last dimension of {names[0]}, and "
            f"V > 0; got shape {list(weight.shape)}"
        )
    if len(tensors) == 3 and tensors[2].shape != weight.shape[:1]:
        shape = list(tensors[2].shape)
        raise ValueError(f"{names[2]} must be [V] with V = {weight.shape[0]}; got shape {shape}")
    for name, x in zip(names[1:], tensors[1:], strict=False):
        if x.device != hidden.device:
            raise ValueError(
                f"{name} must be on the device of {names[0]}, {hidden.device}; got {x.device}"
            )
        if x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of {names[0]}, {hidden.dtype}; got {x.dtype} "
                "(torch.autocast casts both)"
            )


def _whole(name: str, x: Tensor) -> Tensor:
    """A floating-point tensor, gathered if it is a DTensor."""
    check_tensor(name, x)
    if hasattr(x, "full_tensor") and hasattr(x, "device_mesh"):
        from .sharded import gathered

        x = gathered(x)
    check_floating(name, x)
    return x


def _chunk_sizes(chunk_size: int | None, weight: Tensor, words: int) -> tuple[int, int]:
    """Rows whose logits of so many words exist at a time, and where they are only read.

    GEMMs reach their rate at some hundred rows on a CPU and at some thousand on a GPU, while the
    logits of a chunk are to stay small beside the head's gradient. The product that makes them
    needs fewer rows than the one that sums that gradient.
    """
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be an int; got {type(chunk_size).__name__}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1; got {chunk_size}")
        return chunk_size, chunk_size
    row = words * weight.itemsize
    on_cpu = weight.device.type == "cpu"
    most, size = (max(512, SMALL_BYTES // row), 160 << 20) if on_cpu else (8192, 640 << 20)
    rows = max(64, min(most, size // row // 64 * 64))
    return rows, max(1, min(rows, READ_BYTES // row)) if on_cpu else rows


def encode(shard: Shard | None) -> str:
    """A shard as a string, which ops can take."""
    return "" if shard is None else written(shard)


def decode(text: str) -> Shard | None:
    return Shard(*read(text)) if text else None


def local_head(
    hidden_states: Any, weight: Any, bias: Any, group: Any
) -> tuple[Any, Any, Any, Shard | None]:
    """This rank's part of a head whose words are sharded, and which they are.

    A DTensor head is taken to be so where it lies beside a group, or beside hidden states that
    are a DTensor too (tensor parallel); else it is gathered, as FSDP's sharded heads must be.
    """
    parallel = hasattr(hidden_states, "to_local")
    if group is None and not parallel:
        return hidden_states, weight, bias, None
    if parallel:
        hidden_states = _replicated("hidden_states", hidden_states)
    weight, shard = local_words("weight", weight, group, 0)
    if bias is not None:
        bias, _ = unwrap_words("bias", bias, 0)
    return hidden_states, weight, bias, shard


def _replicated(name: str, x: Any) -> Tensor:
    """The local tensor of a DTensor that all ranks of its mesh have alike."""
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(f"{name} must be replicated over their mesh; got {x.placements}")
    local: Tensor = x.to_local()
    return local


def logits_of(head: Head, hidden: Tensor, out: Tensor) -> Tensor:
    """Logits [C, V] of hidden [C, H] before the scale, in the first rows of `out`.

    Rounded to the head's dtype, as eager code rounds them.
    """
    z = out[: len(hidden)]
    if head.bias is None:
        torch.mm(hidden, head.weight.t(), out=z)
    else:
        torch.addmm(head.bias, hidden, head.weight.t(), out=z)
    if head.softcap:
        for rows in slices(z):
            wide = z[rows].to(torch.promote_types(z.dtype, torch.float32))
            z[rows].copy_(wide.div_(head.softcap).tanh_().mul_(head.softcap))
    return z


def slices(z: Tensor) -> list[slice]:
    """Rows of z [C, V] that may be widened at a time."""
    step = max(1, SLICE_WORDS // z.shape[1])
    return [slice(i, i + step) for i in range(0, len(z), step)]
