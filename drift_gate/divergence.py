"""The passes over both vocabularies as torch.library ops, and the autograd that joins them.

`divergence` reads the logits of student and teacher; its backward, `divergence_grad`, reads both
and writes the gradient of the student's. Both take the name of the backend, already resolved, and
dispatch on it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import gradients, torch_divergence

Divergence = tuple[Tensor, Tensor, Tensor, Tensor]


@custom_op("drift_gate::divergence", mutates_args=())
def divergence(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    valid: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> Divergence:
    """Divergence of p = softmax(scale * logits) and q = softmax(teacher_scale * teacher), by row.

    Args:
        logits: [B, T, V], N = B * T rows, last dimension contiguous; bfloat16, float16, float32,
            or float64 with the backend "torch".
        teacher: [B, T, U], U <= V, any float dtype, last dimension contiguous. The student's
            words beyond U take no part.
        labels: [N] int32 or int64, each in [0, U), or None.
        valid: [N] bool. Other rows are not read and give 0 everywhere.
        direction, beta: as `full_loss` has them.
        with_entropy: whether to compute it.
        inplace_backward: overwrite the logits with their gradient in the backward.
        backend: "triton" or "torch".

    Returns:
        loss [N]; log_probs [N] of the labels (0 without); statistics [5, N] for the backward of
        the same backend: maximum (with "torch" times the scale) and log_sum of the student, of the
        teacher, and the centre c of the gradient: the loss for "reverse", sum_k p_k h_k for "jsd";
        entropy [N] of p, or [0]. float32, or float64 for float64 logits. Differentiable in `loss`
        alone.
    """
    arguments = logits, teacher, labels, valid, scale, teacher_scale, direction, beta, with_entropy
    if backend == "triton":
        from .kernels.divergence import divergence as run

        result: Divergence = run(*arguments)
        return result
    return torch_divergence.divergence(*arguments)


@divergence.register_fake
def _(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    valid: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> Divergence:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n = valid.shape[0]

    def new(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    return new(n), new(n), new(5, n), new(n * with_entropy)


@custom_op("drift_gate::divergence_grad", mutates_args=())
def divergence_grad(
    logits: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    valid: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    backend: str,
) -> Tensor:
    """upstream * d loss / d logits in a new [B, T, V] tensor.

    `upstream` [N] has the dtype of `statistics` [5, N], which come from `divergence`. Rows that
    are not valid, or whose upstream is 0, become 0 and are not read.
    """
    out = gradients.empty(logits.shape, logits.dtype, logits.device)
    _grad_into(
        out, logits, teacher, statistics, valid, upstream, scale, teacher_scale, direction, beta,
        backend,
    )  # fmt: skip
    return out


@divergence_grad.register_fake
def _(
    logits: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    valid: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    backend: str,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("drift_gate::divergence_grad_", mutates_args=("logits",))
def divergence_grad_(
    logits: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    valid: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    backend: str,
) -> None:
    """`divergence_grad` over the logits themselves; their version counter moves on."""
    _grad_into(
        logits, logits, teacher, statistics, valid, upstream, scale, teacher_scale, direction,
        beta, backend,
    )  # fmt: skip


@divergence_grad_.register_fake
def _(
    logits: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    valid: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    backend: str,
) -> None:
    return None


def _grad_into(
    out: Tensor,
    logits: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    valid: Tensor,
    upstream: Tensor,
    scale: float,
    teacher_scale: float,
    direction: str,
    beta: float,
    backend: str,
) -> None:
    # An upstream gradient is often an expanded scalar, with stride 0.
    row_data = statistics.contiguous(), valid, upstream.contiguous()
    arguments = logits, teacher, *row_data, scale, teacher_scale, direction, beta, out
    if backend == "triton":
        from .kernels.divergence_grad import divergence_grad as run

        run(*arguments)
    else:
        torch_divergence.divergence_grad(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Divergence) -> None:
    logits, teacher, _, valid, *options, _, ctx.inplace, ctx.backend = inputs
    ctx.options = tuple(options)  # scale, teacher_scale, direction, beta
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, teacher, output[2], valid)


def _backward(
    ctx: Any,
    grad_loss: Tensor | None,
    grad_log_probs: Tensor | None,
    grad_statistics: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 10
    if not ctx.needs_input_grad[0] or grad_loss is None:
        return None, *nothing
    logits, teacher, statistics, valid = ctx.saved_tensors
    arguments = teacher, statistics, valid, grad_loss, *ctx.options, ctx.backend
    ops = divergence_grad, divergence_grad_
    return gradients.write(*ops, logits, arguments, ctx.inplace), *nothing


divergence.register_autograd(_backward, setup_context=_setup_context)
