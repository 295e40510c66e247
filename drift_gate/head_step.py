"""The dense `linear_` losses in one pass over the rows: gradients are formed in the forward.

`head_step` walks the rows chunk by chunk: logits, values, gates of the chunk's blocks, gradient of
the logits in their place, products with the head and with the hidden states: three GEMMs in all.
`attach` makes autograd hand out what it has summed. Where the gates cannot be formed chunk by
chunk (a block longer than a chunk, unit mean over each sequence) the log-probs of all rows come
first, and the logits are made twice.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from .chunks import Rows, chunks, take
from .deferred import (
    DeferredWeights,
    GateRules,
    KnownWeights,
    RowData,
    all_weights,
    block_leaders,
)
from .head import Head, decode
from .head_gradients import Needs, Sums, finish_sums, sum_shapes
from .head_losses import Common, Divergence, HeadLoss, Listed, SampledToken, Teacher
from .literals import read, written


class Settings(NamedTuple):
    """Options of a step, none of them a tensor; a string where an op passes them."""

    kind: str
    """"sampled", "listed" or "full"."""
    options: list[Any]
    """Of the loss: see `make_loss`."""
    gate: tuple[Any, ...]
    """`GateRules`."""
    softcap: float
    scale: float
    chunk_size: int
    entropy: bool
    needs: list[bool]
    backend: str
    shard: str
    """See `head.encode`."""

    def encode(self) -> str:
        return written(self)

    @classmethod
    def decode(cls, text: str) -> "Settings":
        return cls(*read(text))


@custom_op("drift_gate::head_step", mutates_args=())
def head_step(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    old: Tensor | None,
    valid: Tensor,
    spans: Tensor | None,
    cu_seqlens: Tensor | None,
    coefficient: Tensor,
    targets: list[Tensor],
    weights: Tensor | None,
    length: int,
    settings: str,
) -> list[Tensor]:
    """Values of a loss over a head's logits, and the gradients of its sum over the rows.

    Args:
        hidden [N, H], weight [V, H], bias [V]: one dtype.
        labels, old, valid, spans: [N]; cu_seqlens [B + 1], else `length` rows are a sequence.
        coefficient: [N], see `RowData`.
        targets: the teacher's data, see `make_loss`.
        weights: [N], w where it is known beforehand.

    Returns:
        the sums of `sum_shapes` (to be multiplied by the next), [] divisor's inverse 1 / mean(u),
        then the loss's results: see `head_losses`.
    """
    chosen = Settings.decode(settings)
    needs, gate = Needs(*chosen.needs), GateRules(*chosen.gate)
    head = Head(weight, bias, chosen.softcap, chosen.scale, decode(chosen.shard))
    common = Common(hidden, head, labels, chosen.chunk_size, chosen.entropy, chosen.backend)
    loss = make_loss(common, chosen, old, targets)
    data = RowData(valid, old, spans, cu_seqlens, length, coefficient)
    sums = Sums(hidden, head, needs, chosen.chunk_size)
    found = _walk(loss, common, data, gate, weights, sums)
    inverse = found.mean().reciprocal().to(coefficient.dtype)
    return [*sums.finish(), inverse, *loss.results]


def make_loss(
    common: Common, settings: Settings, old: Tensor | None, targets: list[Tensor]
) -> HeadLoss:
    """The loss of these settings."""
    options = settings.options
    if settings.kind == "sampled":  # estimator, clips; teacher's log-probs [N]
        return SampledToken(common, old, targets[0], options[0], tuple(options[1:]))
    if settings.kind == "listed":  # direction, support, beta; words, log-probs, present [N, K]
        words, teacher, present = targets
        return Listed(common, words, teacher, present, tuple(options))
    # vocab, direction, beta, softcap and scale of the teacher; its hidden states, weight, bias
    vocab, direction, beta, softcap, scale = options
    theirs, weight, *biases = targets
    head = Head(weight, biases[0] if biases else None, softcap, scale)
    return Divergence(common, Teacher(theirs, head), vocab, direction, beta)


def _walk(
    loss: HeadLoss,
    common: Common,
    data: RowData,
    gate: GateRules,
    given: Tensor | None,
    sums: Sums,
) -> DeferredWeights | KnownWeights:
    """Go through the rows: results, and gradients where any are needed; how positions weigh."""
    size, wanted = common.chunk_size, any(sums.needs)
    weights: DeferredWeights | KnownWeights
    parts: list[Rows] | None = None
    if given is not None:
        parts = chunks(data.valid, size) or []
        weights = KnownWeights(given)
    elif gate.normalize != "sequence" and wanted:
        leaders = block_leaders(data, gate, common.backend)
        parts = chunks(data.valid, size, leaders)
        weights = DeferredWeights(data, gate, leaders, common.backend)
    if parts is None:  # the gates of all rows first
        parts = chunks(data.valid, size) or []
        for at in parts:
            loss.values(at)
        weights = KnownWeights(all_weights(loss.results[0], data, gate, common.backend))
        if not wanted:
            return weights
    for at in parts:
        gates, factor = weights.of(at, loss.values(at))
        if not wanted:
            continue
        if factor != 1:
            sums.multiply(factor)
        h = take(common.hidden, at)
        sums.add(at, h, loss.gradient(gates * take(data.coefficient, at)))
    return weights


@head_step.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    old: Tensor | None,
    valid: Tensor,
    spans: Tensor | None,
    cu_seqlens: Tensor | None,
    coefficient: Tensor,
    targets: list[Tensor],
    weights: Tensor | None,
    length: int,
    settings: str,
) -> list[Tensor]:
    chosen = Settings.decode(settings)
    sums = [
        hidden.new_empty(shape, dtype=dtype)
        for shape, dtype in sum_shapes(hidden, weight, Needs(*chosen.needs), chosen.chunk_size)
    ]
    rows = [coefficient.new_empty(len(hidden)), coefficient.new_empty(len(hidden) * chosen.entropy)]
    if chosen.kind == "listed":
        rows.append(coefficient.new_empty(targets[0].shape))
    if chosen.kind == "full":
        rows.append(coefficient.new_empty(len(hidden)))
    return [*sums, coefficient.new_empty(()), *rows]


@custom_op("drift_gate::attach", mutates_args=())
def attach(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sums: list[Tensor],
    factor: Tensor,
) -> Tensor:
    """The loss, whose gradients in hidden, weight and bias are factor * sums."""
    return loss.clone()


@attach.register_fake
def _(
    loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sums: list[Tensor],
    factor: Tensor,
) -> Tensor:
    return torch.empty_like(loss)


@custom_op("drift_gate::hand_out", mutates_args=("sums",))
def hand_out(sums: list[Tensor], factor: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Finish the sums: hidden's in place; returns those of weight and bias, in the dtype `like`.

    Returns [0] for the weight where its sum has that dtype already, and is finished in place.
    """
    _, of_weight, of_bias = finish_sums(sums, factor, like.dtype)
    same = of_weight.data_ptr() == sums[1].data_ptr()
    return like.new_empty(0) if same else of_weight, of_bias.clone()


@hand_out.register_fake
def _(sums: list[Tensor], factor: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    same = sums[1].dtype == like.dtype
    return like.new_empty(0 if same else sums[1].shape), like.new_empty(sums[3].shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, hidden, _, _, sums, factor = inputs
    ctx.like = hidden.new_empty(0)
    ctx.handed_out = False
    ctx.save_for_backward(*sums, factor)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    if ctx.handed_out:
        raise RuntimeError(
            "backward ran a second time through a drift_gate linear_ loss: its gradients were "
            "formed in the forward and handed out by the first backward. Call the loss again, or "
            'use loss_agg_mode="none", whose backward makes them anew'
        )
    ctx.handed_out = True
    *sums, factor = ctx.saved_tensors
    of_weight, of_bias = hand_out(sums, factor * upstream, ctx.like)
    if not of_weight.numel():
        of_weight = sums[1]
    grads = [sums[0], of_weight, of_bias]
    needs = ctx.needs_input_grad[1:4]
    shown = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return None, *shown, [None] * len(sums), None


attach.register_autograd(_backward, setup_context=_setup_context)
