"""Problems of the `linear_` forms, and their comparison with the reference and with each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import drift_gate as dg

from .judge import PER_TOKEN, metric_of
from .numerics import assert_as_good_as
from .problems import log_probs_of, move, per_token

FORMS = ("opd", "topk", "full")


@dataclasses.dataclass
class HeadProblem:
    """Arguments of a `linear_` loss; `rest` follows the head, row data or the teacher's."""

    form: str
    hidden: Tensor  # [..., H]
    head: dg.Head
    rest: list[Any]
    options: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        return self.head.bias

    @property
    def function(self) -> Callable[..., dg.LossOutput]:
        return getattr(dg, f"linear_{self.form}_loss")

    def to(self, target: torch.device | torch.dtype) -> HeadProblem:
        """On another device; or hidden states, head and log-probs in another dtype."""
        hidden, head = move(self.hidden, target), move(self.head, target)
        rest = [move(x, target) for x in self.rest]
        options = {name: move(value, target) for name, value in self.options.items()}
        return HeadProblem(self.form, hidden, head, rest, options)

    def head_of(
        self, weight: Tensor, bias: Tensor | None = None, chunk_size: int | None = None
    ) -> dg.Head:
        """The head with other parameters, and in other chunks where they are given."""
        size = chunk_size or self.head.chunk_size
        return dataclasses.replace(self.head, weight=weight, bias=bias, chunk_size=size)


def draw_head(
    form: str,
    *shape: int,
    vocab: int = 211,  # not a multiple of any tile
    width: int = 24,
    k: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    softcap: float | None = 6.0,  # the logits lie within +-10: it bends them
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,  # of the teacher's head, too
    masked: float = 0.0,
    **options: Any,
) -> HeadProblem:
    """Hidden states [*shape, H] whose logits are like a model's; a teacher some way off."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    hidden = normal(*shape, width).to(dtype)
    weight = (normal(vocab, width) / 2).to(dtype)
    shift = normal(vocab).to(dtype) if bias else None
    logits = hidden.float() @ weight.float().T
    if shift is not None:
        logits = logits + shift.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    labels = logits.softmax(-1).reshape(-1, vocab).multinomial(1, generator=generator).view(shape)
    old = log_probs_of(logits + 0.3 * normal(*shape, vocab), labels)
    teacher = logits + normal(*shape, vocab)
    if masked:
        options["response_mask"] = torch.rand(*shape, generator=generator) >= masked
    if form == "opd":
        rest = [labels, old, log_probs_of(teacher, labels)]
    elif form == "topk":
        log_q, ids = teacher.log_softmax(-1).topk(k)
        rest = [labels, old, ids, log_q]
    else:
        theirs = normal(*shape, width + 8).to(dtype)
        their_weight = normal(vocab, width + 8).to(dtype)
        their_head = dg.Head(their_weight, softcap=softcap, logits_dtype=logits_dtype)
        rest = [labels, old, theirs, their_head]
    head = dg.Head(weight, shift, softcap, logit_scale, chunk_size, logits_dtype)
    return HeadProblem(form, hidden, head, rest, options)


def run_head(
    problem: HeadProblem,
    backend: str,
    upstream: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Any,
) -> tuple[dg.LossOutput, list[Tensor]]:
    """A loss and the gradients of hidden states, weight and bias."""
    leaves = [
        x.detach().clone().requires_grad_()
        for x in (problem.hidden, problem.weight, problem.bias)
        if x is not None
    ]
    merged = {"return_entropy": True, **problem.options, **options, "backend": backend}
    head = problem.head_of(*leaves[1:], chunk_size=chunk_size)
    result = problem.function(leaves[0], head, *problem.rest, **merged)
    return result, list(torch.autograd.grad(result.loss, leaves, upstream))


def assert_same_budget(
    problems: HeadProblem | list[HeadProblem],
    backend: str,
    *,
    device: Any = "cpu",
    metrics: bool = True,
    of_words: int = 1,
    **options: Any,
) -> None:
    """Loss, per-token outputs, metrics and all gradients are as good as eager PyTorch's.

    Of several problems each result is judged together: where the hidden states are rounded
    differently from the eager code's, whether one scalar is nearer the truth is chance. of_words is
    how many columns of grad_weight share the rounding of one word's coefficients.
    """
    several = problems if isinstance(problems, list) else [problems]
    runs = [_three_runs(problem, backend, device, metrics, options) for problem in several]
    for name in runs[0]:
        got, eager, truth = zip(*(run[name] for run in runs), strict=True)
        if name == "drift_noise":  # of the logits' dtype, which the truth has not
            for pair in zip(got, eager, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-6, equal_nan=True)
            continue
        if not truth[0].is_floating_point():
            assert all(map(torch.equal, got, truth)), name
            continue
        together = of_words if name == "gradient of weight" else 1
        triple = torch.cat(got), torch.cat(eager), torch.cat(truth)
        assert_as_good_as(*triple, name=name, together=together)


def _three_runs(
    problem: HeadProblem, backend: str, device: Any, metrics: bool, options: dict[str, Any]
) -> dict[str, tuple[Tensor, ...]]:
    """By name, each flattened: the result, eager PyTorch's, and the float64 truth."""
    shape = problem.hidden.shape[:-1]
    apart = per_token({**problem.options, **options})
    weights = torch.linspace(-1, 1, shape.numel()).view(shape) if apart else None

    def run(p: HeadProblem, name: str, where: Any) -> dict[str, Tensor]:
        dtype = torch.promote_types(p.hidden.dtype, torch.float32)
        upstream = None if weights is None else weights.to(where, dtype)
        result, grads = run_head(p.to(torch.device(where)), name, upstream, **options)
        tensors = {key: getattr(result, key) for key in ("loss", *PER_TOKEN)}
        tensors |= {name: metric_of(name, result) for name in result.metrics if metrics}
        names = ("hidden", "weight", "bias")
        tensors |= {f"gradient of {k}": g for k, g in zip(names, grads, strict=False)}
        return {k: x.detach().cpu().reshape(-1) for k, x in tensors.items() if x is not None}

    got = run(problem, backend, device)
    eager = run(problem, "reference", "cpu")
    truth = run(problem.to(torch.float64), "reference", "cpu")
    assert got.keys() == eager.keys() == truth.keys()
    return {key: (got[key], eager[key], truth[key]) for key in truth}
