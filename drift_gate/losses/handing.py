"""What the `linear_` losses share: which gradients are needed, and how they are handed out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..call.gradients import overwritten
from ..call.op import Op, Tensors
from ..call.rows import RowInputs
from ..head.check import HeadInputs
from ..head.sums import Needs, finish_sums, plan
from ..head.walk import Work, splits_by_chunk
from ..parallel.ranks import sum_gradient
from ..passes.backends import passes_of
from ..passes.rules import SHORT_BITS

LEAVES = "hidden", "weight", "bias"
SUMS = "sum_hidden", "sum_weight", "sum_rest", "sum_bias"


def needs_of(*leaves: Tensor | None) -> Needs:
    """Whether autograd will ask for the gradients of hidden states, weight and bias."""
    asked = torch.is_grad_enabled()
    return Needs(*[asked and x is not None and x.requires_grad for x in leaves])


def head_inputs(x: Any) -> HeadInputs:
    """The head of an op's inputs."""
    return HeadInputs(x.hidden, x.weight, x.bias, x.rule, x.shard)


def no_row_is_left_out(rows: RowInputs) -> bool:
    """Whether all rows are asked for: no mask, and labels that may not be ignored."""
    return not rows.ignores and rows.response_mask is None


def work_of(x: Any, valid: Tensor, whole: bool, needs: Needs, *, lists: bool = False) -> Work:
    """What a walk over the rows of an op's inputs is over; `whole` as above.

    lists: a row whose list has no support is not valid, and the device alone knows which are such.
    """
    whole = whole and not (lists and x.backend != "triton")
    head, holes = head_inputs(x), whole and lists
    return Work(passes_of(x.backend), x.backend, head, x.rows, valid, whole, needs, holes)


def rounds(x: Any) -> bool:
    """Whether the drift of an op's inputs is of rounded logits."""
    return x.rows.old is not None and not x.rule.wide and x.weight.dtype in SHORT_BITS


def hand_out(
    x: Any,
    sums: Sequence[Tensor],
    factor: Tensor | None,
    upstream: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients that the sums are, times factor and upstream (1 where None)."""
    if factor is None:
        whole = sums[3].new_ones(())
    elif upstream is None:
        return [None, None, None]
    else:
        whole = factor * upstream
    leaves = x.hidden, x.weight, x.bias
    dtypes = [sums[3].dtype if leaf is None else leaf.dtype for leaf in leaves]
    grads = finish_sums(sums, whole, dtypes, x.backend)
    if factor is not None:  # these were kept, and are no more what they were
        overwritten(sums)
    return sum_over_shards(x, grads, needs)


def hand_out_kept(
    x: Any, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """The backward of an op whose last outputs are the sums and their factor."""
    return hand_out(x, outputs[-5:-1], outputs[-1], grads[0], needs)


def handing_op(
    name: str,
    inputs: type[Any],
    forward: Callable[[Any], Tensors],
    empty: Callable[[Any], Tensors],
    outputs: Sequence[str],
) -> Op:
    """An op whose forward forms the gradients: after its outputs come the sums and their factor."""
    return Op(
        name, inputs, forward, hand_out_kept, empty, outputs=(*outputs, *SUMS, "factor"), grads=1,
        differentiable=LEAVES, keep=(*SUMS, "factor"), hands_out=(SUMS[0], SUMS[1], SUMS[3]),
    )  # fmt: skip


def sum_over_shards(
    x: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """None for what is not needed; the hidden states, which all ranks share, get all ranks' sum."""
    found = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    if x.shard.group and found[0] is not None:
        found[0] = sum_gradient(found[0], x.shard.group)
    return found


def empty_sums(x: Any, per_unit: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of `head.walk.Walked`, empty."""
    head, rows = head_inputs(x), x.rows
    if rows.per_token or not any(x.needs):
        shapes = plan(head, Needs(False, False, False), False)
    else:
        shapes = plan(head, x.needs, splits_by_chunk(rows, per_unit))
    a, b, c, d = (x.hidden.new_empty(shape, dtype=dtype) for shape, dtype in shapes)
    return a, b, c, d
