"""Peak memory of a trainer's step beside that of its own loss, on 1,024 x 32,000 logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from drift_gate.measure import peak_bytes

ROWS, WORDS = 1024, 32_000


def step_peaks(
    trainer: str, steps: dict[str, Callable[[torch.Tensor], torch.Tensor]], dtype=torch.bfloat16
) -> dict[str, float]:
    """MiB beside the logits [ROWS, WORDS] of each loss, forward and backward, the gradient
    included. Prints them, for the pages of the trainers (`make trainer-memory`)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, WORDS, generator=generator).to(dtype).requires_grad_()
    found = {}
    for name, loss in steps.items():
        for _ in range(2):  # the first call fills caches
            logits.grad = None
            with peak_bytes() as memory:
                loss(logits).backward()
        found[name] = memory.peak / 2**20
        print(f"\n{trainer}, {name}: {found[name]:.0f} MiB", end="")
    return found
