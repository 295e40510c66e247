"""`topk_loss`: distillation from the teacher's K likeliest words, from logits."""

from typing import Literal, get_args

import torch
from torch import Tensor

from . import vocabulary
from .arguments import (
    as_batch,
    check_floating,
    check_integer,
    check_like,
    check_number,
    check_option,
)
from .batch import Batch, finish, prepare
from .gate import DriftGate
from .outputs import LossOutput
from .topk_rows import topk_rows, topk_support

Direction = Literal["reverse", "forward", "jsd"]
Support = Literal["renormalized", "truncated", "tail"]


def topk_loss(
    logits: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    *,
    direction: Direction = "reverse",
    support: Support = "renormalized",
    beta: float = 0.5,
    gate: DriftGate | None = DriftGate(),  # noqa: B008  (frozen)
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    loss_agg_mode: str = "token-mean",
    batch_num_tokens: float | Tensor | None = None,
    dp_size: int = 1,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """Divergence between student and teacher over the words that the teacher lists, gated.

    With p the student's and q the teacher's mass of the K listed words of a valid position,

        "reverse"  L = sum p log(p / q)
        "forward"  L = sum q log(q / p)
        "jsd"      L = beta sum q log(q / m) + (1 - beta) sum p log(p / m),
                   m = beta q + (1 - beta) p

    over the support: "renormalized" softmaxes both over the list ("reverse" on it is LSM, local
    support matching, arXiv 2603.25562); "truncated" takes both as they are, of the full softmax
    (what verl and VeOmni compute; not clamped, so it may be negative); "tail" adds a bucket with
    the rest of either mass, held above the dtype's epsilon (generalised JSD as in TRL).

    Where the support is renormalised the gradient has K entries in a row: the backward writes
    it without reading the logits. Without labels (and so without a gate) the forward then reads
    the K entries alone.

    Args:
        labels, old_log_probs: as in `opd_loss`, for the gate's drift; None is allowed without it.
        teacher_topk_ids: [..., K] int64 or int32, in any order. -1 marks a missing entry, as does
            a log-prob of -inf: it is left out of the support. A position with no entry left is
            not valid; the metric `without_support` counts them. An id listed twice counts twice,
            and its gradients add up; with `validate` it raises.
        teacher_topk_log_probs: [..., K] nats. With the renormalised support a row's raw logits do
            as well, since a constant cancels (but `teacher_mass` then means nothing).
        direction, support, beta: as above; 0 < beta < 1 weighs the teacher in the mixture.
        others: as in `opd_loss`.

    Returns:
        LossOutput; `log_probs`, `drift` are 0 without labels. Metrics have `student_mass` (where a
        logsumexp is known) and `teacher_mass` on the listed words, `overlap` = sum min(p, q) on the
        support, and `without_support`.

    Raises:
        ValueError, TypeError: as `opd_loss`; K exceeds V; K = 1 with the renormalised support,
            which is 0 whatever the student does.
    """
    check_option("direction", direction, get_args(Direction))
    check_option("support", support, get_args(Support))
    check_number("beta", beta, above=0)
    if not beta < 1:
        raise ValueError(f"beta must be less than 1; got {beta}")
    batch = prepare(
        logits, labels, old_log_probs, gate=gate, response_mask=response_mask,
        cu_seqlens=cu_seqlens, span_ids=span_ids, temperature=temperature,
        ignore_index=ignore_index, loss_agg_mode=loss_agg_mode, batch_num_tokens=batch_num_tokens,
        dp_size=dp_size, global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
        validate=validate, backend=backend,
    )  # fmt: skip
    ids, teacher = _flat_lists(batch, teacher_topk_ids, teacher_topk_log_probs, support)
    check = validate or logits.device.type == "cpu"
    present, supported = topk_support(ids, teacher, batch.valid, logits.shape[-1], check, validate)
    without = (batch.valid & ~supported).sum()
    batch = batch._replace(valid=supported)
    if batch.backend == "reference":
        from .reference_topk import topk_loss as run

        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        result = run(
            batch, ids, teacher, present, direction, support, float(beta), loss_agg_mode, sizes,
            return_entropy,
        )  # fmt: skip
    else:
        result = _fused(
            batch, ids, teacher, present, direction, support, float(beta), return_entropy,
            inplace_backward,
        )  # fmt: skip
    result.metrics["without_support"] = without
    return result


def _flat_lists(batch: Batch, ids: Tensor, teacher: Tensor, support: str) -> tuple[Tensor, Tensor]:
    """The teacher's lists, checked, as [N, K]; log-probs in the accumulation dtype."""
    check_integer("teacher_topk_ids", ids)
    check_floating("teacher_topk_log_probs", teacher)
    k, vocab = ids.shape[-1] if ids.dim() else 0, batch.logits.shape[-1]
    device = batch.logits.device
    check_like("teacher_topk_ids", ids, (*batch.layout.shape, k), device, "logits with K for V")
    check_like("teacher_topk_log_probs", teacher, ids.shape, device, "teacher_topk_ids")
    if not 1 <= k <= vocab:
        raise ValueError(
            f"teacher_topk_ids must list between 1 and V = {vocab} words a row; got K = {k}"
        )
    if k == 1 and support == "renormalized":
        raise ValueError(
            "teacher_topk_ids must list at least 2 words with support 'renormalized', whose loss "
            "over one word is 0; got K = 1"
        )
    dtype = torch.promote_types(batch.logits.dtype, torch.float32)
    teacher = teacher.detach().reshape(-1, k).to(dtype)
    return ids.reshape(-1, k).contiguous(), teacher.contiguous()


def _fused(
    batch: Batch,
    ids: Tensor,
    teacher: Tensor,
    present: Tensor,
    direction: str,
    support: str,
    beta: float,
    return_entropy: bool,
    inplace_backward: bool,
) -> LossOutput:
    """One scan (or a gather) of the listed words and the label, then row functions."""
    logits, scale, backend = as_batch(batch.logits), 1 / batch.temperature, batch.backend
    listed = torch.where(present, ids, 0)  # missing words are read at 0 and have no gradient
    renormalized = support == "renormalized"
    log_probs = entropy = None
    if renormalized and batch.ids is None and not return_entropy:
        scores = vocabulary.gather(logits, listed, batch.valid, scale, inplace_backward, backend)
        now = torch.zeros_like(scores[:, 0])
    else:
        labels = listed[:, :1] if batch.ids is None else batch.ids[:, None]
        gathered, all_log_probs, _, _, entropy = vocabulary.scan(
            logits, torch.cat([labels, listed], 1), batch.valid, scale,
            return_entropy, inplace_backward, backend,
        )  # fmt: skip
        log_probs = all_log_probs[:, 1:]
        scores = gathered[:, 1:] if renormalized else log_probs
        now = all_log_probs[:, 0].detach()
        if batch.ids is None:
            now = torch.zeros_like(now)
    known = None if log_probs is None else log_probs.detach().contiguous()
    stacked, _ = topk_rows(
        scores.contiguous(), known, teacher, present, batch.valid, direction, support, beta, backend
    )
    shown = entropy.detach() if return_entropy and entropy is not None else None
    result = finish(batch, now, shown, stacked[0], "given")
    tokens = batch.valid.sum().clamp(min=1)
    student_mass, teacher_mass, overlap = (stacked[1:].detach().sum(-1) / tokens).unbind()
    if known is not None:
        result.metrics["student_mass"] = student_mass
    result.metrics["teacher_mass"] = teacher_mass
    result.metrics["overlap"] = overlap
    return result
