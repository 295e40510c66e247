"""The reference with a random rounding after every operation (Monte Carlo arithmetic).

Some results are so conditioned that any order of operations loses their digits: 1 - sum p of a
bucket with little mass, 1 - p near 1, exp of tau times a drift, 1 - tanh^2 of a saturated cap. How
far they move when each operation of the float64 reference errs by a unit or two of the accumulation
dtype is how far they may be off; an error of another kind moves them further. It holds for float64
problems too, whose truth is rounded itself.

D. Stott Parker, "Monte Carlo Arithmetic" (1997), with errors that an accurate algorithm of the
operation may have, in place of those of its rounded result: a sum errs by its largest partial sum,
and a softmax by the roundings inside. An operation may also be exact, and then show the error of
another: a gate that a rounding makes 0 hides those of the loss that it weighs. A sum that does not
err so takes its terms in another order: of 1e30, 1 and -1e30 it is 0 or 1. A product of matrices is
then the dtype's own: old log-probs may have its very roundings, and no random ones come so near.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNITS = 1.0  # of the dtype by which an operation errs, at most: two roundings
aten = torch.ops.aten


class Roundings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, operations of PyTorch err at random, by roundings of `dtype`; backward too.

    share: how many of them err, the others are exact.
    """

    def __init__(self, dtype: torch.dtype, seed: int, share: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.info, self.share = dtype, torch.finfo(dtype), share
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        out = operation(*arguments, **(options or {}))
        size = SIZES.get(operation.overloadpacket)
        if size is None or not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        if float(torch.rand((), generator=self.generator)) < self.share:
            for part in size(out, self.info, *arguments, **(options or {})):
                self._move(out, part)
        elif operation.overloadpacket in PRODUCTS:
            shorter = [x.to(self.dtype) if isinstance(x, Tensor) else x for x in arguments]
            out.copy_(operation(*shorter, **(options or {})))
        elif operation.overloadpacket in ORDERED and arguments[0].dim() == 1 == len(arguments):
            order = torch.randperm(len(arguments[0]), generator=self.generator)
            out.copy_(operation(arguments[0][order.to(out.device)], **(options or {})))
        return out

    def rounded(self, x: Tensor) -> Tensor:
        """x, as a conversion to the dtype may leave it."""
        x = x.clone()
        self._move(x, x.abs() * self.info.eps)
        return x

    def _move(self, out: Tensor, size: Tensor) -> None:
        """Move `out` in place by at most `UNITS * size`, which broadcasts, where that is finite."""
        chance = torch.rand(size.shape, generator=self.generator, dtype=torch.float64)
        move = UNITS * size * (chance * 2 - 1).to(out.device)
        out += torch.where(move.isfinite() & out.isfinite(), move, 0).to(out.dtype)


# Each operation's largest errors, from its result, finfo and arguments: parts that add up. One that
# broadcasts is shared, as the elements of a row share the rounding of their sum.
Size = Callable[..., tuple[Tensor, ...]]


def _relative(out: Tensor, info: torch.finfo, *operands: Any, **_: Any) -> tuple[Tensor, ...]:
    """A unit of the result; 0 where it is an operand, as after a division by 1."""
    size = out.abs() * info.eps
    for x in operands[:2]:
        if isinstance(x, Tensor):
            size = torch.where(out == x, 0, size)
    return (size,)


def _exp(out: Tensor, info: torch.finfo, x: Tensor) -> tuple[Tensor, ...]:
    """The product with log2(e) is rounded; and what lies below the dtype may be 0."""
    return (out * info.eps * (1 + x.abs()) + out.clamp(max=info.tiny),)


def _sum(
    out: Tensor, info: torch.finfo, x: Tensor, *dims: Any, **options: Any
) -> tuple[Tensor, ...]:
    return (x.abs().sum(*dims, **options) * info.eps,)


def _mean(
    out: Tensor, info: torch.finfo, x: Tensor, *dims: Any, **options: Any
) -> tuple[Tensor, ...]:
    return (x.abs().mean(*dims, **options) * info.eps,)


def _scatter_add(
    out: Tensor, info: torch.finfo, x: Tensor, dim: int, index: Tensor, y: Tensor
) -> tuple[Tensor, ...]:
    return (x.abs().scatter_add(dim, index, y.abs()) * info.eps,)


def _mm(out: Tensor, info: torch.finfo, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return (x.abs() @ y.abs() * info.eps,)


def _addmm(out: Tensor, info: torch.finfo, z: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return ((z.abs() + x.abs() @ y.abs()) * info.eps,)


def _logaddexp(out: Tensor, info: torch.finfo, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of log-probs [N, V]: one pass over a row takes the log-sum from its sums, not from each.

    And a mass below the dtype, which may be 0, is missing in the sum of the two.
    """
    largest = torch.maximum(x, y)
    size = torch.maximum(out.abs(), largest.abs()) * info.eps
    size = size + (info.tiny * torch.exp(-out)).clamp(max=1.0)
    return size, _log_sum(-largest.amax(-1, True), info, x.shape[-1]) if out.numel() else size


def _log_sum(log_sum: Tensor, info: torch.finfo, words: int) -> Tensor:
    """Of log(1 + rest), whose sum of so many words errs as a pairwise one does."""
    return log_sum.clamp(min=1.0) * (info.eps * (1 + math.log2(max(words, 1))))


def _logsumexp(
    out: Tensor, info: torch.finfo, x: Tensor, dim: Any, keepdim: Any = False
) -> tuple[Tensor, ...]:
    top = x.amax(dim, keepdim)
    return out.abs() * info.eps, _log_sum(out - top, info, x.numel() // max(out.numel(), 1))


def _log_softmax(
    out: Tensor, info: torch.finfo, x: Tensor, dim: int, *_: Any
) -> tuple[Tensor, ...]:
    log_sum = -out.amax(dim, True) if out.numel() else out
    return out.abs() * info.eps, _log_sum(log_sum, info, x.shape[dim])


def _log_softmax_backward(
    out: Tensor, info: torch.finfo, gradient: Tensor, log_p: Tensor, dim: int, *_: Any
) -> tuple[Tensor, ...]:
    """Its masses are exponentials, and err as `_exp` has it."""
    total = gradient.abs().sum(dim, keepdim=True)
    (of_mass,) = _exp(log_p.exp(), info, log_p)
    return (gradient.abs() * info.eps + of_mass * total,)


def _tanh_backward(
    out: Tensor, info: torch.finfo, gradient: Tensor, y: Tensor
) -> tuple[Tensor, ...]:
    return (gradient.abs() * info.eps,)


SIZES: dict[Any, Size] = {
    **dict.fromkeys(
        (aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.sqrt, aten.tanh),
        _relative,
    ),
    aten.log: _relative,
    aten.exp: _exp,
    aten.sum: _sum,
    aten.mean: _mean,
    aten.scatter_add: _scatter_add,
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.logaddexp: _logaddexp,
    aten.logsumexp: _logsumexp,
    aten._log_softmax: _log_softmax,
    aten._log_softmax_backward_data: _log_softmax_backward,
    aten.tanh_backward: _tanh_backward,
}
"""Operations that round; those not listed move or choose values."""
ORDERED = aten.sum, aten.mean
PRODUCTS = aten.mm, aten.addmm
