"""Intervals of `drift-gate distill`: how often they cover a gain that is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from drift_gate.bench.distill import intervals, report

Chances = dict[str, npt.NDArray[np.float64]]  # [2, seeds, problems] by benchmark: plain, gated
SAMPLES = 16
LEVELS = {"easy": 0.55, "hard": 0.3}  # mean chance that a response is right
STUDIES = 200
OFF = 3 * (0.95 * 0.05 / STUDIES) ** 0.5  # three standard errors of a coverage of 95%


def chances(rng: np.random.Generator, seeds: int, problems: int, unlike: float) -> Chances:
    """Runs differ by up to `unlike` either way, problems by 0.1; the gate adds 0.05, to some
    problems nothing and to some 0.1. No chance leaves [0, 1]."""

    def within(most: float, *size: int) -> npt.NDArray[np.float64]:
        return rng.uniform(-most, most, size)

    runs = within(unlike, 2, seeds, 1)
    found = {}
    for name, level in LEVELS.items():
        plain = level + within(0.1, 1, problems)
        found[name] = runs + np.stack([plain, plain + 0.05 + within(0.05, 1, problems)])
    return found


def true_gains(unlike: float) -> dict[str, float]:
    """Over half a million seeds, each with a problem of its own. The mean of the unbiased pass@8
    of responses that are right with chance p is 1 - (1 - p)^8."""
    rng, gains = np.random.default_rng(1), []
    for _ in range(50):
        drawn = chances(rng, 100, 100, unlike)
        missed = [(1 - chance) ** 8 for chance in drawn.values()]
        gains.append(np.mean([(plain - gated).mean() for plain, gated in missed]))
    return {"accuracy": 0.05, "pass@8": float(np.mean(gains))}


def results(rng: np.random.Generator, drawn: Chances) -> list[list[dict[str, Any]]]:
    """What the evaluations of both variants leave, one result a seed."""
    counts = {name: rng.binomial(SAMPLES, chance) for name, chance in drawn.items()}
    seeds = range(counts["easy"].shape[1])
    return [
        [
            {"right": {name: table[side, i].tolist() for name, table in counts.items()}}
            for i in seeds
        ]
        for side in (0, 1)
    ]


# Runs that differ much, as in unstable training, and hardly, where problems decide the width.
@pytest.mark.parametrize("unlike", [0.15, 0.01])
@pytest.mark.parametrize("seeds", [2, 5])
def test_intervals_of_gains_cover_a_known_gain(seeds: int, unlike: float) -> None:
    truth = true_gains(unlike)
    rng = np.random.default_rng(seeds)
    covered = dict.fromkeys([*truth, "problems alone"], 0)
    for _ in range(STUDIES):
        plain, gated = results(rng, chances(rng, seeds, 24, unlike))
        gains = report.difference_of(gated, plain, SAMPLES)
        for metric, value in truth.items():
            low, high = gains[metric]["interval"]
            covered[metric] += low < value < high
        ours, theirs = (report.values_of(side, "accuracy", SAMPLES) for side in (gated, plain))
        pooled = {name: (ours[name] - theirs[name]).mean(0, keepdims=True) for name in ours}
        _, low, high = intervals.Bootstrap().interval(pooled)
        covered["problems alone"] += low < truth["accuracy"] < high
    shares = {name: count / STUDIES for name, count in covered.items()}
    assert min(shares[metric] for metric in truth) > 0.95 - OFF, shares
    if unlike > 0.1:  # else noise counts twice, and intervals are too wide
        assert max(shares[metric] for metric in truth) < 0.95 + OFF, shares
        assert shares["problems alone"] < 0.5, shares


def test_seeds_that_agree_leave_the_interval_of_the_problems() -> None:
    one = {name: np.random.default_rng(0).random((1, 40)) for name in LEVELS}
    mean, low, high = intervals.Bootstrap().interval(one)
    again = intervals.Bootstrap().interval({name: np.tile(x, (5, 1)) for name, x in one.items()})
    assert again == pytest.approx((mean, low, high), abs=0.05 * (high - low))


def test_shares_stay_within_0_and_1() -> None:
    """Two seeds far apart have an interval wider than all that there is."""
    right = {"easy": [[0] * 8, [16] * 8]}
    both = [{"right": {"easy": counts}} for counts in right["easy"]]
    assert report.figures_of(both, SAMPLES)["accuracy"]["interval"] == [0.0, 1.0]


def test_one_seed_has_a_gain_without_an_interval() -> None:
    plain, gated = results(rng := np.random.default_rng(0), chances(rng, 1, 24, 0.1))
    gain = report.difference_of(gated, plain, SAMPLES)["accuracy"]
    assert gain["interval"] is None and gain["mean"] != 0
