"""The options of the sampled-token losses, checked: clips, advantages, ratios."""

import math

from torch import Tensor

from ..choices import ADVANTAGES, ESTIMATORS, GRANULARITIES
from ..options import Clip, as_clip
from ..passes.rules import PositionRule
from . import arguments
from .rows import Student

RATIOS = tuple(GRANULARITIES)


def position_of(
    estimator: str,
    clip: Clip,
    advantage: str,
    ratio: str,
    teacher_log_prob_min: float | None,
    given: bool,
) -> PositionRule:
    """The position loss as row functions take it; `given`: advantages are."""
    if not isinstance(clip, Clip):
        as_clip(clip)
    return _rule(
        estimator, clip.low, clip.high, clip.dual, clip.advantage, clip.kl, advantage, ratio,
        teacher_log_prob_min, given,
    )  # fmt: skip


@arguments.remembered
def _rule(
    estimator: str,
    low: float,
    high: float,
    dual: float | None,
    bounds: float | tuple[float, float] | None,
    kl: bool,
    advantage: str,
    ratio: str,
    teacher_log_prob_min: float | None,
    given: bool,
) -> PositionRule:
    arguments.option("estimator", estimator, ESTIMATORS)
    arguments.option("advantage", advantage, ADVANTAGES)
    arguments.option("ratio", ratio, RATIOS)
    arguments.number("clip.low", low, 0, inclusive=True)
    arguments.number("clip.high", high, 0, inclusive=True)
    if dual is not None:
        arguments.number("clip.dual", dual, 1)
    lowest, highest = _bounds(bounds)
    floor = -math.inf
    if teacher_log_prob_min is not None:
        if given:
            raise ValueError(
                "teacher_log_prob_min goes with teacher_log_probs; got advantages as well"
            )
        arguments.number("teacher_log_prob_min", teacher_log_prob_min, -math.inf)
        floor = float(teacher_log_prob_min)
    return PositionRule(
        estimator, float(low), float(high), math.inf if dual is None else float(dual), lowest,
        highest, "given" if given else advantage, ratio, bool(kl), floor,
    )  # fmt: skip


def _bounds(advantage: float | tuple[float, float] | None) -> tuple[float, float]:
    """Of the advantage, from `Clip.advantage`."""
    if advantage is None:
        return -math.inf, math.inf
    if isinstance(advantage, tuple):
        if len(advantage) != 2:
            raise ValueError(
                f"clip.advantage must be a number or two; got {len(advantage)} of them"
            )
        for bound in advantage:
            arguments.number("clip.advantage", bound, -math.inf)
        low, high = (float(bound) for bound in advantage)
        if low > high:
            raise ValueError(f"clip.advantage must be (low, high), low <= high; got {advantage}")
        return low, high
    arguments.number("clip.advantage", advantage, 0)
    return -float(advantage), float(advantage)


def take_sampled(
    student: Student,
    estimator: str,
    clip: Clip,
    advantage: str,
    ratio: str,
    teacher_log_prob_min: float | None,
    teacher_log_probs: Tensor | None,
    advantages: Tensor | None,
    cut: bool,
) -> tuple[PositionRule, Tensor]:
    """The position loss, and its target [N]: the teacher's log-probs, or the advantages.

    cut: sequences lie on several ranks.
    """
    given = advantages is not None
    position = position_of(estimator, clip, advantage, ratio, teacher_log_prob_min, given)
    if cut and ratio != "token":
        raise ValueError(
            "ratio must be 'token' where sequences are cut over ranks (position_ids); got "
            f"{ratio!r}"
        )
    shape, device, dtype = student.shape, student.device, student.dtype
    if advantages is not None:
        if not ESTIMATORS[estimator].ratio:
            names = ", ".join(name for name, each in ESTIMATORS.items() if each.ratio)
            raise ValueError(f"advantages go with the estimators {names}; got {estimator!r}")
        name, target = "advantages", advantages
    elif teacher_log_probs is not None:
        name, target = "teacher_log_probs", teacher_log_probs
    else:
        raise ValueError(
            "teacher_log_probs must be a tensor where no advantages are given; got None"
        )
    return position, arguments.row_data(name, target, shape, device, "labels", dtype)
