"""Collectives over the ranks of a process group, called inside the ops of the losses.

An op takes the name of a group, since it cannot take the group; `name_of` keeps which is which.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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


def gather_ranks(x: Tensor, group: str) -> Tensor:
    """x of every rank, [ranks, *x.shape], in the order of the ranks."""
    ranks = size_of(group)
    out = x.new_empty(ranks * x.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # old name
    gather(out, x.reshape(-1).contiguous(), group=_GROUPS[group])
    return out.view(ranks, *x.shape)


def max_ranks(x: Tensor, group: str) -> Tensor:
    """The largest of the ranks' x, element by element."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, dist.ReduceOp.MAX, group=_GROUPS[group])
    return out


def sum_ranks(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, in the dtype of x."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=_GROUPS[group])
    return out


def sum_gradient(grad: Tensor, group: str) -> Tensor:
    """The gradient of what all ranks have alike and each used in part: the ranks' sum.

    Shorter gradients are summed in float32.
    """
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return sum_ranks(wide, group).to(grad.dtype)
