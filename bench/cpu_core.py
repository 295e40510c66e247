"""The losses from logits on the CPU beside the eager ones: `make bench`.

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

from drift_gate import DriftGate, full_loss, opd_loss, topk_loss

from . import eager
from .measure import available_bytes, environment, peak_bytes, quartiles, seconds, slug

CPU = torch.device("cpu")
RESULTS = Path(__file__).with_name("results")
GATE = DriftGate()
TOPK = 64
SAMPLED = "sampled-token"
LSM, LSM_UNGATED = f"LSM, K = {TOPK}", f"LSM, K = {TOPK}, no gate, no labels"
FULL = {f"full, {name}": name for name in ("reverse", "forward", "jsd")}  # ungated
WORKS = [SAMPLED, LSM, LSM_UNGATED, *FULL]
GRID = [
    (SAMPLED, 4096, 151936, "bfloat16"),
    (SAMPLED, 1024, 151936, "bfloat16"),
    (SAMPLED, 1024, 151936, "float32"),
    *((work, 1024, 151936, "bfloat16") for work in WORKS[1:]),
]
COMPILED = "torch.compile of it"
CHUNK = 64  # rows drawn, or computed in float64, at once
CHECKED = 32  # rows whose gradient is compared with float64
EAGER_BYTES = 14  # of memory that the eager run takes beside a logit: three float32, one bfloat16
EAGER_FULL_BYTES = 38  # eight float32 and the teacher's logits besides, one bfloat16

Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits -> loss, gradient


class Work(NamedTuple):
    """Inputs, and what float64 makes of them."""

    logits: Tensor  # [N, V]
    labels: Tensor  # [N]
    old: Tensor  # [N]
    teacher: Tensor  # [N] log-probs; [N, K] of `ids`; or [N, V] logits
    ids: Tensor | None  # [N, K]
    loss64: Tensor
    rows: Tensor  # [CHECKED]
    grad64: Tensor  # [CHECKED, V]


def draw(kind: str, n: int, vocab: int, dtype: torch.dtype) -> Work:
    """One response of n tokens; the old policy 0.3 away, the teacher 1."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.empty(n, vocab, dtype=dtype)
    labels, now = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.float64)
    ids = torch.empty(n, TOPK, dtype=torch.int64) if kind in (LSM, LSM_UNGATED) else None
    teacher = torch.empty(n)
    if ids is not None:
        teacher = torch.empty(n, TOPK)
    if kind in FULL:
        teacher = torch.empty(n, vocab, dtype=dtype)
    for first in range(0, n, CHUNK):
        rows = slice(first, first + CHUNK)
        z = 2 * torch.randn(len(logits[rows]), vocab, generator=draw)
        winner = torch.randint(vocab, (len(z), 1), generator=draw)
        logits[rows] = z.scatter_add_(-1, winner, 16 * torch.rand(len(z), 1, generator=draw))
        log_p = logits[rows].double().log_softmax(-1)
        labels[rows] = log_p.exp().multinomial(1, generator=draw)[:, 0]
        now[rows] = log_p.gather(-1, labels[rows, None])[:, 0]
        if teacher.dim() == 2:
            z += torch.randn(z.shape, generator=draw)
        if ids is not None:
            teacher[rows], ids[rows] = z.log_softmax(-1).topk(TOPK)
        elif teacher.dim() == 2:
            teacher[rows] = z
    old = (now + 0.3 * torch.randn(n, generator=draw)).float()
    if teacher.dim() == 1:
        teacher = (now + torch.randn(n, generator=draw)).float()
    rows = torch.randperm(n, generator=draw)[:CHECKED]
    work = Work(logits, labels, old, teacher, ids, now, rows, now)
    return work._replace(**_truth(kind, work, now))


def _truth(kind: str, work: Work, now: Tensor) -> dict[str, Tensor]:
    """The loss, and its gradient in the checked rows, in float64; `now` [N] are log-probs."""
    n, rows = len(now), work.rows
    ones, blocks = torch.ones(n).double(), eager.block_numbers([n], GATE.block_size)
    old = work.old.double()
    if kind == SAMPLED:
        now.requires_grad_()
        loss = eager.row_loss(now, old, work.teacher.double(), ones, blocks).mean()
        (slope,) = torch.autograd.grad(loss, now)
        grad = work.logits[rows].double().softmax(-1).mul_(-slope[rows, None])
        grad[torch.arange(len(rows)), work.labels[rows]] += slope[rows]
        return {"loss64": loss.detach(), "grad64": grad}
    weights = eager.drift_weights(old - now, ones, blocks) if kind == LSM else ones

    def loss_of(z: Tensor, part: slice | Tensor) -> Tensor:
        target = work.teacher[part].double()
        if work.ids is None:
            return eager.full_losses(z, target, FULL[kind]).sum() / n
        losses = eager.support_losses(z.gather(-1, work.ids[part]), target)
        return (weights[part] * losses).sum() / n

    loss = torch.zeros(()).double()
    for first in range(0, n, CHUNK):
        part = slice(first, first + CHUNK)
        loss += loss_of(work.logits[part].double(), part)
    z = work.logits[rows].double().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(z, rows), z)
    return {"loss64": loss, "grad64": grad}


