"""What the row functions of every backend take and return, and the choices they know."""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import ADVANTAGES, AGGREGATES, ESTIMATORS, GRANULARITIES, NORMALIZE

METRICS = (
    "gate_mean_raw",
    "gate_min",
    "gate_max",
    "gate_ess",
    "drift_abs",
    "drift_signed",
    "pg_clipfrac",
    "ppo_kl",
    "drift_noise",
    "valid_tokens",
    "floored",
)
"""Numbers of the valid rows; the last two are counts."""
GATE_METRICS = METRICS[:6]
TOKENS = METRICS.index("valid_tokens")

LARGEST_DRIFT = 2.0**126
"""Stands for infinity where a call is a part of its batch: see `GateRule.part`."""

NORMALIZATIONS = (*NORMALIZE, "off", "given")
POSITION_LOSSES = (*ESTIMATORS, "given")
ADVANTAGE_KINDS = (*ADVANTAGES, "given")
DENOMINATORS = ("given", "tokens", "sequences")


WEIGHT, TOKEN_LOSS, SLOPE, COEFFICIENT, DRIFT = range(5)
"""Rows of the table of `Finished`."""


class Spacing(NamedTuple):
    """How far apart the logits lie of which `now` was made: what rounding them may have done to it.

    With u(z) the spacing at z, and every rounding error even within +-u/2 and independent, log p_y
    errs by e_y - sum_v p_v e_v: e_y (1 - p_y) of its own, and p_v e_v of every other word. The
    largest word has p = exp(-log_sum); what the words beside it and the label have of the mass is
    taken to halve from word to word, so that their squares sum to rest^2 / 3, and to no more than
    the largest p times rest. The drift is a difference of two such errors, of the old and of the
    current log-prob: the mean size of that of two even errors is u / 3. Row by row

        noise = sqrt((u(z_y) (1 - p_y))^2 + u(z_max)^2 c^2) / 3
        c^2 = min(rest^2 / 3, p_max rest), and p_max^2 where the label is not the largest word
    """

    maximum: Tensor
    """[N], the largest z of a row."""
    log_sum: Tensor
    """[N], log sum exp(z - maximum)."""
    bits: int
    """Of the mantissa, the leading one left out."""
    scale: float
    """z is this times the logits."""


SHORT_BITS = {torch.bfloat16: 7, torch.float16: 10}
SNAP = 1 + 2.0**-13
"""Of |z| before its exponent is taken: it may be a power of two, less the roundings of a sum."""
TIED = 1e-4
"""Nats below the largest word at which the label is it."""


class RowData(NamedTuple):
    """Rows of a call, flat; log-probs in nats, float32 or float64."""

    valid: Tensor
    """[N] bool."""
    now: Tensor
    """[N], current log-probs of the labels."""
    old: Tensor | None
    """[N], old log-probs; None: no drift, and ratio 1."""
    spans: Tensor | None
    """[N] int64, where a granularity is "span"."""
    cu_seqlens: Tensor | None
    """[B + 1] int32 or int64; None: every `length` rows are a sequence."""
    length: int
    measured: Tensor | None = None
    """[N] bool: the valid rows at which the drift is measured; the others may hold any log-probs.
    None: as the gate's `sample_every` says, see `measured_rows`."""
    spacing: Spacing | None = None
    """Of the logits; None: they are not rounded."""


class GateRule(NamedTuple):
    """How drifts become weights (arXiv 2606.24084)."""

    granularity: str = "token"
    block_size: int = 1
    """Rows of a block, also where the ratio of a `PositionRule` is that of a block."""
    aggregate: str = "mean"
    """Of the drifts of a block's measured rows; its absolute value is the block's drift."""
    tau: float = 0.0
    normalize: str = "off"
    """Unit mean over the "batch" or each "sequence", or "none"; "off": every weight is 1;
    "given": the caller gives the weights."""
    part: bool = False
    """The call is a part of its batch: with "batch" and tau > 0 an infinite drift counts as
    LARGEST_DRIFT, so that a part whose gates are all 0 has weights, which the rest of the batch
    makes 0."""
    sample_every: int = 1
    """The drift of a block is measured at its first valid row and at every such one after it."""


