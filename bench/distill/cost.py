"""Time and memory of the fused losses beside the eager ones, on a batch of the run itself, and on
fewer positions of a model with the words of Qwen3, where the logits are most of the work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drift_gate import eager

from ..measure import peak_bytes, quartiles
from ..peers import plain
from ..timing import interleaved
from .jobs import Work
from .models import head_of, hidden_states, load_pair, logits_of
from .rollouts import Rollouts
from .settings import Job, Settings, Variant, variants
from .training import Trainer, autocast, loss_of

ROUNDS = 9
WORDS, POSITIONS = 151_936, 256


class Problem(NamedTuple):
    """What the losses are of."""

    batch: Rollouts
    hidden: Tensor  # [B, R, H]
    student: Any  # a model, or what has a head
    rounds: int


class WideStudent:
    """Stands for a model: the head alone."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.device, self.config = device, SimpleNamespace()
        self.layer = torch.nn.Linear(width, WORDS, bias=False, device=device)

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.layer


def measure(work: Work) -> list[dict[str, Any]]:
    """One row a loss and size: seconds and peak bytes of forward and backward, ours and eager.

    From the hidden states of the first mini-batch to the gradients of hidden states and head,
    with the fixed-block gate.
    """
    settings = work.settings
    pair = load_pair(*settings.model_paths(), torch.device(settings.device))
    gated = [v for v in variants(settings) if v.gate and v.gate.granularity == "block"]
    chosen = {variant.loss: variant for variant in reversed(gated) if variant.epochs is None}
    trainer = Trainer(pair, Job(gated[0], 1, settings.seed), settings, work.training)
    rollouts, _ = trainer.collect(0)
    batch = Rollouts(*(field[: settings.minibatch] for field in rollouts))
    with torch.no_grad(), autocast(pair.student.device):
        hidden = hidden_states(pair.student, batch.tokens, batch.mask, batch.labels.shape[1])
    own = Problem(batch, hidden.detach().requires_grad_(), pair.student, ROUNDS)
    found = []
    for problem in (own, _wide(own, settings.top_k)):
        for loss in ("opd", "lsm"):
            runs = _runs(chosen[loss], problem, settings)
            words, width = head_of(problem.student).weight.shape
            shape = dict(positions=problem.batch.labels.numel(), hidden=width, words=words)
            costs = _compare(runs, pair.student.device, problem.rounds)
            found.append(dict(loss=loss, **shape, **costs))
    return found


def _wide(own: Problem, top_k: int) -> Problem:
    """The first valid positions of a batch as one response, before a head of many words."""
    device, mask = own.hidden.device, own.batch.response_mask
    hidden = own.hidden.detach()[mask][None, :POSITIONS]
    shape = hidden.shape[:2]
    generator = torch.Generator().manual_seed(0)

    def some(values: Tensor) -> Tensor:
        return values[mask][None, :POSITIONS]

    labels, ids = (
        torch.randint(WORDS // top_k, size, generator=generator).to(device)
        for size in (shape, (*shape, top_k))
    )
    whole = torch.ones_like(labels, dtype=torch.bool)
    batch = Rollouts(
        labels, whole, whole, some(own.batch.spans), some(own.batch.old_log_probs),
        some(own.batch.teacher_log_probs),
        ids * top_k + torch.arange(top_k, device=device),  # no word twice
        torch.randn(*shape, top_k, generator=generator).to(device).log_softmax(-1),
    )  # fmt: skip
    student = WideStudent(hidden.shape[2], device)
    return Problem(batch, hidden.requires_grad_(), student, 1 + ROUNDS // 2)


def _runs(
    variant: Variant, problem: Problem, settings: Settings
) -> dict[str, Callable[[], object]]:
    batch, hidden, student, _ = problem
    weight = head_of(student).weight
    mask, labels = batch.response_mask.flatten().float(), batch.labels.flatten()
    blocks = _blocks(batch.response_mask, settings.block_size)
    old, teacher = batch.old_log_probs.flatten(), batch.teacher_log_probs.flatten()
    ids, listed = batch.teacher_topk_ids.flatten(0, 1), batch.teacher_topk_log_probs.flatten(0, 1)

    def fused() -> object:
        with autocast(student.device):
            output = loss_of(variant, batch, hidden, student, settings)
        return torch.autograd.grad(output.loss, [hidden, weight])

    def eagerly() -> object:
        with autocast(student.device):
            logits = logits_of(student, hidden.flatten(0, 1)) / settings.temperature
        if variant.loss == "opd":
            loss = eager.loss(logits, labels, old, teacher, mask, blocks)
        else:
            log_probs = logits.log_softmax(-1)
            losses = plain.lsm(log_probs.gather(-1, ids), listed)
            with torch.no_grad():
                drift = (old - log_probs.gather(-1, labels[:, None])[:, 0]) * mask
                weights = eager.drift_weights(drift, mask, blocks)
            loss = (weights * losses).sum() / mask.sum()
        return torch.autograd.grad(loss, [hidden, weight])

    return {"fused": fused, "eager": eagerly}


def _blocks(mask: Tensor, size: int) -> Tensor:
    """Number of each position's block, [B * R]; responses begin at the first column."""
    count, length = mask.shape
    per_row = -(-length // size)
    row = torch.arange(count, device=mask.device)[:, None] * per_row
    return (row + torch.arange(length, device=mask.device) // size).flatten()


def _compare(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Any]:
    memory = {}
    for name, run in runs.items():
        run()  # what is allocated once is not counted
        with peak_bytes(device) as peak:
            run()
        memory[name] = peak.peak
    pairs = {name: (_nothing, run) for name, run in runs.items()}
    *_, timed = interleaved(pairs, device, rounds)
    seconds = {name: quartiles([min(launch) for launch in timed[name]]) for name in runs}
    return dict(bytes=memory, seconds=seconds)


def _nothing() -> None:
    """There is nothing to prepare."""
