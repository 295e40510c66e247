"""From checked arguments to a step over the head, and from its results to a loss."""

from typing import Any

import torch
from torch import Tensor

from . import rows
from .batch import Batch
from .head import Inputs
from .head_step import Settings, attach, head_step
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
    """Run `head_step`: gradients are formed where autograd will ask for them."""
    weight, bias, *_ = inputs.head
    coefficient, largest = _coefficients(batch)
    settings = settings_of(batch, inputs, kind, options, return_entropy)
    layout = batch.layout
    of_hidden, of_weight, rest, of_bias, inverse, *results = head_step(
        inputs.hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
        batch.ids, batch.old, batch.valid, batch.spans, layout.cu_seqlens, coefficient, targets,
        known, layout.length, settings,
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
    gate = batch.gate
    rules = ("token", 1, "mean", 0.0, "off")
    if gate is not None:
        rules = (
            gate.granularity, gate.block_size, gate.aggregate, float(gate.tau), gate.normalize
        )  # fmt: skip
    *_, softcap, scale = inputs.head
    return Settings(
        kind, options, rules, softcap, scale, inputs.chunk_size, return_entropy, _needs(inputs),
        inputs.backend,
    ).encode()  # fmt: skip


def _needs(inputs: Inputs) -> list[bool]:
    """Whether autograd will ask for the gradients of hidden states, weight and bias."""
    weight, bias, *_ = inputs.head
    asked = torch.is_grad_enabled()
    return [asked and x is not None and x.requires_grad for x in (inputs.hidden, weight, bias)]


def _coefficients(batch: Batch) -> tuple[Tensor, Tensor]:
    """d loss / d (w L) of each row [N] over the largest of them, and the largest."""
    dtype, valid, reduce = batch.student.dtype, batch.valid, batch.reduce
    zeros = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    sequences = batch.layout.cu_seqlens, batch.layout.length
    blocks = None
    if reduce.token_mean or reduce.denominator == "sequences":
        blocks, _ = rows.row_blocks(
            zeros, None, valid, None, *sequences, "token", 1, "mean", True, batch.backend
        )
    _, row_data, _ = rows.sampled_token(
        zeros, None, zeros, valid, blocks, *sequences, 0.0, "off", "given", 0.2, 0.2, 3.0, None,
        reduce.factor, reduce.denominator, reduce.token_mean, batch.backend,
    )  # fmt: skip
    coefficient = row_data[3]
    largest = torch.nn.functional.pad(coefficient, (0, 1)).max()
    return coefficient / torch.where(largest > 0, largest, 1), largest
