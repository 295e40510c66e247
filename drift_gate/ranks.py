"""Collectives over the ranks of a process group, as ops that `torch.compile` can trace.

An op takes the name of a group, since it cannot take the group; `name_of` keeps which is which.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op

_GROUPS: dict[str, Any] = {}


def name_of(argument: str, group: object) -> str:
    """The name under which the ops find a process group; "" for None and for a group of one.

    Raises TypeError where it is none, or one that this rank does not belong to.
    """
    if group is None:
        return ""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{argument} must be a torch.distributed.ProcessGroup that this rank belongs to, or "
            f"None; got {type(group).__name__}"
        )
    if group.size() == 1:
        return ""
    _GROUPS[group.group_name] = group
    return group.group_name


def forget(name: str) -> None:
    """Drop a group that is no more."""
    _GROUPS.pop(name, None)


def size_of(group: str) -> int:
    """Ranks of a named group."""
    size: int = _GROUPS[group].size()
    return size


def rank_in(group: str) -> int:
    """This rank's number in a named group."""
    rank: int = _GROUPS[group].rank()
    return rank


def everyones(facts: object, group: str) -> list[Any]:
    """A picklable object of every rank, in the order of the ranks; the host waits for it."""
    found: list[Any] = [None] * size_of(group)
    dist.all_gather_object(found, facts, group=_GROUPS[group])
    return found


@custom_op("drift_gate::gather_ranks", mutates_args=())
def gather_ranks(x: Tensor, group: str) -> Tensor:
    """x of every rank, [ranks, *x.shape], in the order of the ranks. No gradient."""
    ranks = size_of(group)
    out = x.new_empty(ranks * x.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # old name
    gather(out, x.reshape(-1).contiguous(), group=_GROUPS[group])
    return out.view(ranks, *x.shape)


@gather_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(size_of(group), *x.shape)


@custom_op("drift_gate::max_ranks", mutates_args=())
def max_ranks(x: Tensor, group: str) -> Tensor:
    """The largest of the ranks' x, element by element. No gradient."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, dist.ReduceOp.MAX, group=_GROUPS[group])
    return out


@max_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("drift_gate::sum_ranks", mutates_args=())
def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, on all of them.

    All ranks go on to compute one and the same loss, so that the gradient of a rank's x is that
    of the sum.
    """
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_GROUPS[group])
    return out


@sum_ranks.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad, None


sum_ranks.register_autograd(_backward)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return sum_ranks(wide, ctx.group).to(grad.dtype), None


def copy_to_ranks(x: Tensor, group: str) -> Tensor:
    """x, which all ranks have alike and each uses in part: its gradient is the ranks' sum.

    Shorter gradients are summed in float32.
    """
    copied: Tensor = _Copy.apply(x, group)  # type: ignore[no-untyped-call]
    return copied
