"""What can be chosen, and what follows from each choice: the one list of every option's names.

Checks, reference, kernels, fuzzer, tests, command line and integrations read these; nobody retypes
them. A name that is listed here and that a backend does not handle raises there.
"""

from typing import Literal, NamedTuple, get_args

Granularity = Literal["token", "block", "span", "sequence"]
Aggregate = Literal["mean", "mean_abs", "rms", "max_abs"]
Normalize = Literal["batch", "sequence", "none"]
Direction = Literal["reverse", "forward", "jsd", "mixed"]
FullDirection = Literal["reverse", "forward", "jsd"]
Support = Literal["renormalized", "truncated", "tail"]
Advantage = Literal["old", "current"]
Backend = Literal["auto", "triton", "native", "torch", "reference"]

GRANULARITIES: tuple[str, ...] = get_args(Granularity)
AGGREGATES: tuple[str, ...] = get_args(Aggregate)
NORMALIZE: tuple[str, ...] = get_args(Normalize)
DIRECTIONS: tuple[str, ...] = get_args(Direction)
FULL_DIRECTIONS: tuple[str, ...] = get_args(FullDirection)
SUPPORTS: tuple[str, ...] = get_args(Support)
ADVANTAGES: tuple[str, ...] = get_args(Advantage)
BACKENDS: tuple[str, ...] = get_args(Backend)


class Estimator(NamedTuple):
    """What a sampled-token loss is made of."""

    ratio: bool
    """Of the ratio pi / pi_old and an advantage; else an estimate of the KL to the teacher."""
    clipped: bool = False
    """Whether `Clip.low` and `Clip.high` hold the ratio."""


ESTIMATORS: dict[str, Estimator] = {
    "ppo": Estimator(ratio=True, clipped=True),
    "importance": Estimator(ratio=True),
    "cispo": Estimator(ratio=True, clipped=True),
    "k1": Estimator(ratio=False),
    "k2": Estimator(ratio=False),
    "k3": Estimator(ratio=False),
}


class Mode(NamedTuple):
    """How a reduction counts."""

    denominator: str
    """What divides the sum: "tokens" or "sequences" of the batch, or "given" (nothing)."""
    token_mean: bool = False
    """Each sequence's sum is divided by its valid tokens first."""
    by_length: bool = False
    """The sum is divided by `loss_scale_factor` too."""


REDUCTIONS: dict[str, Mode] = {
    "token-mean": Mode("tokens"),
    "token-sum": Mode("given"),
    "seq-mean-token-sum": Mode("sequences"),
    "seq-mean-token-sum-norm": Mode("sequences", by_length=True),
    "seq-mean-token-mean": Mode("sequences", token_mean=True),
    "none": Mode("given"),
}
