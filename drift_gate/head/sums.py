"""Gradients of a head and its hidden states, summed over chunks of rows.

With the gradient G [C, V] of a chunk's logits (before the scale) and its hidden states h [C, H],

    grad_hidden = G W  (each row once),   grad_weight += G^T h,   grad_bias += sum_rows G

Where all rows fit one chunk, each product is written in its own dtype, and is the gradient. Else
grad_weight is summed in float32 (float64), which the first product writes; for bfloat16 on a CPU,
beyond two chunks, in 24 bits, the result and one more byte an element. On a GPU grad_hidden stays
float32 where a factor is still to come: it is rounded once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..passes.memory import empty
from ..passes.threads import share
from .check import HeadInputs
from .chunks import Rows
from .logits import slices

PRODUCT_WORDS = 1 << 20  # elements of grad_weight that a thread multiplies at a time,
SLAB_WORDS = 1 << 16  # and those that it adds: 256 KiB of float32


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Plan(NamedTuple):
    """Shape and dtype of each sum; [0] where it is not needed."""

    hidden: tuple[tuple[int, ...], torch.dtype]
    weight: tuple[tuple[int, ...], torch.dtype]
    rest: tuple[tuple[int, ...], torch.dtype]
    """The third byte beside bfloat16."""
    bias: tuple[tuple[int, ...], torch.dtype]

    def empty(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New tensors."""
        found = []
        for shape, dtype in self:
            found.append(empty(shape, dtype, device))
        a, b, c, d = found
        return a, b, c, d


def plan(head: HeadInputs, needs: Needs, later: bool) -> Plan:
    """What the sums need; `later`: a factor is still to come when all rows are summed."""
    n, (vocab, width) = head.hidden.shape[0], head.weight.shape
    dtype, empty = head.weight.dtype, (0,)
    wide = torch.promote_types(dtype, torch.float32)
    many = n > head.rule.chunk_size
    on_gpu = head.weight.device.type == "cuda"  # elsewhere products are rounded as they are stored
    narrow = dtype == torch.bfloat16 and head.weight.device.type == "cpu"
    rest = needs.weight and narrow and n > 2 * head.rule.chunk_size
    return Plan(
        ((n, width) if needs.hidden else empty, wide if many and later and on_gpu else dtype),
        ((vocab, width) if needs.weight else empty, wide if many and not narrow else dtype),
        ((vocab, width) if rest else empty, torch.uint8),
        ((vocab,) if needs.bias else empty, wide),
    )


