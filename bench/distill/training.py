"""On-policy distillation with rollout reuse, through this package's losses."""

from __future__ import annotations

import dataclasses
import random
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from drift_gate import Clip, LossOutput, gate_weights, linear_opd_loss, linear_topk_loss

from .models import Pair, end_ids, head_of, hidden_states, newline_ids, prompt_ids
from .problems import Grader, Problem
from .rollouts import Rollouts, score
from .sampling import Nucleus, pad_left, respond
from .settings import Job, Settings, Variant

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Step = dict[str, Any]  # what one rollout batch showed, plain data


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on every number: a resumed run draws what it would have."""
    return torch.Generator().manual_seed(random.Random(repr(numbers)).getrandbits(62))


class Sampler:
    """Prompts and responses with one student's settings."""

    def __init__(self, pair: Pair, settings: Settings) -> None:
        self.pair, self.settings = pair, settings
        self.device = pair.student.device
        self.ends = end_ids(pair.student, pair.tokenizer)
        self.pad = pair.tokenizer.pad_token_id
        self.nucleus = Nucleus(settings.temperature, settings.top_p)

    def __call__(
        self, problems: list[Problem], generator: torch.Generator, model: Any = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Prompts (tokens, mask) and responses (tokens, mask), one a problem given."""
        ids = [prompt_ids(self.pair.tokenizer, problem.question) for problem in problems]
        tokens, mask = (part.to(self.device) for part in pad_left(ids, self.pad))
        model = model or self.pair.student
        # A response's shapes change with every token: layers that are compiled run as they were.
        with autocast(self.device), torch.compiler.set_stance("force_eager"):
            responses = respond(
                model, tokens, mask, most=self.settings.max_tokens, ends=self.ends, pad=self.pad,
                nucleus=self.nucleus, generator=generator,
            )  # fmt: skip
        return (tokens, mask), responses

    def texts(self, responses: Tensor) -> list[str]:
        """Responses [B, R] as text."""
        return self.pair.tokenizer.batch_decode(responses, skip_special_tokens=True)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 products on a GPU; nothing on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


class Trainer:
    """One variant's student on its way; `step` may be called until `settings.steps`."""

    def __init__(self, pair: Pair, job: Job, settings: Settings, problems: list[Problem]) -> None:
        self.pair, self.job, self.settings = pair, job, settings
        self.sampler, self.grader = Sampler(pair, settings), Grader()
        self.newlines = newline_ids(pair.tokenizer)
        self.order = list(problems)
        self.curve: list[Step] = []
        self.heat: list[list[float]] = []  # mean gate weight of each position, at every step
        self.heat_by_epoch: list[list[list[float]]] = []  # the same in every epoch, of gated runs
        self.seconds = 0.0
        pair.student.eval()  # dropout would make old and new log-probs differ on their own
        if settings.compile:
            pair.student.base_model.compile(dynamic=True)
        self.optimizer = torch.optim.AdamW(pair.student.parameters(), lr=settings.learning_rate)

    def state(self) -> dict[str, Any]:
        """For `load_state`; with the settings it decides all that follows."""
        return dict(
            model=self.pair.student.state_dict(), optimizer=self.optimizer.state_dict(),
            curve=self.curve, heat=self.heat, heat_by_epoch=self.heat_by_epoch,
            seconds=self.seconds,
        )  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.pair.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve, self.heat, self.seconds = state["curve"], state["heat"], state["seconds"]
        self.heat_by_epoch = state.get("heat_by_epoch", [])  # which 0.2.0 did not keep

    def problems_of(self, step: int) -> list[Problem]:
        """The prompts of a step: every variant sees the same in the same order."""
        wanted = range(step * self.settings.prompts, (step + 1) * self.settings.prompts)
        passes = {i // len(self.order) for i in wanted}
        shuffled = {
            number: random.Random(f"{self.job.seed} {number}").sample(self.order, len(self.order))
            for number in passes
        }
        return [shuffled[i // len(self.order)][i % len(self.order)] for i in wanted]

    def collect(self, step: int) -> tuple[Rollouts, Tensor]:
        """Sampled and scored responses, and which are right, [prompts, samples] bool."""
        settings = self.settings
        problems = [p for p in self.problems_of(step) for _ in range(settings.samples)]
        prompts, responses = self.sampler(problems, seeded(self.job.seed, step, 0))
        right = self.grader.all(problems, self.sampler.texts(responses[0]))
        with autocast(self.sampler.device):
            rollouts = score(
                self.pair, prompts, responses, newlines=self.newlines, top_k=settings.top_k,
                temperature=settings.temperature, backend=settings.backend,
            )  # fmt: skip
        return rollouts, torch.tensor(right).view(-1, settings.samples)

    def step(self) -> Step:
        """Sample a batch, train on it for the job's epochs, and say what happened."""
        start, number = time.perf_counter(), len(self.curve)
        rollouts, right = self.collect(number)
        order = seeded(self.job.seed, number, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(
                1.0, (number + 1) / self.settings.warmup
            )
        epochs, weights = [], []
        for _ in range(self.job.epochs):
            batches = list(rollouts.minibatches(self.settings.minibatch, order))
            parts = [(part.response_mask, self._update(part)) for part in batches]
            epochs.append(_of_epoch(parts) | _of_sampling(self.job.variant, batches, parts))
            weights.append(_by_position(parts))
        kl = (rollouts.old_log_probs - rollouts.teacher_log_probs)[rollouts.response_mask]
        shown = dict(
            loss=sum(epoch["loss"] for epoch in epochs) / len(epochs),
            accuracy=right.float().mean().item(),
            passed=right.any(1).float().mean().item(),  # prompts with a right response
            reverse_kl=kl.mean().item(),  # student || teacher, from the sampled tokens
            length=rollouts.response_mask.sum().item() / len(rollouts.tokens),
            epochs=epochs,
        )
        self.heat.append(weights[-1])
        if self.job.variant.gate is not None:
            self.heat_by_epoch.append(weights)
        self.curve.append(shown)
        self.seconds += time.perf_counter() - start
        return shown

    def _update(self, rollouts: Rollouts) -> LossOutput:
        """One optimiser step on a mini-batch."""
        student = self.pair.student
        with autocast(self.sampler.device):
            hidden = hidden_states(
                student, rollouts.tokens, rollouts.mask, rollouts.labels.shape[1]
            )
            output = loss_of(self.job.variant, rollouts, hidden, student, self.settings)
        self.optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), self.settings.gradient_norm)
        self.optimizer.step()
        return output


def loss_of(
    variant: Variant, rollouts: Rollouts, hidden: Tensor, student: Any, settings: Settings
) -> LossOutput:
    """The variant's loss of a mini-batch, from the student's hidden states [B, R, H]."""
    options: dict[str, Any] = dict(
        gate=variant.gate, response_mask=rollouts.response_mask,
        temperature=settings.temperature, backend=settings.backend,
    )  # fmt: skip
    if variant.gate is not None and variant.gate.granularity == "span":
        options["span_ids"] = rollouts.spans
    inputs = hidden, head_of(student), rollouts.labels, rollouts.old_log_probs
    if variant.loss == "opd":
        options |= dict(
            clip=Clip(low=settings.clip, high=settings.clip), advantage=settings.advantage
        )
        return linear_opd_loss(*inputs, rollouts.teacher_log_probs, **options)
    lists = rollouts.teacher_topk_ids, rollouts.teacher_topk_log_probs
    return linear_topk_loss(*inputs, *lists, **options)


def _of_epoch(parts: list[tuple[Tensor, LossOutput]]) -> dict[str, Any]:
    """Loss, and how drift and gate weights were spread over the valid positions of an epoch."""
    drift = torch.cat([output.drift[mask] for mask, output in parts])
    drift = drift[~drift.isnan()]  # NaN where a gate does not measure it
    weight = torch.cat([output.gate[mask] for mask, output in parts])
    at = torch.tensor(QUANTILES, device=drift.device)

    def mean(name: str) -> float:
        return sum(output.metrics[name].item() for _, output in parts) / len(parts)

    return dict(
        loss=sum(output.loss.item() for _, output in parts) / len(parts),
        drift_abs=drift.abs().mean().item(),
        drift_noise=mean("drift_noise"),
        drift_signed=drift.mean().item(),
        drift_abs_quantiles=drift.abs().quantile(at).tolist(),
        gate_mean_raw=mean("gate_mean_raw") if "gate_mean_raw" in parts[0][1].metrics else 1.0,
        weight_quantiles=weight.quantile(at).tolist(),
        effective_share=(weight.sum() ** 2 / (weight**2).sum() / len(weight)).item(),
    )


def _of_sampling(
    variant: Variant, batches: list[Rollouts], parts: list[tuple[Tensor, LossOutput]]
) -> dict[str, float]:
    """Of a gate that measures some positions: its weights beside those of the drift at all."""
    gate = variant.gate
    if gate is None or gate.sample_every == 1:
        return {}
    whole = dataclasses.replace(gate, sample_every=1)
    found, wanted = [], []
    for rollouts, (mask, output) in zip(batches, parts, strict=True):
        old = rollouts.old_log_probs
        spans = rollouts.spans if gate.granularity == "span" else None
        exact = gate_weights(output.log_probs, old, whole, response_mask=mask, span_ids=spans)
        found.append(output.gate[mask])
        wanted.append(exact.weights[mask])
    both = torch.stack([torch.cat(found), torch.cat(wanted)]).double()
    correlation = torch.corrcoef(both)[0, 1].nan_to_num(1.0)  # where no weight differs from 1
    difference = (both[0] - both[1]).abs()
    return dict(
        sampled_correlation=correlation.item(),
        sampled_difference=difference.mean().item(),
        sampled_largest_difference=difference.max().item(),
    )


def _by_position(parts: list[tuple[Tensor, LossOutput]]) -> list[float]:
    """Mean gate weight of each response position in an epoch; the last positions are the rarest."""
    mask = torch.cat([mask for mask, _ in parts])
    weight = torch.cat([output.gate for _, output in parts])
    counts = mask.sum(0)
    means = (weight * mask).sum(0) / counts.clamp(min=1)
    return [round(value, 4) for value in means[counts > 0].tolist()]
