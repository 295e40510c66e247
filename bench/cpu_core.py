"""Gated sampled-token OPD on the CPU beside the eager loss: `make bench`.

Forward and backward of the loss, from logits that are a leaf (no op before it is timed) to their
gradient. Everything runs in one process; each round runs every variant once, in turn, and a ratio
compares two runs of the same round. Extra memory is the exact peak of live bytes beyond the inputs,
the gradient included. Inputs are peaked as a model's are, labels sampled from them.
OMP_WAIT_POLICY=PASSIVE steadies the figures on a machine that does other work: idle threads sleep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from drift_gate import DriftGate, opd_loss

from . import eager
from .measure import available_bytes, environment, peak_bytes, quartiles, seconds, slug

CPU = torch.device("cpu")
RESULTS = Path(__file__).with_name("results")
GATE = DriftGate()
GRID = [(4096, 151936, "bfloat16"), (1024, 151936, "bfloat16"), (1024, 151936, "float32")]
COMPILED = "torch.compile of it"
CHUNK = 64  # rows drawn, or computed in float64, at once
CHECKED = 32  # rows whose gradient is compared with float64
EAGER_BYTES = 14  # of memory that the eager run takes beside a logit: three float32, one bfloat16

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits -> loss, gradient


class Work(NamedTuple):
    """Inputs, and what float64 makes of them."""

    logits: Tensor  # [N, V]
    labels: Tensor  # [N]
    old: Tensor  # [N]
    teacher: Tensor  # [N]
    loss64: Tensor
    rows: Tensor  # [CHECKED]
    grad64: Tensor  # [CHECKED, V]


def draw(n: int, vocab: int, dtype: torch.dtype) -> Work:
    """One response of n tokens; the old policy 0.3 away, the teacher 1."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.empty(n, vocab, dtype=dtype)
    labels, now = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.float64)
    for first in range(0, n, CHUNK):
        rows = slice(first, first + CHUNK)
        z = 2 * torch.randn(len(logits[rows]), vocab, generator=draw)
        winner = torch.randint(vocab, (len(z), 1), generator=draw)
        logits[rows] = z.scatter_add_(-1, winner, 16 * torch.rand(len(z), 1, generator=draw))
        log_p = logits[rows].double().log_softmax(-1)
        labels[rows] = log_p.exp().multinomial(1, generator=draw)[:, 0]
        now[rows] = log_p.gather(-1, labels[rows, None])[:, 0]
    old = (now + 0.3 * torch.randn(n, generator=draw)).float()
    teacher = (now + torch.randn(n, generator=draw)).float()

    now.requires_grad_()
    ones, blocks = torch.ones(n).double(), eager.block_numbers([n], GATE.block_size)
    loss = eager.row_loss(now, old.double(), teacher.double(), ones, blocks).mean()
    (slope,) = torch.autograd.grad(loss, now)
    rows = torch.randperm(n, generator=draw)[:CHECKED]
    grad = logits[rows].double().softmax(-1).mul_(-slope[rows, None])
    grad[torch.arange(len(rows)), labels[rows]] += slope[rows]
    return Work(logits, labels, old, teacher, loss.detach(), rows, grad)


def variants(work: Work) -> dict[str, Run]:
    """What is compared; the first is the baseline."""
    n = len(work.labels)
    ones, blocks = torch.ones(n), eager.block_numbers([n], GATE.block_size)

    def of_loss(loss: Callable[[Tensor], Tensor]) -> Run:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(logits)
            return value.detach(), *torch.autograd.grad(value, logits)

        return run

    def trainer(loss: Callable[..., Tensor]) -> Run:
        row_data = work.labels, work.old, work.teacher, ones, blocks
        return of_loss(lambda logits: loss(logits, *row_data))

    def package(inplace: bool) -> Run:
        row_data = work.labels, work.old, work.teacher
        options = dict(gate=GATE, inplace_backward=inplace)
        return of_loss(lambda logits: opd_loss(logits, *row_data, **options).loss)

    return {
        "eager": trainer(eager.loss),
        COMPILED: trainer(torch.compile(eager.loss, dynamic=False)),
        "drift_gate": package(False),
        "drift_gate, in place": package(True),
    }


