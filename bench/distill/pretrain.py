"""Make `weights/`: `python -m drift_gate.bench.distill.pretrain [student|teacher]` (minutes each).

Both learn worked solutions by cross entropy: the teacher right ones, the smaller student sloppy
ones, for long enough that carrying is a habit it lacks and not a skill: distillation can mend a
habit in a few hundred steps. One seed and one thread: a machine makes the same weights again.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import problems
from .models import SIZES, WEIGHTS, character_tokenizer, hidden_states, small_model
from .solutions import Solver

STEPS = {"teacher": 1000, "student": 3000}
FORGET = {"teacher": 0.0, "student": 0.6}  # share of carries that their solutions drop
BATCH = 32
POOL = 64 * BATCH  # examples that are sorted by length, so that batches need little padding
LEARNING_RATE = 3e-3
DRAWN = {"chain_sum": 4000, "products": 3000, "simple_equations": 400}  # at each level
SEED = 1000  # of the problems; runs take theirs from 0 upward


def batches(name: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens [B, T], their mask [B, T], and which of them are learned, [B, T], without end."""
    tokenizer = character_tokenizer()
    drawn = [
        problems.draw(level, count, SEED, stream=problems.TRAIN, sources=(source,))
        for level in range(len(problems.LEVELS))
        for source, count in DRAWN.items()
    ]
    solver, choice = Solver(FORGET[name], seed=0), random.Random(0)
    while True:
        examples = []
        for _ in range(POOL):
            problem = choice.choice(choice.choice(drawn))
            prompt = tokenizer.encode(f"{problem.question}\n")
            work = tokenizer.encode(solver.solve(problem))
            examples.append(([*prompt, *work, tokenizer.eos_token_id], len(prompt)))
        examples.sort(key=lambda example: len(example[0]))
        parts = [examples[i : i + BATCH] for i in range(0, POOL, BATCH)]
        choice.shuffle(parts)
        for part in parts:
            tokens = torch.full((BATCH, len(part[-1][0])), tokenizer.pad_token_id)
            learned = torch.zeros_like(tokens, dtype=torch.bool)
            for row, (ids, prompt_length) in enumerate(part):
                tokens[row, : len(ids)] = torch.tensor(ids)
                learned[row, prompt_length : len(ids)] = True
            yield tokens, tokens != tokenizer.pad_token_id, learned


def fit(name: str, steps: int) -> torch.nn.Module:
    """Train one model from its seed."""
    torch.manual_seed(0)
    model = small_model(name)
    optimizers = _optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
        for optimizer in optimizers
    ]
    for step, (tokens, mask, learned) in zip(range(1, steps + 1), batches(name), strict=False):
        hidden = hidden_states(model, tokens, mask, tokens.shape[1] - 1)
        logits = model.lm_head(hidden[learned[:, 1:]])
        loss = F.cross_entropy(logits, tokens[learned])
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if step % 50 == 0:
            print(f"{name} step {step}: loss {loss.item():.4f}", flush=True)
    return model


def _optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "layers" not in name]
    return [
        torch.optim.Muon(
            matrices, LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, LEARNING_RATE, weight_decay=0.0),
    ]


def _rate(done: float) -> float:
    """Share of the learning rate: a short warm-up, level, and down to a tenth in the last part."""
    return min(1.0, (done + 0.002) / 0.03, 0.1 + 0.9 * (1 - done) / 0.4)


def main() -> None:
    """Write the models in half precision, each beside the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[*SIZES, []], help="all, if left out")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.models or SIZES:
        model = fit(name, chosen.steps or STEPS[name])
        model.half().save_pretrained(chosen.out / name)
        character_tokenizer().save_pretrained(chosen.out / name)


if __name__ == "__main__":
    main()
