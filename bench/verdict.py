"""Whose results hold: who computes something else has no time to be compared."""

from __future__ import annotations

from collections.abc import Iterable

from .internals import FACTOR
from .names import BASELINE, OURS
from .record import Result
from .truth import PEERS, wrong


def verdicts(results: Iterable[Result]) -> dict[int, str]:
    """What is wrong with each result that is wrong, by its id(); judged beside its case's eager."""
    results = list(results)
    eager = {r.of_case: r.errors for r in results if r.implementation == BASELINE}
    found = {}
    for r in results:
        factor = FACTOR if r.implementation.startswith(OURS) else PEERS
        reason = wrong(r.errors, eager.get(r.of_case, {}), r.size.torch_dtype, factor)
        if reason is not None:
            found[id(r)] = reason
    return found


def sound(results: Iterable[Result]) -> list[Result]:
    """Those that were timed, and are right."""
    results = list(results)
    bad = verdicts(results)
    return [r for r in results if r.seconds and id(r) not in bad]
