"""The tensors among a function's arguments, those inside a `Head` or a `Reduction` included."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """By path: "logits", "head.weight", "reduction.batch_num_tokens"."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            inside = vars(value).items()
            found |= {f"{name}.{field}": x for field, x in inside if isinstance(x, Tensor)}
    return found


def replaced(arguments: Mapping[str, Any], changed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments with other tensors at these paths."""
    out = dict(arguments)
    for path, x in changed.items():
        name, _, field = path.partition(".")
        out[name] = dataclasses.replace(out[name], **{field: x}) if field else x
    return out


@torch.inference_mode()
def of_inference(
    arguments: Mapping[str, Any], storages: Mapping[str, Tensor], leaves: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments and storages as rollouts and teachers make them, whose tensors autograd may not
    keep: all but the leaves, in the same places of their memory."""
    made, memory = {}, dict(storages)
    for name, x in tensors(arguments).items():
        if name in leaves or name == "valid":  # the fuzzer's own
            continue
        if name in memory:
            memory[name] = memory[name].clone()
            made[name] = memory[name].as_strided(x.shape, x.stride(), x.storage_offset())
        else:
            lying = x.untyped_storage().nbytes() // x.itemsize
            whole = x.as_strided((lying,), (1,), 0).clone()
            made[name] = whole.as_strided(x.shape, x.stride(), x.storage_offset())
    return replaced(arguments, made), memory
