"""Pictures of the docs: the gate, from the committed study; an eager loss's memory, measured here.

`python -m drift_gate.bench.page_pictures` writes docs/gate.svg and docs/eager_memory.svg.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from drift_gate import Head, eager, linear_opd_loss, opd_loss

from .plots import save

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "bench" / "results" / "distill_study.json"
ROWS, VOCAB, HIDDEN, CHUNK = 2048, 32_000, 64, 128
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"


def gate(study: dict[str, Any]) -> Figure:
    """The factor of a block by its drift; drift and weights of the study by epochs."""
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.3))
    drift = [i / 100 for i in range(201)]
    for tau, dashes in ((0.5, ":"), (1.0, "-"), (2.0, "--")):
        shape = [torch.tensor(-tau * x).exp().item() for x in drift]
        axes[0].plot(drift, shape, dashes, color=BLUE, label=f"tau {tau:g}")
    axes[0].set(
        xlabel="|mean drift of a block|, nats", title="factor of a block, g", ylim=(0, 1.03)
    )
    axes[0].legend(frameon=False, fontsize=9)
    for name, colour in (("OPD", BLUE), ("LSM", ORANGE)):
        _drift(axes[1], study, name, colour)
        _weights(axes[2], study, f"{name} + Block64", colour)
    axes[1].set(xlabel="epochs over a batch", ylim=(0, None), title="mean |drift| of a token, nats")
    axes[2].set(xlabel="epochs over a batch", title="weights w: quartiles, and 5% to 95%")
    axes[1].legend(frameon=False, fontsize=9)
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def _rows(study: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sorted((r for r in study["rows"] if r["name"] == name), key=lambda r: r["epochs"])


def _drift(axis: Axes, study: dict[str, Any], name: str, colour: str) -> None:
    rows = _rows(study, name)
    drift = [row["movement"]["drift_abs"][-1] for row in rows]
    axis.plot([row["epochs"] for row in rows], drift, "o-", color=colour, label=name)
    axis.set_xticks([row["epochs"] for row in rows])


def _weights(axis: Axes, study: dict[str, Any], name: str, colour: str) -> None:
    """The spread in the last epoch: a thin line for 5% to 95%, a thick one for the quartiles."""
    rows, side = _rows(study, name), 0.08 if colour == ORANGE else -0.08
    for row in rows:
        least, low, middle, high, most = row["movement"]["weight_quantiles"][-1]
        at = row["epochs"] + side
        axis.plot([at, at], [least, most], color=colour, linewidth=1)
        axis.plot([at, at], [low, high], color=colour, linewidth=5, solid_capstyle="butt")
        axis.plot(at, middle, "o", color="white", markeredgecolor=colour, markersize=4)
    axis.set_xticks([row["epochs"] for row in rows])


def over_time(call: Callable[[], object]) -> tuple[list[float], list[int]]:
    """Shares of a call's time, and the bytes that it holds from then on, on a CPU."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    first, last = events[0].start_ns(), events[-1].start_ns()
    shares = [(e.start_ns() - first) / (last - first) for e in events]
    return shares, list(itertools.accumulate(e.nbytes() for e in events))


def calls() -> dict[str, Callable[[], object]]:
    """Forward and backward of one batch: eager, and from logits and head by this package."""
    torch.manual_seed(0)
    source = torch.randn(ROWS, VOCAB).bfloat16()
    labels = torch.randint(VOCAB, (ROWS,))
    hidden = torch.randn(ROWS, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN).bfloat16().requires_grad_()
    head = Head(weight, chunk_size=CHUNK)
    old, teacher = -torch.rand(ROWS), -torch.rand(ROWS)
    mask, blocks = torch.ones(ROWS), torch.arange(ROWS) // 64
    logits = source.clone().requires_grad_()

    def trained(loss: torch.Tensor, *leaves: torch.Tensor) -> object:
        return torch.autograd.grad(loss, leaves)

    def in_place() -> object:
        own = logits.detach().requires_grad_()
        result = opd_loss(own, labels, old, teacher, inplace_backward=True)
        logits.data.copy_(source)
        return trained(result.loss, own)

    return {
        "eager": lambda: trained(eager.loss(logits, labels, old, teacher, mask, blocks), logits),
        "opd_loss": lambda: trained(opd_loss(logits, labels, old, teacher).loss, logits),
        "opd_loss, in place": in_place,
        f"linear_opd_loss, {CHUNK} rows a chunk,\nwithout those logits": lambda: trained(
            linear_opd_loss(hidden, head, labels, old, teacher).loss, hidden, weight
        ),
    }


def memory(lines: dict[str, tuple[list[float], list[int]]]) -> Figure:
    """What each call holds over its own time, in multiples of the logits' bytes."""
    figure, axis = pyplot.subplots(figsize=(8, 3.4))
    looks = zip(("#000000", ORANGE, ORANGE, BLUE), ("-", "-", "--", "-"), strict=True)
    unit = 2 * ROWS * VOCAB
    for (name, (at, held)), (colour, dashes) in zip(lines.items(), looks, strict=True):
        axis.plot(
            at, [x / unit for x in held], dashes, color=colour, drawstyle="steps-post",
            label=f"{name}: {max(held) / unit:.2g} at most", linewidth=1.6,
        )  # fmt: skip
    axis.set(
        xlabel="forward, then backward: share of the call's own time",
        ylabel="beside the bfloat16 logits,\nin multiples of them", ylim=(0, None),
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    docs = ROOT / "docs"
    save(gate(json.loads(STUDY.read_text())), docs / "gate.svg")
    save(
        memory({name: over_time(call) for name, call in calls().items()}), docs / "eager_memory.svg"
    )


if __name__ == "__main__":
    main()
