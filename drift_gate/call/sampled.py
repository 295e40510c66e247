"""The options of the sampled-token losses, checked: clips, advantages, ratios."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..choices import ADVANTAGES, ESTIMATORS, GRANULARITIES
from ..options import Clip, as_clip
from ..passes.rules import PositionRule
from . import arguments
from .rows import Student

RATIOS = tuple(GRANULARITIES)


def position_of(*options: Any) -> PositionRule:
    """`position_rule`, remembered: it depends on options alone."""
    if not torch.compiler.is_compiling():
        try:
            return _remembered(*options)
        except TypeError:  # not hashable: what is wrong is said below
            pass
    return position_rule(*options)


def position_rule(
    estimator: str,
    clip: Clip,
    advantage: str,
    ratio: str,
    teacher_log_prob_min: float | None,
    given: bool,
) -> PositionRule:
    """The position loss as row functions take it; `given`: advantages are."""
    arguments.option("estimator", estimator, ESTIMATORS)
    arguments.option("advantage", advantage, ADVANTAGES)
    arguments.option("ratio", ratio, RATIOS)
    as_clip(clip)
    arguments.number("clip.low", clip.low, 0, inclusive=True)
    arguments.number("clip.high", clip.high, 0, inclusive=True)
    dual = math.inf
    if clip.dual is not None:
        arguments.number("clip.dual", clip.dual, 1)
        dual = float(clip.dual)
    low, high = _bounds(clip.advantage)
    floor = -math.inf
    if teacher_log_prob_min is not None:
        if given:
            raise ValueError(
                "teacher_log_prob_min goes with teacher_log_probs; got advantages as well"
            )
        arguments.number("teacher_log_prob_min", teacher_log_prob_min, -math.inf)
        floor = float(teacher_log_prob_min)
    return PositionRule(
        estimator, float(clip.low), float(clip.high), dual, low, high,
        "given" if given else advantage, ratio, bool(clip.kl), floor,
    )  # fmt: skip


_remembered = functools.lru_cache(maxsize=256)(position_rule)


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


def target_of(
    student: Student,
    estimator: str,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    advantages: Tensor | None,
) -> Tensor:
    """The teacher's log-probs, or the advantages, as [N]."""
    kind = ESTIMATORS[estimator]
    shape, device, dtype = student.shape, student.device, student.dtype
    if advantages is not None:
        if not kind.ratio:
            names = ", ".join(name for name, each in ESTIMATORS.items() if each.ratio)
            raise ValueError(f"advantages go with the estimators {names}; got {estimator!r}")
        return arguments.row_data("advantages", advantages, shape, device, "labels", dtype)
    if teacher_log_probs is None:
        raise ValueError(
            "teacher_log_probs must be a tensor where no advantages are given; got None"
        )
    return arguments.row_data(
        "teacher_log_probs", teacher_log_probs, shape, device, "labels", dtype
    )


def check_cut(position: PositionRule) -> None:
    """Raise where a ratio is taken over more than a token of sequences that are cut over ranks."""
    if position.ratio != "token":
        raise ValueError(
            "ratio must be 'token' where sequences are cut over ranks (position_ids); got "
            f"{position.ratio!r}"
        )
