"""The two vocabulary passes as torch.library ops, and the autograd that joins them.

`scan` reads the logits once; its backward is `expand`, which writes their gradient once. Both take
the name of the backend, already resolved, and dispatch on it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import gradients, torch_passes

Scan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@custom_op("drift_gate::scan", mutates_args=())
def scan(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> Scan:
    """Statistics and listed entries of every row of z = scale * logits.

    Args:
        logits: [B, T, V], N = B * T rows, last dimension contiguous; bfloat16, float16, float32,
            or float64 with the backend "torch".
        ids: [N, K] int32 or int64, each in [0, V).
        valid: [N] bool, or None for all. Other rows are not read and give 0 everywhere.
        scale: 1 / temperature.
        with_entropy: whether to compute it.
        inplace_backward: overwrite the logits with their gradient in the backward.
        backend: "triton" or "torch".

    Returns:
        gathered [N, K] = z[ids]; log_probs [N, K]; maximum [N]; log_sum [N], the logarithm of
        sum exp(z - maximum); entropy [N] in nats, or [0]. float32, or float64 for float64.
        Differentiable in `gathered`, `log_probs` and `log_sum`: as logsumexp(z) is
        maximum + log_sum whatever the shift, its derivative is that of log_sum with a constant
        maximum.
    """
    if backend == "triton":
        from .kernels.scan import scan as run

        result: Scan = run(logits, ids, valid, scale, with_entropy)
        return result
    return torch_passes.scan(logits, ids, valid, scale, with_entropy)


@scan.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> Scan:
    return empty_scan(logits, ids, with_entropy)


def empty_scan(like: Tensor, ids: Tensor, with_entropy: bool) -> Scan:
    """What `scan` returns for ids [N, K], empty, in the accumulation dtype of `like`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    n, k = ids.shape

    def new(*shape: int) -> Tensor:
        return like.new_empty(shape, dtype=dtype)

    return new(n, k), new(n, k), new(n), new(n), new(n * with_entropy)


@custom_op("drift_gate::expand", mutates_args=())
def expand(
    logits: Tensor,
    ids: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    """scale * (alpha softmax(z) + sum_k beta_k onehot(ids_k)) in a new [B, T, V] tensor.

    `alpha` [N] and `beta` [N, K] have the dtype of the statistics, which come from `scan`. Rows
    that are not valid become 0; they, and rows whose alpha is 0, are not read.
    """
    out = gradients.empty(logits.shape, logits.dtype, logits.device)
    _expand_into(out, logits, ids, maximum, log_sum, gathered, valid, alpha, beta, scale, backend)
    return out


@expand.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@custom_op("drift_gate::expand_", mutates_args=("logits",))
def expand_(
    logits: Tensor,
    ids: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    backend: str,
) -> None:
    """`expand` over the logits themselves; their version counter moves on."""
    _expand_into(
        logits, logits, ids, maximum, log_sum, gathered, valid, alpha, beta, scale, backend
    )


@expand_.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    backend: str,
) -> None:
    return None


def _expand_into(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    scale: float,
    backend: str,
) -> None:
    # Upstream gradients are often expanded scalars, with stride 0.
    alpha, beta = alpha.contiguous(), beta.contiguous()
    row_data = ids, maximum, log_sum, gathered, valid, alpha, beta, scale
    if backend == "triton":
        from .kernels.expand import expand as run

        run(logits, *row_data, out)
    else:
        torch_passes.expand(logits, *row_data, out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Scan) -> None:
    logits, ids, valid, ctx.scale, _, ctx.inplace, ctx.backend = inputs
    gathered, _, maximum, log_sum, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids, valid, gathered, maximum, log_sum)


def _backward(
    ctx: Any,
    grad_gathered: Tensor | None,
    grad_log_probs: Tensor | None,
    grad_maximum: Tensor | None,
    grad_log_sum: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The coefficients alpha = dL/d logsumexp and beta = dL/d z[ids], expanded."""
    nothing = (None,) * 6
    if not ctx.needs_input_grad[0]:
        return None, *nothing
    logits, ids, valid, gathered, maximum, log_sum = ctx.saved_tensors
    alpha, beta = coefficients(gathered, grad_gathered, grad_log_probs, grad_log_sum)
    row_data = ids, maximum, log_sum, gathered, valid, alpha, beta, ctx.scale, ctx.backend
    return gradients.write(expand, expand_, logits, row_data, ctx.inplace), *nothing


def coefficients(
    gathered: Tensor,
    grad_gathered: Tensor | None,
    grad_log_probs: Tensor | None,
    grad_log_sum: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """alpha [N] = dL/d logsumexp and beta [N, K] = dL/d z[ids] from the gradients of `scan`."""
    alpha, beta = grad_log_sum, grad_gathered
    if grad_log_probs is not None:
        beta = grad_log_probs if beta is None else beta + grad_log_probs
        through_sum = -grad_log_probs.sum(-1)
        alpha = through_sum if alpha is None else alpha + through_sum
    if alpha is None:
        alpha = torch.zeros_like(gathered[:, 0])
    if beta is None:
        beta = torch.zeros_like(gathered)
    return alpha, beta


scan.register_autograd(_backward, setup_context=_setup_context)


@custom_op("drift_gate::gather", mutates_args=())
def gather(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    inplace_backward: bool,
    backend: str,
) -> Tensor:
    """`scan`'s gathered [N, K] alone: K entries of each row are read, and no logsumexp is known.

    The gradient is sparse, alpha = 0: `expand` writes it and reads nothing.
    """
    return torch_passes.gather(logits, ids, valid, scale)


@gather.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    inplace_backward: bool,
    backend: str,
) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(ids.shape, dtype=dtype)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ids, valid, ctx.scale, ctx.inplace, ctx.backend = inputs
    ctx.save_for_backward(logits, ids, valid)


def _backward_gather(ctx: Any, beta: Tensor) -> tuple[Tensor | None, ...]:
    logits, ids, valid = ctx.saved_tensors
    zero = beta.new_zeros(beta.shape[0])
    row_data = ids, zero, zero, beta, valid, zero, beta, ctx.scale, ctx.backend
    return gradients.write(expand, expand_, logits, row_data, ctx.inplace), *(None,) * 5


gather.register_autograd(_backward_gather, setup_context=_setup_gather)
