"""Time against memory of the fused head, by rows a chunk: `python -m drift_gate.bench.chunks`.

Files of `--out` in bench/results become a table of the README.

`linear_opd_loss`, forward and backward, beside the three bare products with the head in chunks of
8,192 rows, in the same rounds with pauses between. Memory is the peak of a call on a GPU beyond its
inputs and the gradients that are returned.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from drift_gate import Head, linear_opd_loss, linear_token_log_probs

from .internals import chunk_rows
from .measure import environment

PRODUCT_ROWS = 8192
ROUNDS, WARM = 4, 1
PAUSE = 0.1  # seconds: clocks drop under load
BY_ROWS = "rows a chunk"  # marks the files


def losses(
    n_rows: int, vocab: int, width: int, sizes: list[int | None], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Calls by name: "products", and each number of rows a chunk."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    hidden = torch.randn(1, n_rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (1, n_rows), device=device)
    with torch.no_grad():
        now, _ = linear_token_log_probs(hidden, weight, labels)
    rows = labels, now + 0.01 * torch.randn_like(now), now + torch.randn_like(now)
    h, w = hidden.detach()[0], weight.detach()
    gradient = 1e-3 * torch.randn(min(PRODUCT_ROWS, n_rows), vocab, device=device).to(dtype)
    logits = torch.empty_like(gradient)

    def products() -> None:
        for part in h.split(len(gradient)):
            n = len(part)
            torch.mm(part, w.t(), out=logits[:n])
            torch.mm(gradient[:n], w)
            torch.mm(gradient[:n].t(), part)

    def call(size: int | None) -> Callable[[], object]:
        def run() -> object:
            head = Head(weight, chunk_size=size)
            loss = linear_opd_loss(hidden, head, *rows, estimator="k1", ignore_index=None).loss
            return torch.autograd.grad(loss, (hidden, weight))

        return run

    return {"products": products, **{str(size or "default"): call(size) for size in sizes}}


def measured(calls: dict[str, Callable[[], object]], on_gpu: bool) -> dict[str, list[float]]:
    """Of each call the median seconds and GiB."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peak = dict.fromkeys(calls, 0.0)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(PAUSE)
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            result = call()
            if on_gpu:
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            seconds[name].append(time.perf_counter() - start)
            del result
    return {name: [median(seconds[name][WARM:]), peak[name]] for name in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--sizes", type=int, nargs="*", default=[4096, 2048, 1024])
    parser.add_argument("--out", type=Path, help="a file for what is printed")
    chosen = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = losses(chosen.rows, chosen.vocab, chosen.width, [None, *chosen.sizes], device)
    found = measured(calls, device.type == "cuda")
    gradients = 2 * chosen.width * (chosen.rows + chosen.vocab) / 2**30
    base = found["products"][0]
    table = {
        name: {
            "ms": 1e3 * seconds,
            "over_products": seconds / base,
            "extra_gib": None if name == "products" or not peak else peak - gradients,
        }
        for name, (seconds, peak) in found.items()
    }
    table["default"]["rows"] = chunk_rows(chosen.vocab, device)
    sizes = {name: getattr(chosen, name) for name in ("rows", "vocab", "width")}
    data = {"machine": environment(device), **sizes, BY_ROWS: table}
    text = json.dumps(data, indent=1)
    print(text)
    if chosen.out is not None:
        chosen.out.write_text(text + "\n")


def found_in(folder: Path) -> dict[str, Any] | None:
    """The newest of the files of `--out` in a folder of results; None without any."""
    files = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    ours = [data for data in files if isinstance(data, dict) and BY_ROWS in data]
    return max(ours, key=lambda data: data["machine"]["date"], default=None)


def markdown(folder: Path) -> list[str]:
    """Lines of the table of the README."""
    data = found_in(folder)
    if data is None:
        return []
    machine, table = data["machine"], dict(data[BY_ROWS])
    products = table.pop("products")
    text = [
        f"Time against memory of `linear_opd_loss`, by rows a chunk (forward and backward, "
        f"{data['rows']:,} x {data['vocab']:,}, H {data['width']:,}, bfloat16; "
        f"{machine['device']}, {machine['date']}, commit {machine['commit']}): the bare products "
        f"take {products['ms']:.4g} ms; memory is that beyond inputs and gradients.",
        "",
        "| rows a chunk | ms | over the products | GiB |",
        "|---|---:|---:|---:|",
    ]
    for name, row in table.items():
        rows = f"{int(name):,}" if name.isdigit() else name
        if "rows" in row:
            rows = f"{row['rows']:,} ({name})"
        extra = "-" if row["extra_gib"] is None else f"{row['extra_gib']:.3g}"
        text.append(f"| {rows} | {row['ms']:.4g} | {row['over_products']:.3g} | {extra} |")
    return [*text, ""]


if __name__ == "__main__":
    main()
