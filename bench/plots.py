"""Pictures of results: time against N, memory against N, growth, and a roofline."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from . import growth, step_report
from .measure import slug
from .record import Result
from .verdict import sound

# Okabe and Ito's palette, told apart by the colour-blind; markers and dashes tell apart without it.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#8C510A", "#999999")
MARKERS = "oD^vP*X<>hp"
FIXED = {  # implementation -> colour, marker, line
    "eager": ("#000000", "s", "-"),
    "torch.compile of eager": ("#000000", "x", "--"),
    "drift_gate": ("#D55E00", "o", "-"),
    "drift_gate, in place": ("#D55E00", "^", "--"),
}
LABEL = 9  # points
Style = tuple[str, str, str]
Group = dict[str, list[Result]]  # implementation -> results by rows


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The same look for an implementation in every picture of a suite."""
    others = [name for name in names if name not in FIXED]
    looks = zip(
        itertools.cycle(COLOURS), itertools.cycle(MARKERS), itertools.cycle(("-", "--", ":"))
    )
    return FIXED | dict(zip(others, looks, strict=False))


def draw(results: list[Result], path: Path, end: float = math.inf) -> list[Path]:
    """Draw what the results support, beside `path`; the files written.

    No suite is begun after `end`, of time.monotonic().
    """
    timed = [r for r in sound(results) if r.host is None and r.step is None]
    written = []
    for steps in step_report.found_in(results):
        name = f"{path.stem}_train-step_{slug(steps.model)}.png"
        written.append(save(step_report.picture(steps), path.with_name(name)))
    for suite in dict.fromkeys(r.suite for r in timed):
        if time.monotonic() > end:
            break
        mine = [r for r in timed if r.suite == suite]
        look, groups = styles(dict.fromkeys(r.implementation for r in mine)), by_work(mine)
        figures = {
            "time": panels(
                [Panel(title, group, milliseconds, "ms", floor) for title, group in groups.items()],
                look, suite,
            ),
            "memory": panels(
                [Panel(title, group, megabytes, "extra MB") for title, group in groups.items()],
                look, suite,
            ),
            "roofline": roofline(mine, look, suite),
        }  # fmt: skip
        for one in growth.found_in(mine):
            title = heading(one.size)
            lines = {name: [line[n] for n in sorted(line)] for name, line in one.lines.items()}
            grown = [
                Panel(title, lines, growth.token_time, "microseconds a token"),
                Panel(title, lines, growth.beyond_gradients, "extra MB beyond the gradients"),
            ]
            figures["growth"] = panels(grown, look, suite, share=False)
        for kind, figure in figures.items():
            written.append(save(figure, path.with_name(f"{path.stem}_{slug(suite)}_{kind}.png")))
    return written


def save(figure: Figure, path: Path) -> Path:
    """Written alike from the same results, whatever the day."""
    with matplotlib.rc_context({"svg.hashsalt": "drift_gate"}):
        nameless = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=130, bbox_inches="tight", metadata=nameless)
    pyplot.close(figure)
    return path


def milliseconds(result: Result) -> float:
    return 1e3 * result.median


def megabytes(result: Result) -> float:
    return (result.extra_bytes or 0) / 1e6


def floor(result: Result) -> float:
    """Milliseconds that the bytes, or the products, take at the rates measured beside them."""
    seconds = result.bytes_must_move / result.copy_bytes_per_s
    if result.gemm_flops_per_s:
        seconds = max(seconds, result.flops / result.gemm_flops_per_s)
    return 1e3 * seconds


def by_work(results: list[Result]) -> dict[str, Group]:
    """For each work, the results along the rows: of the sizes where most rows were measured."""
    found = {}
    for what in dict.fromkeys(r.size.what for r in results):
        mine = [r for r in results if r.size.what == what]
        rest = {}
        for r in mine:
            rest.setdefault(r.size._replace(rows=0), set()).add(r.size.rows)
        size = max(rest, key=lambda s: len(rest[s]))
        group: Group = {}
        for r in sorted(mine, key=lambda r: r.size.rows):
            if r.size._replace(rows=0) == size:
                group.setdefault(r.implementation, []).append(r)
        found[heading(size)] = group
    return found


def heading(size: Any) -> str:
    parts = [size.what]
    parts += [f"V = {size.vocab:,}"] if size.vocab else []
    parts += [f"H = {size.hidden:,}"] if size.hidden else []
    parts += [f"K = {size.k}"] if size.k else []
    return f"{parts[0]}\n" + ", ".join([*parts[1:], size.dtype, size.kind])


class Panel(NamedTuple):
    """What one panel shows against the rows."""

    title: str
    group: Group
    value: Callable[[Result], float]
    unit: str
    bound: Callable[[Result], float] | None = None


def panels(shown: list[Panel], look: dict[str, Style], suite: str, *, share: bool = True) -> Figure:
    """Panels side by side, with one scale where they `share` a unit; the legend right of all."""
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(3.2 + 3.9 * len(shown), 4.4), squeeze=False, sharey=share
    )
    for i, (axis, panel) in enumerate(zip(axes[0], shown, strict=True)):
        lines(axis, panel, look)
        axis.set_title(panel.title, fontsize=LABEL)
        axis.set_xlabel("N, rows")
        if i == 0 or not share:
            axis.set_ylabel(panel.unit)
        plain_log(axis, sorted({r.size.rows for line in panel.group.values() for r in line}))
    machine = next(iter(shown[0].group.values()))[0].machine
    figure.suptitle(f"{suite} on {machine['device']}, torch {machine['torch']}", fontsize=LABEL + 2)
    figure.tight_layout()
    legend(figure, axes[0])
    return figure


