"""Gradients of a head and its hidden states, summed over chunks of rows.

With the gradient G [C, V] of a chunk's logits (before the scale) and its hidden states h [C, H],

    grad_hidden = G W  (each row once),   grad_weight += G^T h,   grad_bias += sum_rows G

grad_weight is summed in float32 (float64): in the result where it has that dtype; for bfloat16 on
a CPU, beyond two chunks, in 24 bits, the result and one more byte an element; elsewhere in a
float32 tensor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gradients
from .head import Head, slices
from .threads import share

Rows = slice | Tensor
PRODUCT_WORDS = 1 << 20  # elements of grad_weight that a thread multiplies at a time,
SLAB_WORDS = 1 << 16  # and those that it adds: 256 KiB of float32


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


def needed(ctx: Any) -> list[bool]:
    """Whether hidden, weight and bias, the first three inputs of an op, need a gradient."""
    return [bool(x) for x in ctx.needs_input_grad[:3]]


def as_gradients(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """None for what is not needed."""
    return [grad if need else None for grad, need in zip(grads, needs, strict=True)]


def empty_gradients(
    hidden: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias as an op returns them, [0] where not needed; empty."""
    return (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight) if needs[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs[2] else 0),
    )


def weight_dtype(weight: Tensor) -> torch.dtype:
    """Of the tensor that grad_weight is summed in."""
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
        return torch.bfloat16
    return torch.promote_types(weight.dtype, torch.float32)


