"""Benchmarks, and pass@k on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import problems
from .problems import Grader, Problem
from .settings import Settings
from .training import Sampler, seeded

BATCH = 512  # responses written at a time
POOL = 240  # training problems of each level
Floats = npt.NDArray[np.float64]


def benchmarks_of(settings: Settings) -> dict[str, list[Problem]]:
    """Held-out problems by name: the four levels, or the files given."""
    if settings.eval:
        return {Path(name).stem: problems.read(Path(name)) for name in settings.eval}
    return {
        name: problems.draw(level, settings.problems, 0, stream=problems.HELD_OUT)
        for level, name in enumerate(problems.LEVELS)
    }


def training_problems(settings: Settings) -> list[Problem]:
    """The four levels mixed, or those of a file."""
    if settings.train:
        return problems.read(Path(settings.train))
    return [
        problem
        for level in range(len(problems.LEVELS))
        for problem in problems.draw(level, POOL, 0, stream=problems.TRAIN)
    ]


def evaluate(
    sampler: Sampler,
    benchmarks: dict[str, list[Problem]],
    *,
    seed: int,
    model: Any = None,
    between: Callable[[], None] = lambda: None,
) -> dict[str, list[int]]:
    """How many of each problem's responses are right, by benchmark; `between` runs after a batch.

    The seed fixes the random numbers, the same for all models.
    """
    grader, found = Grader(), {}
    samples = sampler.settings.evaluation_samples
    for i, (name, members) in enumerate(benchmarks.items()):
        repeated = [problem for problem in members for _ in range(samples)]
        right: list[bool] = []
        for start in range(0, len(repeated), BATCH):
            part = repeated[start : start + BATCH]
            _, (tokens, _) = sampler(part, seeded(seed, i, start, 2), model)
            right += grader.all(part, sampler.texts(tokens))
            between()
        found[name] = np.array(right).reshape(-1, samples).sum(1).tolist()
    return found


def pass_at(k: int, right: npt.ArrayLike, samples: int) -> Floats:
    """Unbiased pass@k of problems with `right` of `samples` responses: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: fewer than k samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be between 1 and the {samples} samples; got {k}")
    wrong = samples - np.asarray(right, dtype=np.float64)
    none = np.ones_like(wrong)
    for i in range(k):
        none *= np.maximum(wrong - i, 0) / (samples - i)
    return 1 - none
