"""Ops of the teacher's top-K: which entries count, and the divergence over them."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import torch_topk

MISSING = -1


@custom_op("drift_gate::topk_support", mutates_args=())
def topk_support(
    ids: Tensor,
    teacher: Tensor,
    valid: Tensor,
    vocab: int,
    check_range: bool,
    check_duplicates: bool,
) -> tuple[Tensor, Tensor]:
    """Entries that count, present [N, K] bool, and valid rows that have any, [N] bool.

    An entry is missing where its id is -1 or its log-prob -inf. The checks read values (on a GPU
    they synchronise) and raise ValueError.
    """
    present = (ids != MISSING) & (teacher != -torch.inf)
    counted = present & valid[:, None]
    if check_range:
        bad = counted & ((ids < 0) | (ids >= vocab))
        if bad.any():
            row, k = bad.nonzero()[0].tolist()
            raise ValueError(
                f"teacher_topk_ids must lie in [0, {vocab}) or be {MISSING} where missing; "
                f"got {int(ids[row, k])} at row {row}, entry {k}"
            )
    if check_duplicates:
        ordered = ids.masked_fill(~counted, MISSING).sort(-1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != MISSING)
        if twice.any():
            row, k = twice.nonzero()[0].tolist()
            raise ValueError(
                "teacher_topk_ids must not list a word twice in a row; "
                f"got {int(ordered[row, k])} twice in row {row}"
            )
    return present, valid & present.any(-1)


@topk_support.register_fake
def _(
    ids: Tensor,
    teacher: Tensor,
    valid: Tensor,
    vocab: int,
    check_range: bool,
    check_duplicates: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(ids, dtype=torch.bool), torch.empty_like(valid)


@custom_op("drift_gate::topk_rows", mutates_args=())
def topk_rows(
    scores: Tensor,
    log_probs: Tensor | None,
    teacher: Tensor,
    present: Tensor,
    valid: Tensor,
    direction: str,
    support: str,
    beta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Divergence of student and teacher over the listed words.

    Args:
        scores: [N, K] of the student: logits with support "renormalized", else log-probs.
        log_probs: [N, K] of the student, for its mass on the support; or None.
        teacher: [N, K] log-probs (with "renormalized" any logits).
        present: [N, K] bool; valid: [N] bool.
        direction: "reverse", "forward" or "jsd", whose mixture weighs the teacher by `beta`.
        support: "renormalized", "truncated" or "tail".

    Returns:
        rows [4, N]: loss, student mass, teacher mass, overlap (sum of min(p, q)); and the slope
        [N, K] of the loss in the scores. 0 where not valid. Differentiable in `scores` through the
        loss.
    """
    if backend == "triton":
        from .kernels.topk import LONGEST
        from .kernels.topk import topk_rows as run

        if scores.shape[1] > LONGEST:
            run = torch_topk.topk_rows
    else:
        run = torch_topk.topk_rows
    result: tuple[Tensor, Tensor] = run(
        scores, log_probs, teacher, present, valid, direction, support, beta
    )
    return result


@topk_rows.register_fake
def _(
    scores: Tensor,
    log_probs: Tensor | None,
    teacher: Tensor,
    present: Tensor,
    valid: Tensor,
    direction: str,
    support: str,
    beta: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(4, scores.shape[0]), torch.empty_like(scores)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(
    ctx: Any, grad_rows: Tensor | None, grad_slope: Tensor | None
) -> tuple[Tensor | None, ...]:
    (slope,) = ctx.saved_tensors
    grad = None if grad_rows is None else slope * grad_rows[0][:, None]
    return (grad, *(None,) * 8)


topk_rows.register_autograd(_backward, setup_context=_setup_context)