def sum_shapes(
    hidden: Tensor, weight: Tensor, needs: Needs, chunk_size: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the sums: hidden, weight, the byte beside bfloat16, bias; [0] if unused.

    One chunk or two need no byte: at most one sum is rounded on the way.
    """
    empty = (0,)
    wide = torch.promote_types(weight.dtype, torch.float32)
    narrow = weight_dtype(weight) == torch.bfloat16
    rest = needs.weight and narrow and hidden.shape[0] > 2 * chunk_size
    return [
        (tuple(hidden.shape) if needs.hidden else empty, hidden.dtype),
        (tuple(weight.shape) if needs.weight else empty, weight_dtype(weight)),
        (tuple(weight.shape) if rest else empty, torch.uint8),
        ((weight.shape[0],) if needs.bias else empty, wide),
    ]


class Sums:
    """Running sums; `tensors` has the shapes of `sum_shapes`."""

    def __init__(self, hidden: Tensor, head: Head, needs: Needs, chunk_size: int) -> None:
        self.head, self.needs, self.begun = head, needs, False
        self.tensors = [
            gradients.empty(shape, dtype, hidden.device)
            for shape, dtype in sum_shapes(hidden, head.weight, needs, chunk_size)
        ]
        of_hidden, _, rest, of_bias = self.tensors
        for x in (of_hidden, rest, of_bias):
            x.zero_()

    def add(self, rows: Rows, hidden: Tensor, gradient: Tensor) -> None:
        """Add a chunk: its rows in the hidden states, hidden [C, H], gradient [C, V]."""
        of_hidden, of_weight, rest, of_bias = self.tensors
        if self.needs.hidden:
            if isinstance(rows, slice):
                torch.mm(gradient, self.head.weight, out=of_hidden[rows])
            else:
                of_hidden.index_copy_(0, rows, gradient @ self.head.weight)
        if self.needs.weight:
            if not self.begun and of_weight.dtype == gradient.dtype:
                torch.mm(gradient.t(), hidden, out=of_weight)
            elif not self.begun:
                _add_wide(of_weight.zero_(), gradient, hidden)
            elif rest.numel():
                _add_split(of_weight, rest, gradient, hidden)
            elif of_weight.dtype == gradient.dtype:
                of_weight.addmm_(gradient.t(), hidden)
            else:
                _add_wide(of_weight, gradient, hidden)
        if self.needs.bias:
            of_bias += gradient.sum(0, dtype=of_bias.dtype)
        self.begun = True

    def finish(self) -> list[Tensor]:
        """The sums, all rows added."""
        if not self.begun:
            self.tensors[1].zero_()
        return self.tensors

    def multiply(self, factor: float) -> None:
        """Multiply what was summed so far."""
        if not self.begun:
            return
        of_hidden, of_weight, rest, of_bias = self.tensors
        scale = of_bias.new_tensor(factor)
        _multiply(of_hidden, scale)
        _scale_weight(of_weight, rest, scale, last=False)
        _multiply(of_bias, scale)


def finish_sums(tensors: list[Tensor], factor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of hidden, weight and bias from the sums, which lose their values.

    factor: scalar tensor that multiplies them, in the dtype of the sum of the bias.
    """
    of_hidden, of_weight, rest, of_bias = tensors
    untouched = of_hidden == 0
    _multiply(of_hidden, factor)
    of_hidden.masked_fill_(untouched, 0)  # rows left out stay 0 where the factor is NaN
    _multiply(of_bias, factor)
    if of_weight.dtype == dtype:
        _scale_weight(of_weight, rest, factor, last=True)
    else:
        of_weight = torch.mul(of_weight, factor, out=torch.empty_like(of_weight, dtype=dtype))
    return [of_hidden, of_weight, of_bias.to(dtype)]


def _add_wide(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """total += gradient^T hidden, in float32 though the factors are shorter."""
    if total.is_cuda and torch.version.hip is None:  # the product is never stored
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
        return
    step = max(1, PRODUCT_WORDS // total.shape[1])
    for words in _slabs(total, step):
        total[words] += torch.mm(gradient[:, words].t(), hidden)


def _multiply(x: Tensor, factor: Tensor) -> None:
    """x *= factor, where a device would round the factor to the dtype of x first."""
    if x.dtype == factor.dtype or not x.numel():
        x.mul_(factor)
        return
    for rows in slices(x):
        x[rows].copy_(x[rows].to(factor.dtype).mul_(factor))


def _slabs(x: Tensor, step: int) -> list[slice]:
    return [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]


class _Scratch:
    """For each thread a slab of float32 and one of int32."""

    def __init__(self, high: Tensor) -> None:
        self.workers = torch.get_num_threads()
        self.step = min(len(high), max(1, SLAB_WORDS // high.shape[1]))
        shape = self.workers, self.step, high.shape[1]
        self.value, self.bits = torch.empty(shape), torch.empty(shape, dtype=torch.int32)


def _add_split(high: Tensor, low: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """(high, low) += gradient^T hidden, 24 bits: see `_load`."""
    scratch = _Scratch(high)
    many = min(len(high), max(scratch.step, PRODUCT_WORDS // high.shape[1]))
    products = high.new_empty(scratch.workers, many, high.shape[1])

    def add(words: slice, worker: int) -> None:
        product = products[worker, : words.stop - words.start]
        torch.mm(gradient[:, words].t(), hidden, out=product)
        parts = [torch.split(x, scratch.step) for x in (high[words], low[words], product)]
        for upper, lower, more in zip(*parts, strict=True):
            value, bits = (x[worker, : len(more)] for x in (scratch.value, scratch.bits))
            _load(upper, lower, value, bits)
            value.add_(bits.view(torch.float32).copy_(more))
            _store(upper, lower, value, bits)

    share(_slabs(high, many), add, scratch.workers)


def _scale_weight(high: Tensor, low: Tensor, factor: Tensor, last: bool) -> None:
    """Multiply by a factor; the last time, `high` becomes the rounded result."""
    if not low.numel():
        _multiply(high, factor)
        return
    scratch = _Scratch(high)

    def scale(words: slice, worker: int) -> None:
        n = words.stop - words.start
        value, bits = scratch.value[worker, :n], scratch.bits[worker, :n]
        _load(high[words], low[words], value, bits)
        value.mul_(factor)
        if last:
            high[words].copy_(value)
        else:
            _store(high[words], low[words], value, bits)

    share(_slabs(high, scratch.step), scale, scratch.workers)


def _load(high: Tensor, low: Tensor, value: Tensor, bits: Tensor) -> None:
    """value = the float32 whose upper 16 bits are `high` (a bfloat16) and next 8 bits `low`."""
    value.copy_(high)
    value.view(torch.int32).add_(bits.copy_(low), alpha=256)


def _store(high: Tensor, low: Tensor, value: Tensor, bits: Tensor) -> None:
    """Split the float32 value, rounded to its upper 24 bits; overwrites it."""
    whole = value.view(torch.int32).add_(128)
    low.copy_(torch.bitwise_right_shift(whole, 8, out=bits))  # keeps the lowest 8 bits
    whole.bitwise_and_(-65536)
    high.copy_(value)
