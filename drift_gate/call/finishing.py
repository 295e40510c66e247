"""From an op's results to a `LossOutput`, and to what a `GateNormalizer` collects."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..outputs import LossOutput, Metrics
from ..parallel.scope import rescaled, totals
from ..passes.rules import DRIFT, METRICS, TOKEN_LOSS, WEIGHT
from .rows import Call, RowInputs
from .weighing import empty_finished


class Outcome(NamedTuple):
    """What every loss's op finds; N rows."""

    loss: Tensor  # []
    table: Tensor  # [5, N], see `passes.rules.Finished`
    metrics: Tensor  # [len(METRICS)]
    totals: Tensor  # [2, 4] beside a GateNormalizer
    valid: Tensor  # [N]
    log_probs: Tensor  # [N]
    entropy: Tensor  # [N], or [0] where it was not asked for


def empty_outcome(rows: RowInputs, like: Tensor, entropy: bool) -> Outcome:
    """The same, empty; row data are as `like`."""
    n = rows.n_rows
    return Outcome(
        *empty_finished(rows, like), like.new_empty(n, dtype=torch.bool), like.new_empty(n),
        like.new_empty(n if entropy else 0),
    )  # fmt: skip


def complete(call: Call, found: Outcome, with_entropy: bool, *dropped: str) -> LossOutput:
    """The loss and its per-token tensors; `dropped`: metrics that say nothing here."""
    shape, table = call.shape, found.table
    shown = table.detach().view(len(table), *shape).unbind()  # there may be no rows
    token_loss = table[TOKEN_LOSS].view(shape) if table.requires_grad else shown[TOKEN_LOSS]
    metrics: Metrics = dict(zip(METRICS, found.metrics.unbind(), strict=True))
    tokens = metrics.pop("valid_tokens")
    for name in dropped:
        del metrics[name]
    entropy = None
    if with_entropy:
        entropy = found.entropy.view(shape)
        metrics["entropy"] = entropy.sum() / tokens.clamp(min=1)
    output = LossOutput(
        token_loss if call.rows.per_token else found.loss,
        token_loss,
        found.log_probs.view(shape),
        shown[WEIGHT],
        shown[DRIFT],
        entropy,
        metrics,
    )
    return output if call.normalizer is None else _collected(call, output, found)


def _collected(call: Call, output: LossOutput, found: Outcome) -> LossOutput:
    """The output of a call as a part of a step's batch."""
    assert call.normalizer is not None
    mine, everyone = (totals(x) for x in found.totals.unbind())
    counted = call.rows.reduce.denominator != "given"
    gate, size = call.normalizer.collect(mine, everyone, counted)
    valid = found.valid.view(output.gate.shape)
    losses = [rescaled(output.token_loss, gate, valid)]
    if not call.rows.per_token:
        losses.append(output.loss * (gate * size).to(output.loss.dtype))
    losses = call.normalizer.follow(losses)
    token_loss, loss = losses[0], losses[-1]
    call.normalizer.record(loss)
    metrics = output.metrics
    for name in ("gate_min", "gate_max"):
        metrics[name] = metrics[name] * gate.to(metrics[name].dtype)
    return output._replace(
        loss=loss, token_loss=token_loss, gate=rescaled(output.gate, gate, valid)
    )
