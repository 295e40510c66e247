"""Row functions as torch.library ops: they see `[N]` data only and know nothing of the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import torch_rows

METRICS = (
    "gate_mean_raw",
    "gate_min",
    "gate_max",
    "gate_ess",
    "drift_abs",
    "drift_signed",
    "pg_clipfrac",
    "ppo_kl",
    "valid_tokens",
)


LARGEST_DRIFT = 2.0**126  # stands for infinity where a call is a part of its batch


def part_blocks(blocks: Tensor, normalize: str, tau: float) -> Tensor:
    """`row_blocks` of a part of a batch: infinite drifts of blocks can be told apart from nothing.

    A part whose gates are all 0 then has weights, which the rest of the batch makes 0.
    """
    if normalize != "batch" or tau == 0:
        return blocks
    return torch.cat([blocks[:1], blocks[1:2].clamp(max=LARGEST_DRIFT), blocks[2:]])


def _range_error(name: str, values: Tensor, bad: Tensor, wanted: str) -> ValueError:
    where = bad.nonzero()[0].tolist()
    value = values[tuple(where)].item()
    return ValueError(f"{name} must {wanted}; got {value} at index {where}")


@custom_op("drift_gate::valid_rows", mutates_args=())
def valid_rows(
    labels: Tensor,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    vocab: int,
    check: bool,
) -> Tensor:
    """valid [N] bool: in the response mask, and label not ignored.

    With `check` (it reads values: on a GPU it synchronises) a valid label outside [0, vocab) or
    `cu_seqlens` that do not cut N rows raise ValueError.
    """
    valid = labels != ignore_index
    if response_mask is not None:
        valid &= response_mask.bool()
    if check:
        bad = valid & ((labels < 0) | (labels >= vocab))
        if bad.any():
            wanted = f"lie in [0, {vocab}) or equal ignore_index ({ignore_index})"
            raise _range_error("labels", labels, bad, wanted)
        if cu_seqlens is not None:
            check_borders(cu_seqlens, labels.shape[0])
    return valid


@valid_rows.register_fake
def _(
    labels: Tensor,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    vocab: int,
    check: bool,
) -> Tensor:
    return torch.empty(labels.shape, dtype=torch.bool, device=labels.device)


def check_borders(cu_seqlens: Tensor, n_rows: int) -> None:
    """Raise ValueError unless cu_seqlens rises from 0 to n_rows."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_rows or (cu_seqlens.diff() < 0).any():
        shown = cu_seqlens.tolist()
        shown = shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]
        raise ValueError(
            f"cu_seqlens must rise from 0 to {n_rows}, the number of rows; got {shown}"
        )


@custom_op("drift_gate::row_blocks", mutates_args=())
def row_blocks(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    valid: Tensor,
    span_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    granularity: str,
    block_size: int,
    aggregate: str,
    count: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Drift of every row and of its block (arXiv 2606.24084).

    Args:
        log_probs, old_log_probs: [N] float32, or float64 with the backend "torch"; without old
            ones no drift is computed.
        valid: [N] bool.
        span_ids: [N] int64, with granularity "span".
        cu_seqlens: [B + 1]; None where every `length` rows are a sequence.
        count: also count the valid rows of every sequence.
        granularity, block_size, aggregate: as `DriftGate` has them.

    Returns:
        rows [2, N], or [4, N] with `count`: drift d; |aggregate of d| of the row's block; valid
        rows of its sequence; 1 at the first of them, else 0. And block_first [N] int32, the first
        valid row of the row's block. Invalid rows have 0 and -1.
    """
    if backend == "triton":
        from .kernels.blocks import row_blocks as run
    else:
        run = torch_rows.row_blocks
    result: tuple[Tensor, Tensor] = run(
        log_probs, old_log_probs, valid, span_ids, cu_seqlens, length,
        granularity, block_size, aggregate, count,
    )  # fmt: skip
    return result


@row_blocks.register_fake
def _(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    valid: Tensor,
    span_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    granularity: str,
    block_size: int,
    aggregate: str,
    count: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n = log_probs.shape[0]
    rows = log_probs.new_empty((4 if count else 2, n))
    return rows, log_probs.new_empty(n, dtype=torch.int32)


def number_blocks(first: Tensor) -> Tensor:
    """Number blocks in the order in which they begin, from the first valid row of each row's."""
    begins = first == torch.arange(first.shape[0], device=first.device)
    number = begins.cumsum(0) - 1
    return torch.where(first >= 0, number[first.clamp(min=0).long()], -1)


@custom_op("drift_gate::sampled_token", mutates_args=())
def sampled_token(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    valid: Tensor,
    blocks: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    tau: float,
    normalize: str,
    estimator: str,
    clip_low: float,
    clip_high: float,
    clip_c: float,
    advantage_clip: float | None,
    factor: float,
    denominator: str,
    token_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, unit mean and sampled-token loss of every row, and their sum.

    Args:
        log_probs, old_log_probs, teacher_log_probs: [N]; no teacher gives the gate alone.
        estimator: as `opd_loss` has them; or "given": the position losses are computed already,
            and stand in the place of the teacher's log-probs.
        valid: [N] bool.
        blocks: rows of `row_blocks`; None where there is neither a gate nor a count.
        normalize: "batch", "sequence" or "none" as in `DriftGate`; "off" without a gate; "given"
            where the second row of `blocks` holds the weights themselves.
        factor: multiplies the sum over the rows.
        denominator: what else divides it: "given" (nothing), the valid "tokens", or the
            "sequences" that have any.
        token_mean: divide each sequence's sum by its valid rows (+ 1e-8, as verl does).

    Returns:
        loss []; rows [4, N]: weight, token loss, its slope in log_probs, coefficient of the token
        loss in the loss ([1, N], the weight, without a teacher); metrics in the order of METRICS.
        Differentiable in `log_probs`, or with "given" in the position losses, through `loss` and
        through the token loss; the gate is detached.
    """
    if backend == "triton":
        from .kernels.sampled_token import sampled_token as run
    else:
        run = torch_rows.sampled_token
    result: tuple[Tensor, Tensor, Tensor] = run(
        log_probs, old_log_probs, teacher_log_probs, valid, blocks, cu_seqlens, length,
        tau, normalize, estimator, clip_low, clip_high, clip_c, advantage_clip,
        factor, denominator, token_mean,
    )  # fmt: skip
    return result


@sampled_token.register_fake
def _(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    valid: Tensor,
    blocks: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    tau: float,
    normalize: str,
    estimator: str,
    clip_low: float,
    clip_high: float,
    clip_c: float,
    advantage_clip: float | None,
    factor: float,
    denominator: str,
    token_mean: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = log_probs.new_empty((1 if teacher_log_probs is None else 4, log_probs.shape[0]))
    return log_probs.new_empty(()), rows, log_probs.new_empty(len(METRICS))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.given = inputs[9] == "given"


def _backward(
    ctx: Any, grad_loss: Tensor | None, grad_rows: Tensor | None, grad_metrics: Tensor | None
) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    grad = None
    if rows.shape[0] == 4:
        _, _, slope, coefficient = rows
        if grad_loss is not None:
            grad = slope * coefficient * grad_loss
        if grad_rows is not None:
            through_token = slope * grad_rows[1]
            grad = through_token if grad is None else grad + through_token
    log_probs, losses = (None, grad) if ctx.given else (grad, None)
    return (log_probs, None, losses, *(None,) * 15)


sampled_token.register_autograd(_backward, setup_context=_setup_context)
