"""Listed logits of a head without the others, as ops: K rows of the head for each row.

    head_gather    z_k = scale * cap(hidden . W[ids_k] + bias[ids_k])
    head_scatter   with x_k = dL/d(hidden . W[ids_k] + bias[ids_k]):
                   grad_hidden = sum_k x_k W[ids_k],  grad_weight[v] = sum over ids = v of x hidden

No [N, V] logits and no dense product: N K H multiplications in each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import torch_sparse
from .head_gradients import as_gradients, empty_gradients, needed


@custom_op("drift_gate::head_gather", mutates_args=())
def head_gather(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    softcap: float,
    scale: float,
    backend: str,
) -> Tensor:
    """z [N, K] of hidden [N, H] at ids [N, K], in float32 (float64); 0 on invalid rows.

    Rows that are not valid are not read. Differentiable in the first three.
    """
    if backend == "triton":
        from .kernels.sparse import gather as run
    else:
        run = torch_sparse.gather
    z: Tensor = run(hidden, weight, bias, ids, valid)
    if softcap:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z.mul_(scale)


@head_gather.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    softcap: float,
    scale: float,
    backend: str,
) -> Tensor:
    return hidden.new_empty(ids.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


@custom_op("drift_gate::head_scatter", mutates_args=())
def head_scatter(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    gathered: Tensor,
    beta: Tensor,
    softcap: float,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias ([0] where not needed) from beta = dL/dz [N, K].

    gathered: z [N, K]. Words are summed in a fixed order: the entries of a word by row.
    """
    slope = beta * scale
    if softcap:
        slope = slope * (1 - (gathered / (scale * softcap)).square())
    slope = torch.where(valid[:, None], slope, 0).contiguous()
    ids = torch.where(slope == 0, weight.shape[0], ids)  # no word
    if backend == "triton":
        from .kernels import sparse

        of_hidden, of_words = sparse.weigh_words, sparse.sum_words
    else:
        of_hidden, of_words = torch_sparse.weigh_words, torch_sparse.sum_words
    grads = [weight.new_empty(0) for _ in needs]  # an op's results are to be distinct
    if needs[0]:
        grads[0] = of_hidden(weight, ids, slope)
    if needs[1] or needs[2]:
        entries = torch_sparse.by_word(ids, weight.shape[0])
    if needs[1]:
        grads[1] = of_words(hidden, slope, *entries)
    if needs[2]:
        ones = torch.ones_like(hidden[:, :1], dtype=slope.dtype)
        grads[2] = of_words(ones, slope, *entries)[:, 0].to(weight.dtype)
    return grads[0], grads[1], grads[2]


@head_scatter.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    gathered: Tensor,
    beta: Tensor,
    softcap: float,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.softcap, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, beta: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, ids, valid, gathered = ctx.saved_tensors
    needs = needed(ctx)
    grads = head_scatter(
        hidden, weight, bias, ids, valid, gathered, beta, ctx.softcap, ctx.scale, needs,
        ctx.backend,
    )  # fmt: skip
    return *as_gradients(grads, needs), *(None,) * 5


head_gather.register_autograd(_backward, setup_context=_setup_context)
