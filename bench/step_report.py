"""Training steps for people: a rich table, a table in Markdown, and the picture of two bars a loss.

What a loss adds is its step less that of the layers alone, in time as in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from .harness import OUT_OF_MEMORY
from .names import LAYERS, OURS, STEP
from .record import Result
from .step_model import SIZES

GIB = 1 << 30


class Bar(NamedTuple):
    """One loss: a step's milliseconds and GiB, and what of them the loss adds."""

    name: str
    loss: str  # OPD or LSM; "" for the layers alone, and for a loss that others do not compute
    ms: float
    gib: float
    added_ms: float
    added_gib: float
    note: str

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


class Steps(NamedTuple):
    """One model on one device."""

    model: str
    title: str
    machine: dict[str, Any]
    bars: list[Bar]  # the layers first, then loss by loss, this package last
    left_out: dict[str, str]  # name -> why


def found_in(results: Iterable[Result]) -> list[Steps]:
    """Models and devices, each with the last run that measured it."""
    runs: dict[tuple[str, str], dict[tuple[str, ...], list[Result]]] = {}
    for r in results:
        if r.suite == STEP:
            run = r.machine["date"], r.machine["commit"], r.machine["torch"]
            one = runs.setdefault((r.size.what, r.machine["device"]), {})
            one.setdefault(run, []).append(r)
    found = [_steps(list(one.values())[-1]) for one in runs.values()]
    return [steps for steps in found if steps.bars]


def loss_of(name: str) -> str:
    """Which loss an implementation computes."""
    from .train_step import ENTRIES  # here: it imports everything that is measured

    unit = next((entry.unit for entry in ENTRIES if entry.name == name), "")
    return unit.removeprefix("eager ")


def _steps(results: list[Result]) -> Steps:
    layers = next((r for r in results if r.implementation == LAYERS and r.seconds), None)
    bars = []
    for r in results:
        if layers is None or layers.step is None:
            continue
        if r.left_out == OUT_OF_MEMORY:
            bars.append(Bar(r.implementation, loss_of(r.implementation), *[math.inf] * 4, ""))
        if not r.seconds or r.step is None:
            continue
        ms, gib = 1e3 * r.median, r.step["peak_bytes"] / GIB
        added = ms - 1e3 * layers.median, gib - layers.step["peak_bytes"] / GIB
        bars.append(Bar(r.implementation, loss_of(r.implementation), ms, gib, *added, r.note))
    order = {"": 2, "OPD": 0, "LSM": 1}
    bars.sort(key=lambda b: (b.name != LAYERS, order[b.loss], b.ours, -b.gib))
    shown = {bar.name for bar in bars}
    left_out = {
        r.implementation: r.left_out
        for r in results
        if r.left_out and r.implementation not in shown
    }
    return Steps(results[0].size.what, _title(results[0]), results[0].machine, bars, left_out)


def _title(result: Result) -> str:
    size = SIZES[result.size.what]
    return (
        f"a training step of {result.size.what}, {size.batch} x {size.length:,} tokens, "
        f"{size.vocab:,} words"
    )


def where(machine: dict[str, Any]) -> str:
    """What figures must be read with."""
    return f"{machine['device']}, torch {machine['torch']}, {machine['date']}, commit " + str(
        machine["commit"]
    )


HEADINGS = "step, ms", "+ loss", "peak, GiB", "+ loss"


def _plain(ms: float) -> str:
    """Whole milliseconds, unless they are few."""
    return f"{ms:,.0f}" if abs(ms) >= 100 else f"{ms:.3g}"


def cells(bar: Bar) -> list[str]:
    """Figures of a row."""
    if bar.name == LAYERS:
        return [_plain(bar.ms), "", f"{bar.gib:.3g}", ""]
    if math.isinf(bar.gib):
        return ["", "", OUT_OF_MEMORY, ""]
    return [_plain(bar.ms), _plain(bar.added_ms), f"{bar.gib:.3g}", f"{bar.added_gib:.3g}"]


