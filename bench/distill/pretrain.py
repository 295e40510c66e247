"""Make `weights.pt`: `python -m drift_gate.bench.distill.pretrain` (some minutes).

Both learn worked solutions by cross entropy: the teacher right ones, the smaller student sloppy
ones, in which every other carry is forgotten. One seed and one thread: a machine makes the same
bits again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import task
from .model import SIZES, WEIGHTS, Model, respond

STEPS = {"teacher": 1500, "student": 1200}
FORGET = {"teacher": 0.0, "student": 0.5}  # share of carries that their solutions drop
BATCH = 64
LEARNING_RATE = 2e-3


def batch(forget: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, T], labels [B, RESPONSE] and their mask: up to and with the first end."""
    pairs = task.draw_pairs(BATCH, generator, held_out=False)
    labels = task.solutions(pairs, forget, generator)
    return torch.cat([task.prompts(pairs), labels[:, :-1]], 1), labels, task.response_mask(labels)


def fit(name: str) -> Model:
    """Train one model from its seed."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Model(**SIZES[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS[name], pct_start=0.1
    )
    held_out = task.draw_pairs(200, generator, held_out=True)
    for step in range(1, STEPS[name] + 1):
        tokens, labels, mask = batch(FORGET[name], generator)
        loss = F.cross_entropy(model(tokens, task.PROMPT - 1)[mask], labels[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = task.accuracy(held_out, respond(model, task.prompts(held_out), None))
            print(f"{name} step {step}: loss {loss.item():.4f}, accuracy {right:.3f}", flush=True)
    return model


def main() -> None:
    """Write both models in half precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    models = {name: fit(name).half().state_dict() for name in SIZES}
    torch.save(models, out)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
