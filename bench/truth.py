"""What float64 makes of a work, on all rows where that is cheap and on some where it is not.

A loss over sampled tokens or lists depends on a row of logits through its logsumexp and a few
entries: the row function in float64 gives the loss of all rows and the coefficients alpha, beta;
of the gradient, the checked rows are formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import CHECKED, Work
from .internals import allowed_of


class Expected(NamedTuple):
    """Part of one output: `value` is what `output[rows]` should be."""

    value: Tensor
    rows: Tensor | None = None  # None: all


Truth = dict[str, Expected]
Outputs = dict[str, Tensor]
RowLoss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]  # now, lse, z[ids] -> loss []


def sampled_or_listed(work: Work, row_loss: RowLoss) -> Truth:
    """Truth of a loss of the label's log-prob, the logsumexp and the listed logits."""
    now, lse = (x.clone().requires_grad_() for x in (work.now64, work.lse64))
    listed = None if work.listed64 is None else work.listed64.clone().requires_grad_()
    loss = row_loss(now, lse, listed)
    inputs = [now, lse] if listed is None else [now, lse, listed]
    slopes = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
    alpha, ids, beta = slopes[1] - slopes[0], work.labels[:, None], slopes[0][:, None]
    if listed is not None:
        ids, beta = torch.cat([ids, work.ids], 1), torch.cat([beta, slopes[2]], 1)
    truth: Truth = {"loss": Expected(loss.detach())}
    grad = gradient(work, alpha, ids, beta)
    if work.logits is not None:
        return truth | {"grad": Expected(grad, work.checked)}
    return truth | _through_head(work, grad, alpha, ids, beta)


def gradient(work: Work, alpha: Tensor, ids: Tensor, beta: Tensor) -> Tensor:
    """Gradient in the logits of the checked rows."""
    rows = work.checked
    p = (work.logits64(rows) - work.lse64[rows, None]).exp_()
    return p.mul_(alpha[rows, None]).scatter_add_(1, ids[rows], beta[rows])


def _through_head(work: Work, grad: Tensor, alpha: Tensor, ids: Tensor, beta: Tensor) -> Truth:
    """Gradient in the checked hidden states, and in some words of the head."""
    words = torch.cat([work.labels[work.checked], work.checked % work.case.vocab]).unique()[
        :CHECKED
    ]
    hidden, some = work.hidden.double(), work.weight[words].double()
    columns = (hidden @ some.T - work.lse64[:, None]).exp_().mul_(alpha[:, None])
    for i, word in enumerate(words.tolist()):
        columns[:, i] += torch.where(ids == word, beta, 0).sum(1)
    return {
        "grad_hidden": Expected(grad @ work.weight.double(), work.checked),
        "grad_weight": Expected(columns.T @ hidden, words),
    }


def full_vocabulary(work: Work, divergence: Callable[[Tensor, Tensor], Tensor], weigh) -> Truth:
    """Truth of a divergence over all words; `divergence` takes both log-probs, [rows, V] -> [rows].

    `weigh(now, losses) -> loss []` gates and reduces; the gate is detached.
    """

    def of_rows(rows: Tensor | slice, leaf: Tensor | None = None) -> Tensor:
        z = work.logits64(rows) if leaf is None else leaf
        return divergence(z.log_softmax(-1), work.logits64(rows, teacher=True).log_softmax(-1))

    losses = torch.cat([of_rows(rows) for rows in work.chunks()]).requires_grad_()
    loss = weigh(work.now64, losses)
    (slope,) = torch.autograd.grad(loss, losses)
    leaf = work.logits64(work.checked).requires_grad_()
    (grad,) = torch.autograd.grad(of_rows(work.checked, leaf), leaf, slope[work.checked])
    truth: Truth = {"loss": Expected(loss.detach())}
    if work.logits is not None:
        return truth | {"grad": Expected(grad, work.checked)}
    return truth | {"grad_hidden": Expected(grad @ work.weight.double(), work.checked)}


@torch.no_grad()
def errors(outputs: Outputs, truth: Truth) -> dict[str, dict[str, float]]:
    """Largest and root-mean-square error of every output that the truth knows, and its scale."""
    found = {}
    for name, (value, rows) in truth.items():
        if name not in outputs:
            continue
        got = outputs[name] if rows is None else outputs[name][rows]
        error = (got.double() - value).abs()
        found[name] = {
            "max": float(error.max()),
            "rms": float(error.square().mean().sqrt()),
            "scale": float(value.abs().max()),
        }
    return found


PEERS = 8.0
"""Times the eager error that a peer may have. Some roundings more are a few times that; a hundred,
as of log-probs in bfloat16 whose ratios fall on the other side of a clip, is another loss."""


def wrong(
    found: dict[str, dict[str, float]],
    eager: dict[str, dict[str, float]],
    dtype: torch.dtype,
    factor: float,
) -> str | None:
    """What is wrong with outputs of these errors, or None.

    eager: errors of the eager loss, the yardstick (see drift_gate/budget.py); an output that it
    lacks is held to be finite alone. dtype: of the inputs, to which an output may be rounded.
    """
    for name, error in found.items():
        if not math.isfinite(error["max"]):
            return f"{name} is not finite"
        if name in eager and math.isfinite(eager[name]["max"]):
            scale = error["scale"]
            most = allowed_of(scale, scale, eager[name]["max"], dtype, factor)
            if error["max"] > most:
                return f"{name} is off by {error['max']:.1e}, of {most:.1e} allowed"
    return None
