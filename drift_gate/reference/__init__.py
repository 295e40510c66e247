"""The specification: every loss in plain eager PyTorch, to be read beside the papers it cites.

Differentiable, in float64 where the inputs are, dense over the words and with Python loops over
sequences and blocks. It takes the arguments of the public functions as their callers give them,
already checked, but for those that spread a batch over calls, ranks or memory. It shares no code
with what it judges, and nothing calls it but tests, fuzzing and benchmarks.

    vocabulary  log-probs and logsumexp of logits
    linear      logits of a head
    gate        drift, blocks, weights
    sampled     losses of the sampled token
    lists       losses over the words that the teacher lists
    full        losses over the whole vocabulary
    batch       validity, weights, outputs: what all losses share
    reduction   from the losses of the positions to one
"""

from typing import Any

from torch import Tensor

from ..options import Head, as_head, as_reduction
from ..outputs import LossOutput, TopKOutput
from .full import student_full_loss
from .gate import gate_weights
from .linear import from_head, head_logits
from .lists import student_topk_loss
from .sampled import student_opd_loss
from .vocabulary import from_logits, student_gather_lse, student_log_probs, student_top_k


def token_log_probs(logits: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`drift_gate.token_log_probs`."""
    return student_log_probs(from_logits(logits), labels, **options)


def gather_lse(logits: Tensor, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`drift_gate.gather_lse`."""
    return student_gather_lse(from_logits(logits), ids, **options)


def top_k_log_probs(logits: Tensor, k: int, **options: Any) -> TopKOutput:
    """`drift_gate.top_k_log_probs`."""
    return student_top_k(from_logits(logits), k, **options)


def linear_token_log_probs(
    hidden_states: Tensor, head: Head | Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`drift_gate.linear_token_log_probs`."""
    return student_log_probs(from_head(hidden_states, head), labels, **options)


def linear_gather_lse(
    hidden_states: Tensor, head: Head | Tensor, ids: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """`drift_gate.linear_gather_lse`."""
    return student_gather_lse(from_head(hidden_states, head), ids, **options)


def linear_top_k_log_probs(
    hidden_states: Tensor, head: Head | Tensor, k: int, **options: Any
) -> TopKOutput:
    """`drift_gate.linear_top_k_log_probs`."""
    return student_top_k(from_head(hidden_states, head), k, **options)


def opd_loss(
    logits: Tensor,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    **options: Any,
) -> LossOutput:
    """`drift_gate.opd_loss`."""
    return student_opd_loss(
        from_logits(logits), labels, old_log_probs, teacher_log_probs, **options
    )


def topk_loss(
    logits: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    **options: Any,
) -> LossOutput:
    """`drift_gate.topk_loss`."""
    lists = teacher_topk_ids, teacher_topk_log_probs
    return student_topk_loss(from_logits(logits), labels, old_log_probs, *lists, **options)


def full_loss(
    logits: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_logits: Tensor,
    **options: Any,
) -> LossOutput:
    """`drift_gate.full_loss`."""
    return student_full_loss(from_logits(logits), labels, old_log_probs, teacher_logits, **options)


def linear_opd_loss(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    **options: Any,
) -> LossOutput:
    """`drift_gate.linear_opd_loss`."""
    student = from_head(hidden_states, head)
    output = student_opd_loss(student, labels, old_log_probs, teacher_log_probs, **options)
    return _tokens_detached(output, **options)


def linear_topk_loss(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    **options: Any,
) -> LossOutput:
    """`drift_gate.linear_topk_loss`."""
    student, lists = from_head(hidden_states, head), (teacher_topk_ids, teacher_topk_log_probs)
    output = student_topk_loss(student, labels, old_log_probs, *lists, **options)
    if options.get("support", "renormalized") == "renormalized":
        return output
    return _tokens_detached(output, **options)


def linear_full_loss(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_hidden_states: Tensor,
    teacher_head: Head | Tensor,
    **options: Any,
) -> LossOutput:
    """`drift_gate.linear_full_loss`."""
    teacher_logits = head_logits(teacher_hidden_states, as_head(teacher_head)).detach()
    student = from_head(hidden_states, head)
    output = student_full_loss(student, labels, old_log_probs, teacher_logits, **options)
    return _tokens_detached(output, **options)


def _tokens_detached(output: LossOutput, **options: Any) -> LossOutput:
    """The fused losses form gradients for `loss` alone, unless it is the tokens' losses."""
    if as_reduction(options.get("reduction", "token-mean")).mode == "none":
        return output
    return output._replace(token_loss=output.token_loss.detach())


__all__ = [
    "full_loss",
    "gate_weights",
    "gather_lse",
    "linear_full_loss",
    "linear_gather_lse",
    "linear_opd_loss",
    "linear_token_log_probs",
    "linear_top_k_log_probs",
    "linear_topk_loss",
    "opd_loss",
    "token_log_probs",
    "top_k_log_probs",
    "topk_loss",
]
