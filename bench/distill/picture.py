"""`report.png`: pass@8, gate weights, drift, and what the loss costs."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from .jobs import BASE
from .report import METRICS, label
from .settings import Job

Done = list[tuple[Job, dict[str, Any]]]
GREY = "0.55"


def draw(found: dict[str, Any], done: Done) -> bytes:
    """A PNG of the four panels."""
    rows = [row for row in found["rows"] if row["name"] not in BASE]
    height = max(9.0, 5.0 + 0.28 * len(rows))
    figure = pyplot.figure(figsize=(14, height), layout="constrained")
    (top_left, top_right), (low_left, low_right) = figure.subfigures(2, 2, wspace=0.03, hspace=0.03)
    _passes(top_left.subplots(), found["rows"])
    _heat(top_right, done)
    _drift(low_left.subplots(), rows)
    _costs(low_right, found["loss_cost"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _passes(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Mean pass@8 with its interval, a bar a variant; the models before training as lines."""
    base = {row["name"]: row["figures"][METRICS[0]]["mean"] for row in rows if row["name"] in BASE}
    rows = [row for row in rows if row["name"] not in BASE]
    several = len({row["epochs"] for row in rows}) > 1
    for place, row in enumerate(rows):
        figures = row["figures"][METRICS[0]]
        low, high = figures["interval"]
        color = "tab:blue" if row["name"].startswith("OPD") else "tab:orange"
        axes.barh(place, figures["mean"], color=color, alpha=0.9 if "gain" in row else 0.45)
        axes.plot([low, high], [place, place], color="black", linewidth=1.5)
    for (name, value), style in zip(base.items(), ("--", "-"), strict=True):
        axes.axvline(value, color=GREY, linestyle=style, label=f"{name}: {value:.3f}")
    axes.set_yticks(range(len(rows)), [label(row, several) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean pass@8 over the benchmarks; line: 95% interval")
    axes.set_title("(a) pass@8 by variant")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)


def _heat(figure: SubFigure, done: Done) -> None:
    """Mean gate weight at each position and step, the first seed of up to four gated variants."""
    seed, most = done[0][0].seed, max(job.epochs for job, _ in done)
    chosen = [
        (job, result)
        for job, result in done
        if job.variant.gate is not None and job.seed == seed and job.epochs == most
    ][:4]
    figure.suptitle("(b) gate weights", fontsize=12)
    if not chosen:
        figure.text(0.5, 0.5, "no gated variant ran", ha="center")
        return
    tables = [_table(result["heat"]) for _, result in chosen]
    widest = max(1e-3, *(np.nanquantile(np.abs(table - 1), 0.98) for table in tables))
    grid = figure.subplots(2, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (job, _), table in zip(grid, chosen, tables, strict=False):
        image = axes.imshow(
            table.T, aspect="auto", origin="lower", cmap="RdBu", interpolation="nearest",
            vmin=1 - widest, vmax=1 + widest, extent=(0.5, len(table) + 0.5, 0, table.shape[1]),
        )  # fmt: skip
        axes.set_title(job.variant.name, fontsize=9)
        axes.set_facecolor("0.9")
    for axes in grid[len(chosen) :]:
        axes.axis("off")
    figure.supxlabel("step (rollout batch)", fontsize=10)
    figure.supylabel("position in the response", fontsize=10)
    figure.colorbar(image, ax=list(grid), label="mean gate weight, last epoch; unit mean")


def _table(heat: list[list[float]]) -> Any:
    """[steps, positions], NaN where no response is so long."""
    table = np.full((len(heat), max(map(len, heat))), np.nan)
    for row, weights in enumerate(heat):
        table[row, : len(weights)] = weights
    return table


def _drift(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Mean |drift| in each reuse epoch, over training; the runs with most epochs."""
    most = max(row["epochs"] for row in rows)
    shown = [row for row in rows if row["epochs"] == most]
    colors = {"OPD": "tab:blue", "LSM": "tab:orange"}
    gates = list(dict.fromkeys(row["name"].partition(" + ")[2] for row in shown))
    markers = dict(
        zip(gates, ["o", "s", "^", "v", "D", "P", "X", "<", ">", "*", "h"], strict=False)
    )
    for row in shown:
        loss, _, gate = row["name"].partition(" + ")
        values = row["movement"]["drift_abs"]
        axes.plot(
            range(1, most + 1), values, marker=markers.get(gate, "."), color=colors.get(loss[:3]),
            linestyle="-" if gate else "--", label=row["name"], alpha=0.8,
        )  # fmt: skip
    axes.set_xticks(range(1, most + 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("reuse epoch of a rollout batch")
    axes.set_ylabel("mean |old - new| log-prob, nats")
    axes.set_title("(c) policy drift by reuse epoch")
    axes.legend(fontsize=8, frameon=False)


def _costs(figure: SubFigure, costs: list[dict[str, Any]]) -> None:
    """Peak memory and time of forward and backward, fused beside eager, a line a vocabulary."""
    sizes = list(dict.fromkeys(row["words"] for row in costs))
    grid = figure.subplots(len(sizes), 2, squeeze=False)
    for words, axes in zip(sizes, grid, strict=True):
        _cost(axes[0], axes[1], [row for row in costs if row["words"] == words])
    for axes, title in zip(grid[0], ("peak memory beyond the inputs", "time"), strict=True):
        axes.set_title(title, fontsize=9)
    grid[0, 1].legend(frameon=False, fontsize=8)
    figure.suptitle("(d) the loss with its gradients", fontsize=12)


def _cost(memory: Axes, time: Axes, costs: list[dict[str, Any]]) -> None:
    """Of one vocabulary."""
    names = [row["loss"].upper() for row in costs]
    for i, (kind, color) in enumerate((("fused", "tab:green"), ("eager", GREY))):
        places = np.arange(len(costs)) + 0.4 * i - 0.2
        bars = memory.bar(places, [row["bytes"][kind] / 1e6 for row in costs], 0.38, color=color)
        memory.bar_label(bars, fmt="%.3g", fontsize=8)
        low, middle, high = 1e3 * np.array([row["seconds"][kind] for row in costs]).T
        time.bar(
            places, middle, 0.38, yerr=[middle - low, high - middle], color=color, label=kind,
            capsize=3,
        )  # fmt: skip
        for place, value, top in zip(places, middle, high, strict=True):
            time.annotate(f"{value:.3g}", (place, top), ha="center", va="bottom", fontsize=8)
    shape = costs[0]
    memory.set_ylabel(f"{shape['positions']:,} positions\nV = {shape['words']:,}", fontsize=9)
    for axes, unit in ((memory, "MB"), (time, "ms, median and quartiles")):
        axes.set_xticks(range(len(costs)), names)
        axes.set_xlabel(f"{unit}; H = {shape['hidden']}", fontsize=8)
        axes.margins(y=0.25)  # room for the numbers and the legend
