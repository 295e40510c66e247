"""The logits of a few rows, and what becomes of their gradient."""

import torch
from torch import Tensor

from .check import HeadInputs

SLICE_WORDS = 1 << 21  # elements that are widened at a time: 8 MiB of float32
WIDENED_WORDS = 1 << 20  # of the head, where its product is to be float32


def new_buffer(head: HeadInputs, chunk_size: int) -> Tensor:
    """Room for the logits of a chunk: in the head's dtype, or wide."""
    weight = head.weight
    shape = min(len(head.hidden), chunk_size), weight.shape[0]
    return weight.new_empty(shape, dtype=torch.float32 if head.rule.wide else weight.dtype)


class Room:
    """The logits of a chunk of rows, and their gradient in the head's dtype.

    The gradient takes the logits' place where these have the head's dtype, too, and a place of its
    own beside float32 logits.
    """

    def __init__(self, head: HeadInputs, chunk_size: int) -> None:
        self.logits = new_buffer(head, chunk_size)
        self._gradient = None if head.rule.wide else self.logits
        self._dtype = head.weight.dtype

    def gradient(self, rows: int) -> Tensor:
        """[rows, V], for the gradient of the first rows' logits; made when it is first needed."""
        if self._gradient is None:
            self._gradient = torch.empty_like(self.logits, dtype=self._dtype)
        return self._gradient[:rows]


def logits_of(head: HeadInputs, hidden: Tensor, out: Tensor) -> Tensor:
    """Logits [C, V] of hidden [C, H] before the scale, in the first rows of `out`.

    In the head's dtype they are rounded as eager code rounds them; in float32 the sums of the
    product are kept.
    """
    z, bias, softcap = out[: len(hidden)], head.bias, head.rule.softcap
    if z.dtype != hidden.dtype:
        _wide_product(hidden, head.weight, z)
        if bias is not None:
            z += bias
        return z.div_(softcap).tanh_().mul_(softcap) if softcap else z
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


def _wide_product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [C, V] = hidden W^T in the dtype of `out`, never rounded to that of the factors.

    Products that are rounded as they are stored, those of a CPU, get widened factors, the head's a
    few words at a time.
    """
    if out.is_cuda and torch.version.hip is None:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        return
    hidden = hidden.to(out.dtype)
    step = max(1, WIDENED_WORDS // weight.shape[1])
    for i in range(0, len(weight), step):
        words = weight[i : i + step].to(out.dtype)
        torch.mm(hidden, words.t(), out=out[:, i : i + step])


def uncap(out: Tensor, gradient: Tensor, capped: Tensor, softcap: float) -> None:
    """out = gradient * (1 - (capped / softcap)^2), the slope of the cap; overwrites `capped`."""
    slope = capped.div_(softcap).square_().neg_().add_(1)
    out.copy_(slope.mul_(gradient))


def slices(z: Tensor) -> list[slice]:
    """Rows of z [C, V] that may be widened at a time."""
    step = max(1, SLICE_WORDS // max(1, z.shape[1]))
    return [slice(i, i + step) for i in range(0, len(z), step)]
