"""Pictures of the study of gates where the policy drifts, from bench/results/drift_study.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..plots import COLOURS
from .report import METRICS

Found = dict[str, Any]
FIRST, SECOND = COLOURS[0], "#D55E00"
LOSS_COLOURS = {"OPD": FIRST, "LSM": SECOND}
TOGETHER = 8  # positions whose weights are shown as one mean
FEW = 3  # rollout batches that a point of a curve is the mean of
GAIN = "Gain in pass@8 of each comparison against the mean drift"


def shown(found: Found, part: int) -> list[dict[str, Any]]:
    """The comparisons of a part of the plan that have an interval: one seed has none."""
    return [
        row
        for row in found["comparisons"]
        if row["part"] == part and row["gain"][METRICS[0]]["interval"]
    ]


def drawn(found: Found) -> Iterator[tuple[str, str, Figure]]:
    """Name, what it shows in words, and figure, of each picture that the results suffice for."""
    if not (rows := shown(found, 2)):
        return
    yield "gain", GAIN, gains(rows)
    alt = "Share of prompts solved over training, with and without a gate"
    yield "training", alt, training(found)
    alt = "Gate weights by position and epoch in the run that fell furthest"
    yield "weights", alt, weights(found)
    if more := shown(found, 3):
        yield "others", "Gain in pass@8 of other gates and of other remedies", others(more)


def gains(rows: list[dict[str, Any]]) -> Figure:
    """A point and its interval for each gate beside none, at the drift that none leaves."""
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    places = _apart([(row["against"], row["drift"]) for row in rows])
    for loss, colour in LOSS_COLOURS.items():
        for main in (True, False):
            mine = [
                (place, row)
                for place, row in zip(places, rows, strict=True)
                if row["against"] == loss and row["main"] is main
            ]
            if not mine:
                continue
            middle, around = _gains_of(row for _, row in mine)
            axes.errorbar(
                [place for place, _ in mine], middle, around,
                fmt="o" if main else ".", color=colour, capsize=3, alpha=1 if main else 0.45,
                label=f"{loss}, {'Block64' if main else 'NewlineSpan'}",
            )  # fmt: skip
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("mean |old - new| log-prob in the last epoch, without a gate; nats")
    axes.set_ylabel("gain of the gate in pass@8")
    axes.set_title("Gated minus ungated, 95% intervals over seeds and problems", fontsize=10)
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=4)
    return _plain(figure)


def _gains_of(rows: Iterable[dict[str, Any]]) -> tuple[Any, Any]:
    """Means [rows], and how far their intervals reach below and above, [2, rows]."""
    gains = [row["gain"][METRICS[0]] for row in rows]
    middle = np.array([gain["mean"] for gain in gains])
    low, high = np.array([gain["interval"] for gain in gains]).T
    return middle, np.array([middle - low, high - middle])


def _apart(points: list[tuple[str, float]]) -> list[float]:
    """The drifts of (loss, drift), those of one point side by side, so that their intervals can be
    read."""
    seen: dict[tuple[str, float], int] = {}
    placed = []
    for point in points:
        number = seen[point] = seen.get(point, -1) + 1
        placed.append(point[1] * 1.03**number)
    return placed


def others(rows: list[dict[str, Any]]) -> Figure:
    """A line for each of part 3, its gain over no gate and over Block64; a column for a band."""
    bands = list(dict.fromkeys(row["band"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, grid = pyplot.subplots(
        1, len(bands), figsize=(10, 1.4 + 0.28 * len(names)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    beside = (("no gate", FIRST, -0.14), ("Block64", SECOND, 0.14))
    for band, axes in zip(bands, grid[0], strict=True):
        for label, colour, shift in beside:
            mine = [
                row
                for row in rows
                if row["band"] == band and ("Block64" in row["against"]) is (label == "Block64")
            ]
            middle, around = _gains_of(mine)
            axes.errorbar(
                middle, [names.index(row["name"]) + shift for row in mine], xerr=around,
                fmt="o", markersize=4, color=colour, capsize=2, linewidth=1, label=f"over {label}",
            )  # fmt: skip
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_title(f"{band} drift", fontsize=10)
    grid[0][0].set_yticks(range(len(names)), names, fontsize=9)
    grid[0][0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("gain in pass@8, 95% intervals over seeds and problems", fontsize=10)
    handles = grid[0][0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=9, loc="outside upper center", ncols=2)
    return _plain(figure)


def training(found: Found) -> Figure:
    """Share of a batch's prompts with a right response among eight, mean and quartiles of seeds."""
    bands = [name for name in found["bands"] if any(r["band"] == name for r in found["runs"])]
    bands += ["default"] if any(r["band"] == "default" for r in found["runs"]) else []
    losses = list(LOSS_COLOURS)
    figure, grid = pyplot.subplots(
        len(bands), 2, figsize=(10, 1 + 2.9 * len(bands)), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for band, line in zip(bands, grid, strict=True):
        for loss, axes in zip(losses, line, strict=True):
            for name, style in ((loss, "--"), (f"{loss} + Block64", "-")):
                curves = [
                    [step["passed"] for step in run["curve"]]
                    for run in found["runs"]
                    if run["band"] == band and run["variant"] == name
                ]
                if not curves:
                    continue
                smooth = _smooth(np.array(curves))
                at = np.arange(smooth.shape[1]) + (FEW + 1) / 2
                colour = LOSS_COLOURS[loss] if style == "-" else "0.35"
                seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
                axes.plot(at, smooth.mean(0), style, color=colour, label=f"{name}, {seeds}")
                axes.fill_between(
                    at, *np.quantile(smooth, [0.25, 0.75], 0), color=colour, alpha=0.15
                )
            axes.set_title(
                f"{loss}, {band}{' drift' if band != 'default' else ' setting'}", fontsize=10
            )
            if axes.lines:  # a setting whose runs of this loss are to come has none
                axes.legend(frameon=False, fontsize=8, loc="lower right")
    for axes in grid[-1]:
        axes.set_xlabel("rollout batch")
    figure.supylabel(f"prompts solved in 8 samples, mean of {FEW} batches", fontsize=10)
    return _plain(figure)


def _smooth(curves: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[seeds, batches - FEW + 1]"""
    kernel = np.full(FEW, 1 / FEW)
    return np.array([np.convolve(curve, kernel, mode="valid") for curve in curves])


def weights(found: Found) -> Figure:
    """Weights [position, epoch over a batch], and under them the share of right responses."""
    run = found["collapse"]
    table = np.full((len(run["weights"]), max(map(len, run["weights"]))), np.nan)
    for row, values in enumerate(run["weights"]):
        table[row, : len(values)] = values
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(10, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    batches = len(run["accuracy"])
    widest = max(1e-3, float(np.nanquantile(np.abs(table - 1), 0.98)))
    image = above.imshow(
        table.T, aspect="auto", origin="lower", cmap="RdBu", interpolation="nearest",
        vmin=1 - widest, vmax=1 + widest, extent=(0, batches, 0, TOGETHER * table.shape[1]),
    )  # fmt: skip
    above.set_facecolor("0.9")
    above.set_ylabel("position in the response")
    above.set_title(
        f"{run['variant']}, {run['band']} drift, seed {run['seed']}: mean weight of "
        f"{TOGETHER} positions in each of {run['epochs']} epochs over a batch",
        fontsize=10,
    )
    figure.colorbar(image, ax=above, label="gate weight; unit mean")
    below.step(
        range(batches + 1), [*run["accuracy"], run["accuracy"][-1]], where="post", color="0.2"
    )
    below.set(ylim=(0, 1), xlabel="rollout batch", ylabel="right", xlim=(0, batches))
    return figure


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