def measure(n: int, vocab: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time, memory and error of every variant on one size."""
    work = draw(n, vocab, dtype)
    leaf = work.logits.clone().requires_grad_()
    runs = variants(work)
    figures: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in runs}

    def restored() -> Tensor:
        with torch.no_grad():
            leaf.copy_(work.logits)
        return leaf

    for name, run in list(runs.items()):
        try:
            run(restored())  # compiles
        except Exception as error:  # the compiler's own, where there is none for C++
            if name != COMPILED:
                raise
            del runs[name], figures[name]
            typer.echo(f"{name}: left out, {str(error).splitlines()[0]}", err=True)
            continue
        restored()
        with peak_bytes(CPU) as memory:
            loss, grad = run(leaf)  # kept: the gradient counts
        figures[name]["extra_bytes"] = memory.peak
        figures[name]["loss_error"] = float((loss.double() - work.loss64).abs())
        error = (grad[work.rows].double() - work.grad64).abs().max() / work.grad64.abs().max()
        figures[name]["grad_error"] = float(error)
        del loss, grad
    for _ in range(rounds):
        for name, run in runs.items():
            restored()
            figures[name]["seconds"].append(seconds(lambda run=run: run(leaf), CPU))

    base = figures["eager"]
    for figure in figures.values():
        ratios = [a / b for a, b in zip(figure["seconds"], base["seconds"], strict=True)]
        figure["time_ratio_quartiles"] = quartiles(ratios)
        figure["memory_ratio"] = figure["extra_bytes"] / base["extra_bytes"]
    size = {"rows": n, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
    return {**size, "rounds": rounds, "must_move": bytes_to_move(work.logits), "variants": figures}


def bytes_to_move(logits: Tensor) -> dict[str, int]:
    """Bytes of each pass of this package, as the kernels declare them; {} without Triton."""
    try:
        from drift_gate.kernels.expand import expand_bytes
        from drift_gate.kernels.scan import scan_bytes
    except ModuleNotFoundError:
        return {}
    return {"scan": scan_bytes(logits, 1), "expand": expand_bytes(logits, 1)}


def table(result: dict[str, Any]) -> Table:
    """One size for people."""
    moved = ", ".join(f"{name} {n / 1e9:.3f} GB" for name, n in result["must_move"].items())
    base = result["variants"]["eager"]
    shown = Table(
        title=f"{result['rows']} x {result['vocab']} {result['dtype']}, forward and backward",
        caption=f"ratios to eager ({quartiles(base['seconds'])[1]:.2f} s, extra "
        f"{base['extra_bytes'] / 1e9:.2f} GB): median (quartiles) of {result['rounds']} paired "
        f"rounds; must move: {moved or 'unknown without Triton'}; errors against float64, the "
        "gradient's relative to its largest entry",
    )
    shown.add_column("", no_wrap=True)
    for name in ("time ratio", "memory", "loss err", "grad err"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, figure in result["variants"].items():
        low, median, high = figure["time_ratio_quartiles"]
        shown.add_row(
            name,
            f"{median:.3f} ({low:.3f}-{high:.3f})",
            f"{figure['memory_ratio']:.4f}",
            f"{figure['loss_error']:.0e}",
            f"{figure['grad_error']:.1e}",
        )
    return shown


def main(
    rows: Annotated[int | None, typer.Option(min=1, help="Tokens: one size, not the grid.")] = None,
    vocab: Annotated[int, typer.Option(min=2, help="With --rows.")] = 151936,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32, with --rows.")] = (
        "bfloat16"
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds.")] = 5,
) -> None:
    """Time and memory of gated sampled-token OPD on the CPU, as ratios to the eager loss."""
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"must be bfloat16, float16 or float32; got {dtype!r}")
    console, results = Console(), []
    machine = environment(CPU) | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset")}
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for n, words, kind in GRID if rows is None else [(rows, vocab, dtype)]:
        torch_dtype = getattr(torch, kind)
        needed = n * words * (EAGER_BYTES + 2 * torch_dtype.itemsize)
        if needed > available_bytes():
            console.print(f"{n} x {words} {kind}: left out, takes {needed / 1e9:.0f} GB of memory")
            continue
        with console.status(f"{n} x {words} {kind}"):
            results.append(measure(n, words, torch_dtype, rounds))
        console.print(table(results[-1]))
    RESULTS.mkdir(exist_ok=True)
    name = "cpu_core" if rows is None else f"cpu_{rows}x{vocab}_{dtype}"
    path = RESULTS / f"{name}_{slug(machine['device'])}.json"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
