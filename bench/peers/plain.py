"""Losses as trainers write them in eager PyTorch: the baselines, and what peers leave to do.

Each is a function of log-probs, so that it finishes a peer's work too; `drift_gate/eager.py` has
the gate and the sampled-token loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from drift_gate import eager

from ..inputs import Work

BLOCK = 64  # rows of a gate's block


class Rows:
    """Row data of one response in the work's rows, in the dtype asked for."""

    def __init__(self, work: Work, dtype: torch.dtype = torch.float32) -> None:
        n = work.case.rows
        self.labels = work.labels
        self.old, self.teacher = work.old.to(dtype), work.teacher.to(dtype)
        self.ones = torch.ones(n, dtype=dtype, device=work.device)
        self.blocks = eager.block_numbers([n], BLOCK).to(work.device)

    def sampled(self, now: Tensor) -> Tensor:
        """Gated clipped loss of sampled tokens from their log-probs, token mean."""
        losses = eager.row_loss(
            now.to(self.old.dtype), self.old, self.teacher, self.ones, self.blocks
        )
        return losses.mean()

    def clipped(self, now: Tensor) -> Tensor:
        """PPO's clipped loss: no gate, no dual clip."""
        now, advantage = now.to(self.old.dtype), self.teacher - self.old
        ratio = (now - self.old).exp()
        return -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    def gated(self, now: Tensor, losses: Tensor, every: int = 1) -> Tensor:
        """Token mean of position losses under the gate that the labels' log-probs give, those
        of every `every`-th row of a block."""
        with torch.no_grad():
            drift = self.old - now.to(self.old.dtype)
            if every > 1:
                drift = self._block_means(drift, every)
            weights = eager.drift_weights(drift, self.ones, self.blocks)
        return (weights * losses).mean()

    def _block_means(self, drift: Tensor, every: int) -> Tensor:
        """Each block's mean over every `every`-th of its rows, [N]."""
        seen = torch.arange(len(drift), device=drift.device) % BLOCK % every == 0
        counts, sums = (
            torch.zeros_like(drift).index_add(0, self.blocks, x)
            for x in (seen.to(drift.dtype), drift * seen)
        )
        return (sums / counts.clamp(min=1))[self.blocks]


def log_probs(logits: Tensor) -> Tensor:
    """log softmax in float32, [N, V]."""
    return logits.float().log_softmax(-1)


def at(table: Tensor, labels: Tensor) -> Tensor:
    """Entry of each row, [N]."""
    return table.gather(-1, labels[:, None])[:, 0]


def entropy(table: Tensor) -> Tensor:
    """Entropy of rows of log-probs, [N]."""
    return -(table.exp() * table).sum(-1)


def lsm(scores: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher), both renormalised over the list (arXiv 2603.25562); [N]."""
    log_p, log_q = scores.log_softmax(-1), log_q.to(scores.dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def truncated_forward(listed: Tensor, log_q: Tensor) -> Tensor:
    """sum q (log q - log p) over the list, neither renormalised: verl's and VeOmni's; [N]."""
    log_q = log_q.to(listed.dtype)
    return (log_q.exp() * (log_q - listed)).sum(-1)


def whole(log_p: Tensor, log_q: Tensor, direction: str, beta: float = 0.5) -> Tensor:
    """Divergence over the whole vocabulary, [N]."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return functional.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if direction == "reverse":
        return kl(log_p, log_q)
    if direction == "forward":
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
