"""Intervals of means over training runs (a seed each) and the problems they are tested on."""

from __future__ import annotations

import numpy as np

from .evaluation import Floats

RESAMPLES = 2000


class Bootstrap:
    """Bootstrap over two levels at once: seeds are drawn, and the problems of each benchmark.

    All seeds are tested on the same problems, so a resample draws problems once for all its seeds,
    and the deviations of both draws add up (noise that is neither of a seed nor of a problem counts
    in both: where it is most of it, intervals are too wide, never too narrow). Of n seeds n - 1 are
    drawn, which makes the variance of their mean the unbiased one (Rao and Wu 1988), and so for
    problems. How far the mean of few seeds is off is itself known from few: its deviation is
    multiplied by sqrt((n - 1) / chi2) with chi2 of n - 1 degrees of freedom, as in Student's t.

    The draws depend on sizes alone: intervals of differences are of paired differences.
    """

    def __init__(self, seed: int = 0, resamples: int = RESAMPLES) -> None:
        self.seed, self.resamples = seed, resamples

    def interval(self, values: dict[str, Floats]) -> tuple[float, float, float]:
        """(mean, lower, upper) at 95%, of values [seeds, problems] by benchmark.

        Of one seed it is an interval over problems: what the same run would show on others.
        """
        rng = np.random.default_rng(self.seed)
        tables = list(values.values())
        mean = float(np.mean([table.mean() for table in tables]))
        of_seeds = np.mean([table.mean(1) for table in tables], axis=0)
        seeds = len(of_seeds)
        deviation = self._shares(rng, seeds) @ (of_seeds - mean)
        if seeds > 1:
            deviation *= np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, self.resamples))
        for table in tables:
            of_problems = table.mean(0) - table.mean()
            deviation += self._shares(rng, len(of_problems)) @ of_problems / len(tables)
        low, high = np.quantile(mean + deviation, [0.025, 0.975])
        return mean, float(low), float(high)

    def _shares(self, rng: np.random.Generator, count: int) -> Floats:
        """How much each of `count` weighs in every resample, [resamples, count]; rows sum to 1."""
        draws = max(1, count - 1)
        return rng.multinomial(draws, np.full(count, 1 / count), self.resamples) / draws
