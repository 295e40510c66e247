"""From checked arguments to a step over the head, and from its results to a loss."""

from typing import Any

import torch
from torch import Tensor

from . import rows
from .batch import Batch
from .deferred import GateRules
from .gating import gated, unit_weights
from .head import Inputs, encode
from .head_step import Settings, attach, head_step
from .linear import scan_head
from .outputs import LossOutput


def step(
    batch: Batch,
    inputs: Inputs,
    kind: str,
    options: list[Any],
    targets: list[Tensor],
    known: Tensor | None,
    return_entropy: bool,
) -> "Step":
    """Run `head_step`: gradients are formed where autograd will ask for them.

    known: [N] log-probs of the labels where the caller has them; the gates are then of these.
    """
    weight, bias, *_ = inputs.head
    gating = batch.gating
    if gating.context is not None and gating.gate is not None and known is None:
        known = _log_probs(batch, inputs)  # a block's rows lie on several ranks
    weights = gating.weights
    if known is not None:
        weights = unit_weights(gating, known, batch.old, batch.valid)
    coefficient, largest = _coefficients(batch)
    settings = settings_of(batch, inputs, kind, options, return_entropy)
    layout = batch.layout
    of_hidden, of_weight, rest, of_bias, inverse, *results = head_step(
        inputs.hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
        batch.ids, batch.old, batch.valid, gating.spans, layout.cu_seqlens, coefficient, targets,
        weights, layout.length, settings,
    )  # fmt: skip
    factor = largest * inverse
    if batch.reduce.divisor is not None:
        factor = factor / batch.reduce.divisor
    if not return_entropy:
        del results[1]
    return Step(inputs, [of_hidden, of_weight, rest, of_bias], factor, results)


class Step:
    """What a step over the head has found; results are the loss's: see `head_losses`."""

    def __init__(
        self,
        inputs: Inputs,
        sums: list[Tensor],
        factor: Tensor,
        results: list[Tensor],
    ) -> None:
        self.inputs, self.sums, self.factor = inputs, sums, factor
        self.results = results

    def attach(self, output: LossOutput) -> LossOutput:
        """The loss with its gradients; per-token losses are detached."""
        loss = output.loss.detach()
        if any(_needs(self.inputs)):
            head = self.inputs.head
            dtype = self.factor.dtype
            loss = attach(
                loss, self.inputs.hidden, head.weight, head.bias, self.sums, self.factor.to(dtype)
            )
        return output._replace(loss=loss, token_loss=output.token_loss.detach())


def detached_tokens(batch: Batch, output: LossOutput) -> LossOutput:
    """The same with per-token losses detached, unless they are the loss."""
    if batch.reduce.none:
        return output
    return output._replace(token_loss=output.token_loss.detach())


def settings_of(
    batch: Batch, inputs: Inputs, kind: str, options: list[Any], return_entropy: bool
) -> str:
    """`Settings` of checked arguments, encoded."""
    gate = batch.gating.gate
    rules = GateRules("token", 1, "mean", 0.0, "off")
    if gate is not None:
        rules = GateRules(
            gate.granularity, gate.block_size, gate.aggregate, float(gate.tau), gate.normalize,
            batch.gating.part,
        )  # fmt: skip
    _, _, softcap, scale, shard = inputs.head
    return Settings(
        kind, options, rules, softcap, scale, inputs.chunk_size, return_entropy, _needs(inputs),
        inputs.backend, encode(shard),
    ).encode()  # fmt: skip


@torch.no_grad()
def _log_probs(batch: Batch, inputs: Inputs) -> Tensor:
    """Of the labels among the batch's words, [N]; a product with the head of its own."""
    assert batch.ids is not None
    head, words = inputs.head, batch.student.vocab
    if head.shard is None:  # the head may have words for padding
        bias = None if head.bias is None else head.bias[:words]
        inputs = inputs._replace(head=head._replace(weight=head.weight[:words], bias=bias))
    return scan_head(inputs, batch.ids[:, None], batch.valid, False, dense=False)[1][:, 0]


def _needs(inputs: Inputs) -> list[bool]:
    """Whether autograd will ask for the gradients of hidden states, weight and bias."""
    weight, bias, *_ = inputs.head
    asked = torch.is_grad_enabled()
    return [asked and x is not None and x.requires_grad for x in (inputs.hidden, weight, bias)]


def _coefficients(batch: Batch) -> tuple[Tensor, Tensor]:
    """d loss / d (w L) of each row [N] over the largest of them, and the largest."""
    dtype, valid, reduce = batch.student.dtype, batch.valid, batch.reduce
    zeros = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    blocks = None
    if batch.counts:
        ungated = batch.gating._replace(gate=None, weights=None)
        blocks = gated(ungated, zeros, None, valid, True).blocks
    _, row_data, _ = rows.sampled_token(
        zeros, None, zeros, valid, blocks, *batch.sequences, 0.0, "off", "given", 0.2, 0.2, 3.0,
        None, reduce.factor, reduce.denominator, reduce.token_mean, batch.backend,
    )  # fmt: skip
    coefficient = row_data[3]
    largest = torch.nn.functional.pad(coefficient, (0, 1)).max()
    return coefficient / torch.where(largest > 0, largest, 1), largest
