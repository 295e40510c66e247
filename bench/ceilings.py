"""What a GPU can do at most, for reading the other figures: `python -m drift_gate.bench.ceilings`.

Rates of a copy, of reading alone and of writing alone (a work that writes more than it reads is not
to be measured by a copy), of stores with other cache hints, and of the three products of an LM head
at several numbers of rows.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import torch

from . import timing
from .measure import device_name, quartiles

BYTES = 2 << 30
LAUNCHES = 9
HINTS = "", ".cs", ".cg", ".wt"  # of stores
TILE = 4096


def rate(run: Callable[[], object], work: float, device: torch.device) -> float:
    """Work a second, the median."""
    run()
    return work / quartiles(timing.launches(run, device, LAUNCHES))[1]


def memory(device: torch.device, size: int) -> Iterator[tuple[str, float]]:
    """TB/s by what is done."""
    x = torch.randint(-9, 9, (size // 4,), dtype=torch.int32, device=device)
    y = torch.empty_like(x)
    yield "copy", rate(lambda: y.copy_(x), 2e-12 * size, device)
    yield "read (sum)", rate(lambda: x.view(torch.float32).sum(), 1e-12 * size, device)
    yield "write (zero_)", rate(lambda: y.zero_(), 1e-12 * size, device)
    yield "write (fill_)", rate(lambda: y.fill_(3), 1e-12 * size, device)
    if device.type != "cuda":
        return
    from .fill import fill

    for hint in HINTS:
        store = functools.partial(fill, y, 3, hint, TILE)
        yield f"write (Triton{hint})", rate(store, 1e-12 * size, device)


def products(
    device: torch.device, vocab: int, width: int, rows: list[int]
) -> Iterator[tuple[str, float]]:
    """TFLOP/s of logits, grad_hidden and grad_weight by rows."""
    new = dict(device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, **new)
    grad_weight = torch.empty_like(weight)
    for n in rows:
        hidden, logits = torch.randn(n, width, **new), torch.empty(n, vocab, **new)
        flops = 2e-12 * n * vocab * width
        runs = {
            "logits": functools.partial(torch.mm, hidden, weight.t(), out=logits),
            "grad_hidden": functools.partial(torch.mm, logits, weight, out=hidden),
            "grad_weight": functools.partial(torch.mm, logits.t(), hidden, out=grad_weight),
        }
        for name, run in runs.items():
            yield f"{name}, {n:,} rows", rate(run, flops, device)
            hidden.normal_()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny inputs, as without a GPU")
    small = parser.parse_args().small or not torch.cuda.is_available()
    device = torch.device("cpu" if not torch.cuda.is_available() else "cuda")
    print(device_name(device))
    for name, found in memory(device, 1 << 16 if small else BYTES):
        print(f"  {found:7.3f} TB/s     {name}", flush=True)
    sizes = (99, 16, [8]) if small else (151_936, 4096, [2048, 2208, 4096, 8192])
    for name, found in products(device, *sizes):
        print(f"  {found:7.1f} TFLOP/s  {name}", flush=True)


if __name__ == "__main__":
    main()
