"""Logits of an LM head, as eager code makes them, all at once.

z = logit_scale * cap(hidden W^T + bias), where cap(x) = softcap * tanh(x / softcap).
"""

import torch
from torch import Tensor

from ..options import Head, as_head
from .vocabulary import Student, accumulation_dtype


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """[..., V] of hidden [..., H]; the product is rounded to the head's dtype.

    A wider bias is added to the rounded product, in its own dtype. With `logits_dtype` nothing is
    rounded but the gradient of the product, once.
    """
    rows = hidden.flatten(0, -2)  # one product of two matrices, whatever the shape of the batch
    if head.logits_dtype is not None:
        return _unrounded(rows, head).view(*hidden.shape[:-1], head.weight.shape[0])
    weight, bias = head.weight, head.bias
    cast = torch.is_autocast_enabled(rows.device.type)  # all three
    if bias is None or bias.dtype == weight.dtype or cast:
        z = torch.nn.functional.linear(rows, weight, bias)
    else:
        z = torch.nn.functional.linear(rows, weight) + bias
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z.to(accumulation_dtype(z)) * head.logit_scale
    return z.view(*hidden.shape[:-1], head.weight.shape[0])


def _unrounded(rows: Tensor, head: Head) -> Tensor:
    """[N, V] in float32 (float64); under autocast of factors that it has cast."""
    kind, weight, bias = rows.device.type, head.weight, head.bias
    if torch.is_autocast_enabled(kind) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    short, wide = rows.dtype, accumulation_dtype(rows)
    with torch.autocast(kind, enabled=False):
        shift = None if bias is None else bias.to(wide)
        z = torch.nn.functional.linear(rows.to(wide), weight.to(wide), shift)
        if z.requires_grad:
            z.register_hook(lambda gradient: gradient.to(short).to(wide))  # type: ignore[no-untyped-call]
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        return z * head.logit_scale


def from_head(hidden_states: Tensor, head: Head | Tensor) -> Student:
    """The student of hidden states [..., H] and a head.

    Rows that are not live take part in no product that is differentiated: 0 times what they hold
    may be NaN.
    """
    head = as_head(head)

    def logits(valid: Tensor, live: Tensor) -> Tensor:
        z = head_logits(torch.where(live[..., None], hidden_states, 0), head)
        if (valid & ~live).any():
            still = head_logits(torch.where(valid[..., None], hidden_states, 0), head).detach()
            z = torch.where(live[..., None], z, still)
        return torch.where(valid[..., None], z, 0)

    shape, dtype = hidden_states.shape[:-1], accumulation_dtype(hidden_states)
    kind, rounded = hidden_states.device.type, hidden_states.dtype
    if torch.is_autocast_enabled(kind) and rounded != torch.float64:
        rounded = torch.get_autocast_dtype(kind)
    if head.logits_dtype is not None:
        rounded = dtype
    return Student(shape, dtype, hidden_states.device, logits, rounded)