class Sums:
    """Running sums; `tensors` are as the plan says."""

    def __init__(self, head: HeadInputs, needs: Needs, later: bool, backend: str) -> None:
        self.head, self.needs, self.backend, self.begun = head, needs, backend, False
        self.tensors = plan(head, needs, later).empty(head.hidden.device)
        for x in self.tensors[2:]:
            if x.numel():
                x.zero_()

    def add(self, rows: Rows, hidden: Tensor, gradient: Tensor) -> None:
        """Add a chunk: its rows in the hidden states, hidden [C, H], gradient [C, V]."""
        of_hidden, of_weight, rest, of_bias = self.tensors
        if self.needs.hidden:
            if not self.begun and not (isinstance(rows, slice) and len(hidden) == len(of_hidden)):
                of_hidden.zero_()  # where rows are left out
            _product(of_hidden, rows, gradient, self.head.weight)
        if self.needs.weight:
            if of_weight.dtype != gradient.dtype:
                _add_wide(of_weight, gradient, hidden, self.begun)
            elif not self.begun:
                torch.mm(gradient.t(), hidden, out=of_weight)
            elif rest.numel():
                _add_split(of_weight, rest, gradient, hidden)
            else:
                of_weight.addmm_(gradient.t(), hidden)
        if self.needs.bias:
            of_bias += gradient.sum(0, dtype=of_bias.dtype)
        self.begun = True

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The sums, all rows added."""
        if not self.begun:
            self.tensors[0].zero_()
            self.tensors[1].zero_()
        return self.tensors

    def multiply(self, factor: Tensor) -> None:
        """Multiply what was summed so far by a scalar, which is mostly 1."""
        if not self.begun:
            return
        of_hidden, of_weight, rest, of_bias = self.tensors
        if self.backend == "triton":
            _scale_on_device([of_hidden, of_weight, of_bias], factor)
        elif not factor.is_cpu or float(factor) != 1:
            factor = factor.to(of_bias.dtype)
            untouched = of_hidden == 0  # rows to come, or left out: 0, though the factor be NaN
            _multiply(of_hidden, factor)
            of_hidden.masked_fill_(untouched, 0)
            _scale_weight(of_weight, rest, factor, last=False)
            _multiply(of_bias, factor)


def finish_sums(
    tensors: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], backend: str
) -> list[Tensor]:
    """Gradients of hidden, weight and bias in these dtypes, from the sums, which lose their values.

    factor: scalar tensor that multiplies them. Where a sum has the dtype of its gradient already it
    is multiplied in its place, and left alone where the factor is 1.
    """
    sums = tensors[0], tensors[1], tensors[3]
    if backend == "triton":
        same = [x for x, dtype in zip(sums, dtypes, strict=True) if x.dtype == dtype]
        _scale_on_device(same, factor)
        return [
            x if x.dtype == dtype else _converted_on_device(x, factor, dtype)
            for x, dtype in zip(sums, dtypes, strict=True)
        ]
    if factor.is_cpu and float(factor) == 1 and not tensors[2].numel():
        return [x.to(dtype) for x, dtype in zip(sums, dtypes, strict=True)]
    return [
        _finished(sums[0], factor, dtypes[0]),
        _finished_weight(sums[1], tensors[2], factor, dtypes[1]),
        _finished(sums[2], factor, dtypes[2]),
    ]


def _finished(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor, rounded once; what is 0 stays 0 where the factor is NaN."""
    if not x.numel():
        return x.to(dtype)
    untouched = None if x.dim() == 1 else x == 0
    if x.dtype == dtype:
        _multiply(x, factor)
    else:
        x = x.mul_(factor.to(x.dtype)).to(dtype)
    return x if untouched is None else x.masked_fill_(untouched, 0)


def _finished_weight(high: Tensor, low: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if high.dtype == dtype:
        _scale_weight(high, low, factor, last=True)
        return high
    return torch.mul(high, factor.to(high.dtype), out=torch.empty_like(high, dtype=dtype))


def _scale_on_device(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply in place; a kernel that finds the factor 1 touches nothing."""
    from ..kernels.head import scale_unless_one

    scale_unless_one([x for x in tensors if x.numel()], factor)


def _converted_on_device(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    from ..kernels.head import finish_sum

    converted: Tensor = finish_sum(x, factor, dtype)
    return converted


def _product(out: Tensor, rows: Rows, gradient: Tensor, weight: Tensor) -> None:
    """out[rows] = gradient @ weight, in the dtype of out."""
    wide = out.dtype != gradient.dtype
    if isinstance(rows, slice) and not wide:
        torch.mm(gradient, weight, out=out[rows])
        return
    if wide and torch.version.hip is None:
        found = torch.mm(gradient, weight, out_dtype=out.dtype)
    else:
        found = (gradient @ weight).to(out.dtype)
    if isinstance(rows, slice):
        out[rows] = found
    else:
        out.index_copy_(0, rows, found)


def _add_wide(total: Tensor, gradient: Tensor, hidden: Tensor, begun: bool) -> None:
    """total (+)= gradient^T hidden, in float32 though the factors are shorter."""
    if total.is_cuda and torch.version.hip is None:  # the product is never rounded
        if begun:
            torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            torch.mm(gradient.t(), hidden, out_dtype=total.dtype, out=total)
        return
    step = max(1, PRODUCT_WORDS // total.shape[1])
    for words in _slabs(total, step):
        product = torch.mm(gradient[:, words].t(), hidden)
        if begun:
            total[words] += product
        else:
            total[words] = product


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