def table(steps: Steps) -> Any:
    """For a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    caption = [
        "forward and backward, checkpointed, bfloat16, random weights, a quarter of the positions "
        "masked; no optimizer. Peak: weights, gradients and batch included. + loss: beyond the "
        "layers alone"
    ]
    caption += [f"{bar.name}: {bar.note}" for bar in steps.bars if bar.note]
    caption += [f"left out: {name}: {why}" for name, why in steps.left_out.items()]
    shown = Table(
        title=steps.title, caption="\n".join(map(escape, caption)), box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0), caption_justify="left", show_edge=False,
    )  # fmt: skip
    shown.add_column("", no_wrap=True)
    for name in HEADINGS:
        shown.add_column(name, justify="right", no_wrap=True)
    for bar, after in zip(steps.bars, [*steps.bars[1:], None], strict=True):
        last = after is not None and after.loss != bar.loss
        shown.add_row(bar.name, *cells(bar), end_section=last)
    return shown


def markdown(results: Iterable[Result]) -> list[str]:
    """A table for each model and device, in lines."""
    lines = []
    for steps in found_in(results):
        lines += [f"{steps.title[:1].upper()}{steps.title[1:]} ({where(steps.machine)}):", ""]
        lines += [f"| | {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|---:|"]
        lines += [f"| {' | '.join([bar.name, *cells(bar)])} |" for bar in steps.bars]
        lines.append("")
        if steps.left_out:
            why = "; ".join(f"{name} ({reason})" for name, reason in steps.left_out.items())
            lines += [f"Left out: {why}.", ""]
    return lines


LAYERS_COLOUR, OTHERS, MINE = "#c4c4c4", "#0072B2", "#D55E00"


def picture(steps: Steps) -> Any:
    """Two bars a loss, time left and memory right; what the loss adds in colour, as a figure."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    places = _places(steps.bars)
    figure, axes = pyplot.subplots(1, 2, sharey=True, figsize=(10, 1.4 + 0.34 * max(places)))
    panels = (
        (axes[0], "step, ms", "ms", "added_ms", "{:,.0f}"),
        (axes[1], "peak memory, GiB", "gib", "added_gib", "{:.3g}"),
    )
    for axis, title, whole, added, shown in panels:
        for place, bar in zip(places, steps.bars, strict=True):
            _draw_bar(axis, place, bar, getattr(bar, whole), getattr(bar, added), shown)
        axis.set_title(title, fontsize=10, loc="left")
        axis.margins(x=0.16)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.set_axisbelow(True)
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes[0].set_yticks(places, [bar.name.removeprefix(f"{OURS} ") for bar in steps.bars])
    axes[0].invert_yaxis()
    for label, bar in zip(axes[0].get_yticklabels(), steps.bars, strict=True):
        label.set_fontweight("bold" if bar.ours else "normal")
    figure.suptitle(steps.title[:1].upper() + steps.title[1:], fontsize=11)
    legend = ((LAYERS_COLOUR, "the layers"), (OTHERS, "the loss adds"))
    patches = [Patch(color=colour, label=label) for colour, label in legend]
    patches.append(Patch(color=MINE, label="the loss adds, drift_gate"))
    figure.legend(
        handles=patches, loc="lower center", ncols=3, frameon=False, fontsize=9,
        bbox_to_anchor=(0.5, -0.06),
    )  # fmt: skip
    figure.text(0.5, -0.1, where(steps.machine), ha="center", fontsize=8, color="#666666")
    figure.tight_layout()
    return figure


def _places(bars: list[Bar]) -> list[float]:
    """Of the rows, with a gap before each loss."""
    places, at = [], 0.0
    for i, bar in enumerate(bars):
        at += 0.0 if i == 0 else 1.0 if bar.loss == bars[i - 1].loss else 1.5
        places.append(at)
    return places


def _draw_bar(axis: Any, place: float, bar: Bar, whole: float, added: float, shown: str) -> None:
    """Grey, then colour; the figures at its end."""
    if math.isinf(whole):
        axis.text(0, place, f" {OUT_OF_MEMORY}", va="center", fontsize=8.5, color=OTHERS)
        return
    colour = MINE if bar.ours else OTHERS
    added = 0.0 if bar.name == LAYERS else max(added, 0.0)
    axis.barh(place, whole - added, color=LAYERS_COLOUR, height=0.72)
    axis.barh(place, added, left=whole - added, color=colour, height=0.72)
    text = shown.format(whole)
    if bar.name != LAYERS:
        text += f"  (+{shown.format(added)})"
    axis.text(whole, place, f" {text}", va="center", fontsize=8.5)
