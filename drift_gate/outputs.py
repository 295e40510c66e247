"""What the public functions return."""

from typing import NamedTuple

from torch import Tensor

Metrics = dict[str, Tensor]


def is_mostly_rounding(drift_abs: float, drift_noise: float) -> bool:
    """Whether over half of a drift is what rounding of the logits alone would show (metrics of
    these names). A policy that has not moved at all has neither: its logits are rounded alike."""
    return 0.01 * drift_noise < drift_abs < 2 * drift_noise


class GateOutput(NamedTuple):
    """Result of `gate_weights`; everything is detached and has the shape of `log_probs`."""

    weights: Tensor
    """w: float32, unit mean over the valid positions, 0 on the others."""
    drift: Tensor
    """d = old_log_probs - log_probs in nats: float32, 0 on invalid positions, NaN on valid ones at
    which it is not measured (`DriftGate.sample_every`)."""
    block_ids: Tensor
    """int64, numbered 0, 1, ... in the order in which blocks begin; -1 on invalid positions."""
    metrics: Metrics
    """gate_mean_raw, gate_min, gate_max, gate_ess, drift_abs, drift_signed: scalars."""


class TopKOutput(NamedTuple):
    """The K likeliest words of each position: what `topk_loss` takes of a teacher. Detached.

    An entry without a word has the id -1 and the log-prob -inf: where K exceeds V, on positions
    outside the response mask, and in the place of words that have no mass (a logit of -inf).
    """

    ids: Tensor
    """[..., K] int64, the likeliest word first; of equally likely ones the smaller id."""
    log_probs: Tensor
    """[..., K] in nats, of the full softmax: float32 (float64 for float64). NaN in a row that holds
    a NaN or +inf or is all -inf, which lists the first K words."""


class LossOutput(NamedTuple):
    """Result of a loss function.

    Per-token tensors are float32 (float64 for float64 logits), have the shape of `labels`, and are
    0 on invalid positions. Only `loss` and `token_loss` carry gradients.
    """

    loss: Tensor
    """Scalar, or with reduction "none" the same as `token_loss`."""
    token_loss: Tensor
    """Gated loss w * L of every position, before `loss_agg_mode`."""
    log_probs: Tensor
    """Current log-prob of each label, in nats; NaN where it was not computed, which happens with
    `DriftGate.sample_every` and lists alone: see `topk_loss`."""
    gate: Tensor
    """Weight w of every position; 1 on valid positions where no gate is used."""
    drift: Tensor
    """old_log_probs - log_probs, in nats; 0 where no old log-probs are given, NaN on valid
    positions at which it is not measured (`DriftGate.sample_every`)."""
    entropy: Tensor | None
    """Entropy of the student's distribution in nats, where asked for."""
    metrics: Metrics
    """Detached scalars on the device of the loss: reading one synchronises, building them not.

    Means over the valid (of drifts: the measured) positions. `drift_noise` is the mean |drift| in
    nats that rounding of the logits to bfloat16 or float16 alone would show between policies that
    are a little apart; 0 for float32 (also where a head keeps it: `Head.logits_dtype`) and without
    old log-probs; not there where the log-probs are the caller's. Logits that were rounded before
    they were widened are not recognised."""
