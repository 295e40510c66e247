"""What `drift-gate fuzz` prints and writes."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..passes.backends import HAS_TRITON
from . import run
from .functions import FUNCTIONS

QUIET = 10.0  # seconds between lines where there is no terminal


def interpret() -> str | None:
    """Make Triton's interpreter run the kernels; returns why it cannot, or None."""
    if not HAS_TRITON:
        return "--interpret needs the package triton"
    if os.environ.get("TRITON_INTERPRET") != "1" and "triton" in sys.modules:
        return "--interpret comes too late: triton is imported already; set TRITON_INTERPRET=1"
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
    return None


def fuzz(
    backends: tuple[str, ...],
    device: torch.device,
    *,
    seed: int,
    cases: int,
    minutes: float,
    functions: tuple[str, ...],
    out: Path,
) -> bool:
    """Run, print, and save a failure; whether there was none."""
    console = Console()
    named = ", ".join(backends)
    with _progress(console, named, device, seed) as progress:
        tally = run.fuzz(
            backends,
            device,
            seed=seed,
            cases=cases,
            seconds=60 * minutes,
            functions=functions,
            progress=progress,
        )
    if tally.failure is not None:
        out.write_text(json.dumps(tally.failure, indent=2) + "\n")
        _describe(console, tally.failure)
        console.print(f"case {tally.cases} fails; shrunk and saved: drift-gate fuzz --replay {out}")
        return False
    console.print(_coverage(tally))
    biased = list(tally.bias.faults())
    for line in biased:
        console.print(line, style="red", markup=False)
    console.print(
        f'{tally.cases:,} cases on backend "{named}", {device}, seed {seed}: '
        + ("[red]biased[/]" if biased else "[green]no mismatch[/]")
        + f", {tally.rate():.0f} a second"
    )
    return not biased


def load(path: Path) -> dict[str, Any]:
    """A saved failure; raises OSError or ValueError where the file is none."""
    try:
        saved = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(saved, dict) or saved.get("version") != run.VERSION:
        raise ValueError(f"{path} is no case of this version of drift-gate fuzz")
    if saved["problem"]["function"] not in FUNCTIONS:
        raise ValueError(f"{path} is of the function {saved['problem']['function']!r}")
    return saved


def replay(saved: dict[str, Any], backend: str, device: torch.device) -> bool:
    """Run a saved case and print what is wrong with it; whether nothing is."""
    console = Console()
    wrong = run.replay(saved["problem"], backend, device)
    if wrong is None:
        console.print(f'no mismatch on backend "{backend}", {device}')
        return True
    _describe(console, {**saved, "wrong": wrong.splitlines()})
    return False


@contextmanager
def _progress(
    console: Console, backends: str, device: torch.device, seed: int
) -> Iterator[Callable[[run.Tally], None]]:
    """A line that follows the run on a terminal, and lines now and then elsewhere."""
    told = time.perf_counter()
    live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def progress(tally: run.Tally) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told < (0.25 if live else QUIET):
            return
        told = now
        taken, offered = tally.coverage()
        line = (
            f"{backends} on {device}, seed {seed}: {tally.cases:,} cases, {tally.rate():.0f} a "
            f"second, {taken} of {offered} options"
        )
        if live is None:
            console.print(line, highlight=False)
        else:
            live.update(Text(line))

    if live is None:
        yield progress
        return
    with live:
        yield progress


def _describe(console: Console, failure: dict[str, Any]) -> None:
    for name, value in {"backend": failure["backend"], **failure["problem"]}.items():
        console.print(f"  {name}: {value}", markup=False, highlight=False)
    for line in failure["wrong"]:
        console.print(line, style="red", markup=False, highlight=False)


def _coverage(tally: run.Tally) -> Table:
    """How often each option was taken."""
    table = Table("choice", "options taken (the rarest)", box=None)
    table.add_row("function", _counts(tally.functions))
    for name, counter in sorted(tally.options.items()):
        table.add_row(name, _counts(counter))
    return table


def _counts(counter: dict[Any, int]) -> str:
    rarest = sorted(counter.items(), key=lambda item: item[1])
    shown = ", ".join(f"{option} {count:,}" for option, count in rarest[:4])
    return shown + (f", and {len(rarest) - 4} more" if len(rarest) > 4 else "")
