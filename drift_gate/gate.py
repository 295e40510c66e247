"""Configuration of the drift gate."""

import dataclasses
import math
import numbers
from typing import Literal, get_args

Granularity = Literal["token", "block", "span", "sequence"]
Aggregate = Literal["mean", "mean_abs", "rms", "max_abs"]
Normalize = Literal["batch", "sequence", "none"]


@dataclasses.dataclass(frozen=True)
class DriftGate:
    """Blockwise policy-drift gate (Zheng and Jiang, arXiv 2606.24084).

    With the drift `d = old_log_prob - log_prob` of each sampled token, a block's gate is
    `g = exp(-tau * |aggregate of d over the block's valid tokens|)`, and every token weighs
    `w = g / mean(g)`: blocks in which the student moved most count least, and the weights have
    unit mean over the valid tokens.

    Args:
        granularity: what a block is. "block": `block_size` consecutive positions, counted from
            the sequence's first valid one (the last block may be partial; masked positions keep
            their place in the count but enter no mean). "span": the positions of a sequence that
            bear the same id in `span_ids`. "token": each position. "sequence": all of it.
        block_size: positions of a "block" (paper: 64).
        tau: inverse temperature of the gate, at least 0 (paper: 1). 0 makes every weight 1.
        aggregate: "mean" (paper; opposite drifts in a block cancel), "mean_abs", "rms", "max_abs".
        normalize: over what the weights have unit mean: the whole "batch" of the call (paper), each
            "sequence", or "none" for the raw gates.
        sample_every: the drift of a block is measured at its first valid position and every
            `sample_every`-th valid one after it. The aggregate is that of the measured drifts;
            every valid position still weighs what its block does, and counts in the unit mean.
            Elsewhere `drift` is NaN, the gate reads no log-prob, and metrics of the drift
            (`drift_abs`, `drift_signed`, `ppo_kl`) are means over the measured positions. Losses
            over lists with the renormalised support then need a logsumexp at those alone: see
            `topk_loss`. A "token" is a block of its own, and always measured. The mean of few
            drifts of either sign is a noisy one: at 8 of 64 positions the weights of the small
            models of `drift-gate distill` correlate by 0.2 with those of all (0.8 at best) where
            drifts are 0.01 nats and less; `--extra` tells it for a run.

    Raises:
        ValueError, TypeError: an option is unknown, `block_size` or `sample_every` is not a
            positive integer, or `tau` is negative or not finite. NumPy's scalars are numbers, bools
            are not.
    """

    granularity: Granularity = "block"
    block_size: int = 64
    tau: float = 1.0
    aggregate: Aggregate = "mean"
    normalize: Normalize = "batch"
    sample_every: int = 1

    def __post_init__(self) -> None:
        for name, options in _OPTIONS.items():
            value = getattr(self, name)
            if value not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")
        for name in ("block_size", "sample_every"):
            value = getattr(self, name)
            if not _is(numbers.Integral, value):
                raise TypeError(f"{name} must be an int; got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
            object.__setattr__(self, name, int(value))
        if not _is(numbers.Real, self.tau):
            raise TypeError(f"tau must be a number; got {self.tau!r}")
        if not (0 <= self.tau < math.inf):
            raise ValueError(f"tau must be finite and at least 0; got {self.tau}")
        object.__setattr__(self, "tau", float(self.tau))


def _is(kind: type, value: object) -> bool:
    """Whether a value is a number of this kind; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


_OPTIONS: dict[str, tuple[str, ...]] = {
    "granularity": get_args(Granularity),
    "aggregate": get_args(Aggregate),
    "normalize": get_args(Normalize),
}
