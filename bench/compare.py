"""Two files of results, side by side: `drift-gate bench --compare A B`."""

from __future__ import annotations

from typing import Any, NamedTuple

from .record import Result


class Change(NamedTuple):
    """One measurement that both files have: B over A."""

    result: Result  # of B
    time: float
    ratio: float | None  # of the ratios to the baseline: what another speed of the machine leaves
    memory: float | None
    verdict: str  # "faster", "slower", or "" where the quartiles overlap


def changes(before: list[Result], after: list[Result]) -> list[Change]:
    """Every measurement that both have; the last of each, where one was repeated."""
    old: dict[tuple[Any, ...], Result] = {r.key: r for r in before if r.seconds}
    new = {r.key: r for r in after if r.seconds}
    return [_change(old[key], b) for key, b in new.items() if key in old]


def _change(a: Result, b: Result) -> Change:
    relative = None
    if a.ratio_quartiles and b.ratio_quartiles:
        relative = b.ratio_quartiles[1] / a.ratio_quartiles[1]
    memory = b.extra_bytes / a.extra_bytes if a.extra_bytes and b.extra_bytes is not None else None
    (a_low, a_median, a_high), (b_low, b_median, b_high) = a.quartiles, b.quartiles
    verdict = "faster" if b_high < a_low else "slower" if b_low > a_high else ""
    return Change(b, b_median / a_median, relative, memory, verdict)


def unmatched(before: list[Result], after: list[Result]) -> tuple[int, int]:
    """How many measurements only A has, and only B."""
    a, b = ({r.key for r in results if r.seconds} for results in (before, after))
    return len(a - b), len(b - a)
