"""Cost growth: time of a token and extra memory against N, of runs that vary N by 16 and more.

Memory is what lies beyond the gradients returned: those grow with N for everybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .cases import Case
from .record import Result
from .verdict import sound

GROWN = 16  # a factor of rows from which the cost of a row is worth showing


class Growth(NamedTuple):
    """One work at several N, the rest of its size the same."""

    suite: str
    size: Case  # of the fewest rows
    rows: list[int]
    lines: dict[str, dict[int, Result]]  # implementation -> rows -> its latest result

    @property
    def factor(self) -> float:
        return self.rows[-1] / self.rows[0]


def found_in(results: Iterable[Result]) -> Iterator[Growth]:
    """Of every suite and device the size whose N spans most, if it spans enough."""
    sizes: dict[tuple[str, str], dict[Case, list[Result]]] = {}
    for r in sound(results):
        if r.host is None:
            one = sizes.setdefault((r.suite, r.machine["device"]), {})
            one.setdefault(r.size._replace(rows=0), []).append(r)
    for (suite, _), mine in sizes.items():
        spans = [_growth(suite, found) for found in mine.values()]
        widest = max(spans, key=lambda g: g.factor)
        if widest.factor >= GROWN:
            yield widest


def _growth(suite: str, results: list[Result]) -> Growth:
    lines: dict[str, dict[int, Result]] = {}
    for r in results:
        lines.setdefault(r.implementation, {})[r.size.rows] = r
    rows = sorted({r.size.rows for r in results})
    return Growth(suite, results[0].size._replace(rows=rows[0]), rows, lines)


def _shown(x: float) -> str:
    """Three digits, and whole thousands."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def token_time(result: Result) -> float:
    """Microseconds."""
    return 1e6 * result.median / result.size.rows


def beyond_gradients(result: Result) -> float:
    """Megabytes of extra memory beyond the gradients returned."""
    return ((result.extra_bytes or 0) - result.gradient_bytes) / 1e6


def cells(growth: Growth) -> Iterator[tuple[str, list[str]]]:
    """(implementation, "microseconds a token, extra megabytes" at every N)."""
    for name, line in growth.lines.items():
        each = [line.get(n) for n in growth.rows]
        yield (
            name,
            [
                "-" if r is None else f"{_shown(token_time(r))}, {_shown(beyond_gradients(r))}"
                for r in each
            ],
        )


def markdown(results: Iterable[Result]) -> Iterator[str]:
    """Tables for the README."""
    for growth in found_in(results):
        machine = next(r.machine for line in growth.lines.values() for r in line.values())
        size = str(growth.size).replace(f"{growth.size.rows} x", "N x")
        where = f"{machine['device']}, {machine['date']}, commit {machine['commit']}"
        yield (
            f"Growth of the cost with N, `{growth.suite}` ({size}; {where}): microseconds a token, "
            "extra MB beyond the gradients returned."
        )
        yield ""
        yield "| N | " + " | ".join(f"{n:,}" for n in growth.rows) + " |"
        yield "|---" + "|---:" * len(growth.rows) + "|"
        yield from (f"| {name} | {' | '.join(row)} |" for name, row in cells(growth))
        yield ""
