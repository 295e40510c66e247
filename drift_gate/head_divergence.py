"""Position losses over two heads' whole vocabularies, differentiable one by one, as an op.

The upstream gradient of each is known in the backward alone, which makes both logits again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .chunks import chunks, take
from .head import Head
from .head_gradients import Needs, Sums, as_gradients, empty_gradients, finish_sums, needed
from .head_losses import Common
from .head_step import Settings, make_loss


@custom_op("drift_gate::head_divergence", mutates_args=())
def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    valid: Tensor,
    targets: list[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the labels [N], entropy [N] or [0], and losses [N], see `head_step`.

    Differentiable in the losses alone.
    """
    chosen = Settings.decode(settings)
    head = Head(weight, bias, chosen.softcap, chosen.scale)
    common = Common(hidden, head, labels, chosen.chunk_size, chosen.entropy, chosen.backend)
    loss = make_loss(common, chosen, None, targets)
    for at in chunks(valid, chosen.chunk_size) or []:
        loss.values(at)
    log_probs, entropy, losses = loss.results
    return log_probs, entropy, losses


@head_divergence.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    valid: Tensor,
    targets: list[Tensor],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = len(hidden), torch.promote_types(hidden.dtype, torch.float32)
    entropy = n * Settings.decode(settings).entropy
    return (
        hidden.new_empty(n, dtype=dtype),
        hidden.new_empty(entropy, dtype=dtype),
        hidden.new_empty(n, dtype=dtype),
    )


@custom_op("drift_gate::head_divergence_grad", mutates_args=())
def head_divergence_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor,
    targets: list[Tensor],
    upstream: Tensor,
    needs: list[bool],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias ([0] where not needed), losses weighed by upstream."""
    chosen = Settings.decode(settings)
    head = Head(weight, bias, chosen.softcap, chosen.scale)
    common = Common(hidden, head, None, chosen.chunk_size, False, chosen.backend)
    loss = make_loss(common, chosen, None, targets)
    sums = Sums(hidden, head, Needs(*needs), chosen.chunk_size)
    for at in chunks(valid, chosen.chunk_size) or []:
        loss.values(at)
        sums.add(at, take(hidden, at), loss.gradient(take(upstream, at)))
    grads = finish_sums(sums.finish(), sums.tensors[3].new_ones(()), weight.dtype)
    return grads[0], grads[1], grads[2]


@head_divergence_grad.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor,
    targets: list[Tensor],
    upstream: Tensor,
    needs: list[bool],
    settings: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, bias, _, valid, targets, ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, valid, *targets)


def _backward(
    ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None, upstream: Tensor | None
) -> tuple[Any, ...]:
    hidden, weight, bias, valid, *targets = ctx.saved_tensors
    nothing = None, None, [None] * len(targets), None
    if upstream is None:
        return None, None, None, *nothing
    needs = needed(ctx)
    grads = head_divergence_grad(
        hidden, weight, bias, valid, targets, upstream, needs, ctx.settings
    )
    return *as_gradients(grads, needs), *nothing


head_divergence.register_autograd(_backward, setup_context=_setup_context)
