"""Calls of the public functions: by name, with tensors alone as arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import drift_gate as dg

from .full import draw_full
from .heads import FORMS, draw_head
from .problems import draw, draw_topk

LOSSES = tuple(name for name in dg.__all__ if name.endswith("_loss"))
OTHERS = "token_log_probs", "gather_lse", "linear_token_log_probs", "linear_gather_lse"
TOP_K = "top_k_log_probs", "linear_top_k_log_probs"
WITHOUT_GRADIENT = ("gate_weights", *TOP_K)
FUNCTIONS = (*LOSSES, *OTHERS, *WITHOUT_GRADIENT)
WORDS, WANTED = 21, 3


def arguments_of(name: str, *shape: int) -> tuple[Any, ...]:
    """What a function is called with, options aside; rows of this shape."""
    logits = draw(*shape, WORDS)
    ids = logits.labels[..., None]
    if name == "gate_weights":
        return logits.teacher_log_probs, logits.old_log_probs
    if name == "token_log_probs":
        return logits.logits, logits.labels
    if name == "gather_lse":
        return logits.logits, ids
    if name == "top_k_log_probs":  # the number of words is an option: see step_of
        return (logits.logits,)
    if name.startswith("linear_"):
        form = name.removeprefix("linear_").removesuffix("_loss")
        problem = draw_head(form if form in FORMS else "opd", *shape, vocab=WORDS)
        labels = problem.rest[0]
        rest = {"token_log_probs": [labels], "gather_lse": [labels[..., None]]}
        rest["top_k_log_probs"] = []
        return problem.hidden, problem.head, *rest.get(form, problem.rest)
    if name == "topk_loss":
        return draw_topk(*shape, WORDS, k=3).arguments()
    return (draw_full(*shape, WORDS) if name == "full_loss" else logits).arguments()


def step_of(name: str, **options: Any) -> Callable[..., Tensor]:
    """A function of `tensors_of`: the loss, or the sum of the results."""
    function = getattr(dg, name)
    if name in TOP_K:
        options = {"k": WANTED} | options

    def step(first: Tensor, *rest: Any) -> Tensor:
        if name.startswith("linear_"):
            weight, bias, *others = rest
            if name == "linear_full_loss":
                *others, teacher = others
                others = [*others, dg.Head(teacher, softcap=6.0)]
            result = function(first, dg.Head(weight, bias, softcap=6.0), *others, **options)
        else:
            result = function(first, *rest, **options)
        if isinstance(result, dg.LossOutput):
            return result.loss.sum()
        if isinstance(result, dg.GateOutput):
            return result.weights.sum()
        return sum(x.sum() for x in result if x is not None)

    return step


def tensors_of(name: str, *shape: int) -> list[Tensor]:
    """`arguments_of` with the parameters of heads in their place."""
    first, *rest = arguments_of(name, *shape)
    if not name.startswith("linear_"):
        return [first, *rest]
    head, *rest = rest
    if name == "linear_full_loss":
        rest[-1] = rest[-1].weight
    return [first, head.weight, head.bias, *rest]


def leaves_of(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """Those that a loss has gradients in, which now require them."""
    count = 0 if name in WITHOUT_GRADIENT else 3 if name.startswith("linear_") else 1
    return [x.requires_grad_() for x in tensors[:count]]
