"""The arguments of the `linear_` forms, checked: hidden states and an LM head."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments
from ..call.rows import Student
from ..options import Head, Parallel, as_head, as_parallel
from ..parallel.words import Shard, local_words, unwrap_words
from ..passes.backends import resolve
from .chunks import TILE

READ_BYTES = 56 << 20  # of logits that are only read, on a CPU
SMALL_BYTES = 4 << 20  # of logits, that a small vocabulary may have at a time on a CPU
CPU_BYTES = 160 << 20  # of logits on a CPU,
GPU_BYTES = 2400 << 20  # and elsewhere: 8,192 rows of 151,936 words in bfloat16,
GPU_READ_BYTES = 640 << 20  # or 2,048 where they are only read


class HeadRule(NamedTuple):
    """What makes logits of hidden states, beside the tensors.

    z = scale * cap(hidden W^T + bias), cap(x) = softcap * tanh(x / softcap)
    """

    softcap: float  # 0: none
    scale: float  # logit_scale / temperature
    chunk_size: int  # rows whose logits exist at a time,
    scan_size: int  # where they are only read
    wide: bool = False  # logits are float32 where the head is shorter


class HeadInputs(NamedTuple):
    """Plain tensors of one dtype (the bias may be wider), and the rule."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], this rank's words
    bias: Tensor | None  # [V]
    rule: HeadRule
    shard: Shard


def local_head(
    hidden_states: Any, head: Head | Tensor, parallel: Parallel | None
) -> tuple[Any, Head, Shard | None]:
    """This rank's part of a head whose words are sharded, and which they are.

    A DTensor head is taken to be so where it lies beside a group, or beside hidden states that
    are a DTensor too (tensor parallel); else it is gathered, as FSDP's sharded heads must be.
    """
    head = as_head(head)
    tensor_parallel = hasattr(hidden_states, "to_local")
    asked = parallel is not None and as_parallel(parallel).vocab_parallel_group is not None
    if not asked and not tensor_parallel:
        return hidden_states, head, None
    if tensor_parallel:
        if not all(placement.is_replicate() for placement in hidden_states.placements):
            raise ValueError(
                f"hidden_states must be replicated over their mesh; got {hidden_states.placements}"
            )
        hidden_states = hidden_states.to_local()
    weight, shard = local_words("head.weight", head.weight, parallel, 0)
    bias = head.bias
    if bias is not None:
        bias, _ = unwrap_words("head.bias", bias, 0)
    return hidden_states, dataclasses.replace(head, weight=weight, bias=bias), shard


def take_head(
    hidden_states: Any,
    head: Head | Tensor,
    temperature: float,
    backend: str,
    shard: Shard | None = None,
    prefix: str = "",
) -> tuple[HeadInputs, Student, str]:
    """Check a head and its hidden states; under autocast, cast them as `F.linear` would.

    A DTensor weight or bias is gathered; its gradient is averaged over the mesh, as FSDP does.
    With a shard, weight and bias are this rank's and the hidden states are all ranks' alike.
    """
    name, at = f"{prefix}hidden_states", f"{prefix}head"
    if not isinstance(head, Head):
        head = as_head(head, at)
    if not (isinstance(hidden_states, Tensor) and hidden_states.is_floating_point()):
        arguments.floating(name, hidden_states)
    if hidden_states.dim() not in (2, 3):
        shape = list(hidden_states.shape)
        raise ValueError(f"{name} must be [N, H] or [B, T, H]; got shape {shape}")
    hidden, weight, bias = hidden_states, _gathered(f"{at}.weight", head.weight), head.bias
    if bias is not None:
        bias = _gathered(f"{at}.bias", bias)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check_parts(name, at, hidden, weight, bias)
    if head.logits_dtype not in (None, torch.float32):
        raise ValueError(
            f"{at}.logits_dtype must be None or torch.float32; got {head.logits_dtype}"
        )
    vocab = weight.shape[0] if shard is None else shard.total
    row_dtype = torch.promote_types(hidden.dtype, torch.float32)
    of = f"{name} without H"
    student = Student(name, of, hidden.shape[:-1], vocab, row_dtype, hidden.device)
    wide = head.logits_dtype is not None and row_dtype != hidden.dtype
    words = vocab if shard is None else shard.largest
    sizes = chunk_sizes(f"{at}.chunk_size", head.chunk_size, weight, words, wide)
    if head.softcap is not None:
        arguments.number(f"{at}.softcap", head.softcap, 0)
    arguments.number(f"{at}.logit_scale", head.logit_scale, 0)
    arguments.number(f"{prefix}temperature", temperature, 0)
    scale = float(head.logit_scale) / float(temperature)
    rule = HeadRule(float(head.softcap or 0), scale, *sizes, wide)
    rows = hidden.reshape(-1, hidden.shape[-1])
    inputs = HeadInputs(rows, weight, bias, rule, Shard(vocab) if shard is None else shard)
    return inputs, student, resolve(backend, hidden, sharded=shard is not None)