def variants(kind: str, work: Work) -> dict[str, Run]:
    """What is compared; the first is the baseline."""
    n = len(work.labels)
    ones, blocks = torch.ones(n), eager.block_numbers([n], GATE.block_size)

    def of_loss(loss: Callable[..., Tensor], *arguments: Any) -> Run:
        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(logits, *arguments)
            return value.detach(), *torch.autograd.grad(value, logits)

        return run

    labels, old, teacher, ids = work.labels, work.old, work.teacher, work.ids
    trainers: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
        SAMPLED: (eager.loss, (labels, old, teacher, ones, blocks)),
        LSM: (eager.support_loss, (ids, teacher, labels, old, blocks)),
        LSM_UNGATED: (eager.support_loss_ungated, (ids, teacher)),
        **{name: (eager.full_loss, (teacher, direction)) for name, direction in FULL.items()},
    }
    loss, row_data = trainers[kind]
    runs = {
        "eager": of_loss(loss, *row_data),
        COMPILED: of_loss(torch.compile(loss, dynamic=False), *row_data),
    }
    if kind == LSM_UNGATED:
        first = eager.support_loss_gather_first
        runs["eager, gathers first"] = of_loss(first, *row_data)
        runs["torch.compile of that"] = of_loss(torch.compile(first, dynamic=False), *row_data)
    for name, inplace in (("drift_gate", False), ("drift_gate, in place", True)):
        runs[name] = of_loss(lambda z, inplace=inplace: _package_loss(kind, work, z, inplace))
    return runs


def _package_loss(kind: str, work: Work, logits: Tensor, inplace: bool) -> Tensor:
    """The loss of this package, scalar."""
    if kind == SAMPLED:
        row_data = work.labels, work.old, work.teacher
        return opd_loss(logits, *row_data, gate=GATE, inplace_backward=inplace).loss
    if kind in FULL:
        return full_loss(
            logits, None, None, work.teacher, direction=FULL[kind], gate=None,
            inplace_backward=inplace,
        ).loss  # fmt: skip
    gated = kind == LSM
    row_data = (work.labels, work.old) if gated else (None, None)
    return topk_loss(
        logits, *row_data, work.ids, work.teacher, gate=GATE if gated else None,
        inplace_backward=inplace,
    ).loss  # fmt: skip


def measure(kind: str, n: int, vocab: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Time, memory and error of every variant on one size."""
    torch.compiler.reset()
    work = draw(kind, n, vocab, dtype)
    leaf = work.logits.clone().requires_grad_()
    runs = variants(kind, work)
    figures: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in runs}

    def restored() -> Tensor:
        with torch.no_grad():
            leaf.copy_(work.logits)
        return leaf

    for name, run in list(runs.items()):
        try:
            run(restored())  # compiles
        except Exception as error:  # the compiler's own, where there is none for C++
            if not name.startswith("torch.compile"):
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
    size = {"work": kind, "rows": n, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
    moved = bytes_to_move(kind, work)
    return {**size, "rounds": rounds, "must_move": moved, "variants": figures}


def bytes_to_move(kind: str, work: Work) -> dict[str, int]:
    """Bytes of each pass of this package, as the kernels declare them; {} without Triton."""
    logits, entries = work.logits, 1 if work.ids is None else TOPK
    if kind == LSM_UNGATED:  # only what is gathered is read
        return {"expand": logits.nbytes}
    try:
        from drift_gate.kernels.divergence import divergence_bytes
        from drift_gate.kernels.divergence_grad import divergence_grad_bytes
        from drift_gate.kernels.expand import expand_bytes
        from drift_gate.kernels.scan import scan_bytes
    except ModuleNotFoundError:
        return {}
    if kind in FULL:
        x, y = logits[None], work.teacher[None]
        moved = divergence_bytes(x, y, FULL[kind])
        return {"divergence": moved, "divergence_grad": divergence_grad_bytes(x, y)}
    if kind == LSM:  # as alpha is 0, the gradient is written alone
        return {"scan": scan_bytes(logits, entries), "expand": logits.nbytes}
    return {"scan": scan_bytes(logits, 1), "expand": expand_bytes(logits, 1)}


def table(result: dict[str, Any]) -> Table:
    """One size for people."""
    moved = ", ".join(f"{name} {n / 1e9:.3f} GB" for name, n in result["must_move"].items())
    base = result["variants"]["eager"]
    shown = Table(
        title=f"{result['work']}: {result['rows']} x {result['vocab']} {result['dtype']}, "
        "forward and backward",
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
    work: Annotated[str, typer.Option(help=f"With --rows, one of: {'; '.join(WORKS)}.")] = SAMPLED,
) -> None:
    """Time and memory of the losses from logits on the CPU, as ratios to the eager ones."""
    if work not in WORKS:
        raise typer.BadParameter(f"work must be one of: {'; '.join(WORKS)}; got {work!r}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"must be bfloat16, float16 or float32; got {dtype!r}")
    console, results = Console(), []
    machine = environment(CPU) | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset")}
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    for kind, n, words, name in GRID if rows is None else [(work, rows, vocab, dtype)]:
        torch_dtype = getattr(torch, name)
        beside = EAGER_FULL_BYTES if kind in FULL else EAGER_BYTES
        needed = n * words * (beside + 2 * torch_dtype.itemsize)
        shown = f"{kind}, {n} x {words} {name}"
        if needed > available_bytes():
            console.print(f"{shown}: left out, takes {needed / 1e9:.0f} GB of memory")
            continue
        with console.status(shown):
            results.append(measure(kind, n, words, torch_dtype, rounds))
        console.print(table(results[-1]))
    RESULTS.mkdir(exist_ok=True)
    name = "cpu_core" if rows is None else f"cpu_{slug(work)}_{rows}x{vocab}_{dtype}"
    path = RESULTS / f"{name}_{slug(machine['device'])}.json"
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
