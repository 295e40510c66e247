"""What the benchmarks take from inside the package; everything else of it is public or a launcher.

The passes and row functions have no public name of their own. Suites that time one of them alone
call it here, so that a change inside the package is followed in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from drift_gate import budget
from drift_gate.call import gradients
from drift_gate.head.check import chunk_sizes
from drift_gate.parallel import words
from drift_gate.passes import backends, native
from drift_gate.passes import torch as plain
from drift_gate.passes.rules import (
    COEFFICIENT,
    SLOPE,
    GateRule,
    PositionRule,
    ReduceRule,
    RowData,
)

HAS_TRITON = backends.HAS_TRITON
allowed_of, FACTOR = budget.allowed_of, budget.FACTOR


def backend(x: Tensor) -> str:
    """The backend that "auto" takes for a tensor."""
    return backends.resolve("auto", x)


def passes(x: Tensor) -> Any:
    """The passes that "auto" takes for a tensor."""
    return backends.passes_of(backend(x))


@contextmanager
def recorded_passes(x: Tensor) -> Iterator[None]:
    """Let torch.profiler see each pass over this tensor as an operation, drift_gate::NAME."""
    run = passes(x)

    def recorded(name: str) -> Callable[..., Any]:
        call = getattr(run, name)

        def wrapper(*arguments: Any) -> Any:
            with torch.profiler.record_function(f"drift_gate::{name}"):
                return call(*arguments)

        return wrapper

    with ExitStack() as stack:
        for name in plain.__all__:  # which every backend has
            stack.enter_context(mock.patch.object(run, name, recorded(name)))
        yield


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Let backend="triton" take CPU tensors, and check no values, as on a GPU."""
    run = backends.passes_of("triton")
    valid_rows, topk_support = run.valid_rows, run.topk_support
    unread = {
        "valid_rows": lambda *given: valid_rows(*given[:-1], False),
        "topk_support": lambda *given: topk_support(*given[:-2], False, False),
    }
    with backends.triton_on_cpu(), mock.patch.multiple(run, **unread):
        yield


def chunk_rows(vocab: int, device: torch.device) -> int:
    """Rows a chunk of a fused head of so many words in bfloat16, unless the caller says."""
    weight = torch.empty(0, dtype=torch.bfloat16, device=device)
    rows, _ = chunk_sizes("", None, weight, vocab)
    return rows


def instruction_set() -> str:
    """What the functions in C were compiled for; "none" without them."""
    return native.instruction_set() or "none"


def scan(logits: Tensor, ids: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor]:
    """Log-probs of ids [N, K] and entropy ([N], or empty) of logits [N, V], from one read."""
    _, log_probs, _, _, entropy = passes(logits).scan(logits[None], ids, None, 1.0, with_entropy)
    return log_probs, entropy


def expansion(
    logits: Tensor, ids: Tensor, alpha: Tensor, beta: Tensor, inplace: bool
) -> Callable[[Tensor], Tensor]:
    """The backward pass: from logits [N, V] to their gradient, in new memory or in place."""
    run, whole = passes(logits), words.Shard(logits.shape[1])
    gathered, _, maximum, log_sum, _ = run.scan(logits.detach()[None], ids, None, 1.0, False)
    row_data = ids, maximum, log_sum, gathered, None, alpha, beta, 1.0, whole, inplace

    def expand(leaf: Tensor) -> Tensor:
        return gradients.expand(backend(leaf), leaf[None], *row_data)[0]

    return expand


class _Sloped(torch.autograd.Function):
    """A function of `x` whose value and slope are known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * upstream[(..., *[None] * (slope.dim() - upstream.dim()))], None, None


def sampled_token_loss(now: Tensor, old: Tensor, teacher: Tensor, block_size: int) -> Tensor:
    """Gated clipped loss of one sequence of sampled tokens, [N] each, token mean."""
    leaf, valid = now.detach(), torch.ones_like(now, dtype=torch.bool)
    data = RowData(valid, leaf, old, None, None, len(now))
    gate = GateRule("block", block_size, tau=1.0, normalize="batch")
    position, reduce = PositionRule("ppo", dual=3.0), ReduceRule(1.0, "tokens")
    done = passes(now).finish(data, gate, None, None, teacher, position, reduce)
    slope = done.table[SLOPE] * done.table[COEFFICIENT]
    return _Sloped.apply(now, done.loss, slope)


def local_support_losses(scores: Tensor, log_q: Tensor) -> Tensor:
    """LSM of each row of listed logits [N, K], [N]."""
    present = torch.ones_like(scores, dtype=torch.bool)
    rows, slope = passes(scores).topk_rows(
        scores.detach(), None, log_q, present, present[:, 0].contiguous(), "reverse",
        "renormalized", 0.5,
    )  # fmt: skip
    return _Sloped.apply(scores, rows[0], slope)


def by_word(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Entries of ids [N, K] sorted by word: where each word's start [V + 1], and their order."""
    return plain.by_word(ids, vocab)
