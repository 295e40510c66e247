"""The logits of a few rows, and what becomes of their gradient."""

import torch
from torch import Tensor

from .check import HeadInputs

SLICE_WORDS = 1 << 21  # elements that are widened at a time: 8 MiB of float32


def new_buffer(head: HeadInputs, chunk_size: int) -> Tensor:
    """Room for the logits of a chunk."""
    return head.weight.new_empty(min(len(head.hidden), chunk_size), head.weight.shape[0])


def logits_of(head: HeadInputs, hidden: Tensor, out: Tensor) -> Tensor:
    """Logits [C, V] of hidden [C, H] before the scale, in the first rows of `out`.

    Rounded to the head's dtype, as eager code rounds them.
    """
    z, bias, softcap = out[: len(hidden)], head.bias, head.rule.softcap
    if bias is not None and bias.dtype == z.dtype:
        torch.addmm(bias, hidden, head.weight.t(), out=z)
        bias = None
    else:
        torch.mm(hidden, head.weight.t(), out=z)
    if bias is None and not softcap:
        return z
    for rows in slices(z):
        wide = z[rows].to(torch.promote_types(z.dtype, torch.float32))
        if bias is not None:
            wide = wide + bias
        z[rows].copy_(wide.div_(softcap).tanh_().mul_(softcap) if softcap else wide)
    return z


def uncap(gradient: Tensor, capped: Tensor, softcap: float) -> None:
    """gradient *= 1 - (capped / softcap)^2, the slope of the cap; overwrites `capped`."""
    slope = capped.div_(softcap).square_().neg_().add_(1)
    gradient.copy_(slope.mul_(gradient))


def slices(z: Tensor) -> list[slice]:
    """Rows of z [C, V] that may be widened at a time."""
    step = max(1, SLICE_WORDS // max(1, z.shape[1]))
    return [slice(i, i + step) for i in range(0, len(z), step)]