def lines(axis: Axes, panel: Panel, look: dict[str, Style]) -> None:
    """A line for each implementation, ours in front; and the bound."""
    for name, line in panel.group.items():
        colour, marker, dashes = look[name]
        ours = name.startswith("drift_gate")
        axis.plot(
            [r.size.rows for r in line], [max(panel.value(r), 1e-6) for r in line], dashes,
            color=colour, marker=marker, label=name, linewidth=2.2 if ours else 1.2,
            markersize=6, markerfacecolor=None if ours else "none", zorder=3 if ours else 2,
        )  # fmt: skip
    if panel.bound is not None:
        line = max(panel.group.values(), key=len)
        axis.plot(
            [r.size.rows for r in line], [panel.bound(r) for r in line], ":", color="#555555",
            marker="_", label="floor: bytes at copy rate" + _gemm(line), zorder=1,
        )  # fmt: skip


def _gemm(line: list[Result]) -> str:
    return " or products at GEMM rate" if line[0].gemm_flops_per_s else ""


def legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """One entry a name, outside the data."""
    entries = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5),
        fontsize=LABEL, frameon=False,
    )  # fmt: skip


def plain(x: float, _: object = None) -> str:
    """1,000 and 0.01, never 10^3."""
    return f"{x:,.0f}" if x >= 1 else f"{x:.6f}".rstrip("0").rstrip(".")


def plain_log(axis: Axes, rows: list[int] | None = None) -> None:
    """Both axes logarithmic, with plain numbers; ticks at the rows where they are known."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    if rows is not None:
        step = -(-len(rows) // 6)
        axis.set_xticks(rows[::step])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="x", rotation=30)
        axis.margins(x=0.08)
    low, high = axis.get_ylim()
    if high / low < 10:  # a flat line should look flat
        middle = (low * high) ** 0.5
        low, high = middle / 10**0.5, middle * 10**0.5
        axis.set_ylim(low, high)
    if high / low < 300:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(FuncFormatter(plain))
        one.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=LABEL)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)


def roofline(results: list[Result], look: dict[str, Style], suite: str) -> Figure:
    """Operations a second against operations a byte: a panel for each work.

    All implementations of a work have its intensity; they stand side by side to be seen. Of each
    dtype, the largest size is shown.
    """
    works: dict[str, dict[str, list[Result]]] = {}
    for r in results:
        works.setdefault(r.size.what, {}).setdefault(r.size.dtype, []).append(r)
    figure, axes = pyplot.subplots(
        1, len(works), figsize=(3.2 + 3.9 * len(works), 4.4), squeeze=False, sharey=True
    )
    for axis, (what, dtypes) in zip(axes[0], works.items(), strict=True):
        xs = [_points(axis, mine, look) for mine in dtypes.values()]
        roofs(axis, results, min(xs) / 3, max(xs) * 3)
        axis.set_title(f"{what}\n{', '.join(dtypes)}", fontsize=LABEL)
        axis.set_xlabel("operations a byte that must move")
        plain_log(axis)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0][0].set_ylabel("billion operations a second")
    machine = results[0].machine
    title = f"{suite}: roofline of {machine['device']}, torch {machine['torch']}"
    figure.suptitle(title, fontsize=LABEL + 2)
    figure.tight_layout()
    legend(figure, axes[0])
    return figure


def _points(axis: Axes, results: list[Result], look: dict[str, Style]) -> float:
    """Implementations of the largest size, side by side; their intensity."""
    largest = max((r.size for r in results), key=lambda s: s.rows * max(s.vocab, 1))
    shown = [r for r in results if r.size == largest]
    x = shown[0].flops / shown[0].bytes_must_move
    for i, r in enumerate(shown):
        colour, marker, _ = look[r.implementation]
        side = 1 + 0.05 * (i - (len(shown) - 1) / 2)
        axis.plot(
            x * side, r.flops / r.median / 1e9, marker, color=colour, label=r.implementation,
            markersize=7, linestyle="none", zorder=3,
        )  # fmt: skip
    return x


def roofs(axis: Axes, results: list[Result], low: float, high: float) -> None:
    """What copying, and multiplying, allow on this device: the medians of the run."""
    copy = sorted(r.copy_bytes_per_s for r in results)[len(results) // 2]
    ends = [low, high]
    axis.plot(
        ends, [copy * x / 1e9 for x in ends], "-", color="#555555", linewidth=1,
        label=f"copy: {copy / 1e9:,.1f} GB/s",
    )  # fmt: skip
    rates = {(r.size.dtype, r.gemm_flops_per_s) for r in results if r.gemm_flops_per_s}
    for dtype in sorted({dtype for dtype, _ in rates}):
        rate = max(rate for name, rate in rates if name == dtype)
        axis.plot(
            ends, [rate / 1e9] * 2, "--", color="#555555", linewidth=1,
            label=f"{dtype} GEMM: {rate / 1e9:,.0f} Gop/s",
        )  # fmt: skip