def head_facts(name: str, head: Head | Tensor, rule: HeadRule) -> dict[str, object]:
    """What ranks must share of a head that is an argument of this name, for `Meeting.tell`."""
    head = as_head(head)
    return {
        f"{name}.bias": head.bias is not None,
        f"{name}.softcap": head.softcap,
        f"{name}.logit_scale": head.logit_scale,
        f"{name}.chunk_size": rule.chunk_size,
        f"{name}.logits_dtype": head.logits_dtype,
    }


def _check_parts(name: str, at: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(
            f"{at}.weight must be [V, H] with H = {width}, the last dimension of {name}, and "
            f"V > 0; got shape {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        shape = list(bias.shape)
        raise ValueError(f"{at}.bias must be [V] with V = {weight.shape[0]}; got shape {shape}")
    for part, x in ((f"{at}.weight", weight), (f"{at}.bias", bias)):
        if x is None:
            continue
        if x.device != hidden.device:
            raise ValueError(
                f"{part} must be on the device of {name}, {hidden.device}; got {x.device}"
            )
        wide = x is bias and x.dtype == torch.float32 and hidden.dtype != torch.float64
        if x.dtype != hidden.dtype and not wide:
            raise TypeError(
                f"{part} must have the dtype of {name}, {hidden.dtype}; got {x.dtype} "
                "(torch.autocast casts both)"
            )


def _gathered(name: str, x: Any) -> Tensor:
    """A floating-point tensor; the whole of a DTensor (FSDP2).

    The gradient of a DTensor is averaged over the ranks and laid out as it is: each rank computes
    the loss of its own rows, so that its gradient is one of several to be averaged, as DDP and FSDP
    do. Where all ranks have the same rows the mean changes nothing.
    """
    if hasattr(x, "full_tensor") and hasattr(x, "device_mesh"):
        from torch.distributed.tensor import Partial

        x = x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        arguments.floating(name, x)
    return x


def chunk_sizes(
    name: str, asked: int | None, weight: Tensor, words: int, wide: bool = False
) -> tuple[int, int]:
    """Rows whose logits of so many words exist at a time, and where they are only read.

    GEMMs reach their rate at some hundred rows on a CPU and at some thousand on a GPU, while the
    logits of a chunk are to stay small beside the head's gradient. The product that makes them
    needs fewer rows than the one that sums that gradient. wide: float32 logits, and beside them
    their gradient in the weight's dtype.
    """
    if asked is not None:
        size = arguments.whole(name, asked, 1)
        return size, size
    only_read = words * (4 if wide else weight.itemsize)
    row = only_read + (words * weight.itemsize if wide else 0)
    if weight.device.type != "cpu":
        return _whole_tiles(GPU_BYTES // row), _whole_tiles(GPU_READ_BYTES // only_read)
    most = max(512, SMALL_BYTES // row)
    rows = max(64, min(most, CPU_BYTES // row // 64 * 64))
    return rows, max(1, min(rows, READ_BYTES // only_read))


def _whole_tiles(rows: int) -> int:
    """Rows of as many whole tiles of a product."""
    return rows // TILE * TILE if rows >= TILE else max(64, rows // 64 * 64)