NO_GATE = GateRule(block_size=64)


class PositionRule(NamedTuple):
    """The loss of a position, from its target: a teacher's log-prob, or as the options say."""

    estimator: str = "ppo"
    """"given": the target is the position's loss itself."""
    low: float = 0.2
    high: float = 0.2
    """The ratio is held within [1 - low, 1 + high]."""
    dual: float = math.inf
    """For an advantage A < 0 the loss of "ppo" is at most -dual A; inf for no such bound."""
    advantage_low: float = -math.inf
    advantage_high: float = math.inf
    advantage: str = "old"
    """A = target - old, with "current" target - now (detached), with "given" the target."""
    ratio: str = "token"
    """Granularity of the ratio: exp of the mean of now - old over the unit's valid rows."""
    clamp: bool = True
    """For "k3": loss at most 10, log-ratio within +-20, and slope 0 beyond."""
    floor: float = -math.inf
    """Targets are at least this."""


GIVEN = PositionRule("given")


class ReduceRule(NamedTuple):
    """How position losses become one."""

    factor: float = 1.0
    denominator: str = "given"
    """What divides the sum beside: nothing, the valid "tokens", or the "sequences" with any."""
    token_mean: bool = False
    """Each sequence's sum is divided by its valid rows (+ 1e-8, as verl does)."""


class Weights(NamedTuple):
    """Of `weigh`."""

    weight: Tensor
    """[N], 0 on invalid rows."""
    drift: Tensor
    """[N], old - now; 0 on invalid rows and without old log-probs, NaN where not measured."""
    first: Tensor
    """[N] int32: first valid row of the row's block; -1 on invalid rows."""
    metrics: Tensor
    """In the order of METRICS."""
    totals: Tensor
    """[4] float64: peak, log_mean, tokens, size. The mean of the gates is exp(peak + log_mean),
    both 0 where no mean is asked for; size divides the loss where it is counted."""


class Finished(NamedTuple):
    """Of `finish`: the last three as `Weights` has them."""

    loss: Tensor
    """[], the sum of coefficient * token loss."""
    table: Tensor
    """[5, N]: weight, token loss, its slope in `now` (with "given" in the target), coefficient,
    drift."""
    first: Tensor
    metrics: Tensor
    totals: Tensor


Measure = Callable[[RowData, GateRule], Tensor]
"""A backend's `measured_rows`: [N] bool, the first valid row of each block and every
`sample_every`-th valid one after it. Log-probs are not read."""


def sampled(data: RowData, gate: GateRule, measured_rows: Measure) -> RowData:
    """The same with the rows at which the drift is measured, where these are not all."""
    return data._replace(measured=measured_rows(data, gate)) if samples(data, gate) else data


def samples(data: RowData, gate: GateRule) -> bool:
    """Whether it is still to be said at which rows the drift is measured: not at all of them."""
    return gate.sample_every > 1 and data.measured is None and data.old is not None


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_gate(gate: GateRule) -> None:
    """Raise ValueError for a choice that there is not."""
    check_choice("granularity", gate.granularity, GRANULARITIES)
    check_choice("aggregate", gate.aggregate, AGGREGATES)
    check_choice("normalize", gate.normalize, NORMALIZATIONS)


def check_position(position: PositionRule) -> None:
    """Raise ValueError for a choice that there is not."""
    check_choice("estimator", position.estimator, POSITION_LOSSES)
    check_choice("advantage", position.advantage, ADVANTAGE_KINDS)
    check_choice("ratio", position.ratio, GRANULARITIES)


def limit_of(direction: str, beta: float, choices: Collection[str]) -> str:
    """The direction, or the KL that it is at the ends of beta.

    At 0 and 1 "jsd" is, as in TRL, the forward KL(q || p) and the reverse KL(p || q), its limits as
    it is divided by beta or 1 - beta. "mixed" is beta forward + (1 - beta) reverse: at its ends the
    part of weight 0 is left out, even where it is infinite.
    """
    check_choice("direction", direction, choices)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1]; got {beta}")
    if direction not in ("jsd", "mixed") or 0 < beta < 1:
        return direction
    return "forward" if (beta == 0) == (direction == "jsd") else "reverse"
