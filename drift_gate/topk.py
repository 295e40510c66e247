"""`topk_loss`: distillation from the teacher's K likeliest words, from logits."""

from typing import Any

import torch
from torch import Tensor

from . import vocab_parallel
from .agreement import Meeting
from .arguments import as_batch
from .batch import Batch, Gate, complete, of_logits, prepare
from .gate import DriftGate
from .outputs import LossOutput
from .topk_lists import (
    Direction,
    Kind,
    Lists,
    Support,
    check_divergence,
    finish_lists,
    take_lists,
    with_label,
)
from .vocab_parallel import local_words, named_group, resolve_for


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
    gate: Gate = DriftGate(),  # noqa: B008  (frozen)
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
    group: Any = None,
    context_parallel_group: Any = None,
    position_ids: Tensor | None = None,
    vocab_parallel_group: Any = None,
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
    it without reading the logits. Without labels (and so without a drift: `gate` None, or the
    weights themselves) the forward then reads the K entries alone.

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
    logits, shard = local_words("logits", logits, vocab_parallel_group, -1)
    with Meeting(group, context_parallel_group, position_ids, named_group(shard)) as ranks:
        ranks.expect(logits, validate)
        check_divergence(direction, support, beta)
        batch = prepare(
            of_logits(logits, shard), labels, old_log_probs, gate=gate,
            response_mask=response_mask, cu_seqlens=cu_seqlens, span_ids=span_ids,
            temperature=temperature, ignore_index=ignore_index, loss_agg_mode=loss_agg_mode,
            batch_num_tokens=batch_num_tokens, dp_size=dp_size,
            global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            validate=validate, backend=resolve_for(backend, logits, shard), ranks=ranks,
            position_ids=position_ids,
        )  # fmt: skip
        kind = Kind(direction, support, float(beta))
        batch, lists = take_lists(
            batch, teacher_topk_ids, teacher_topk_log_probs, support, validate=validate
        )
        ranks.tell(kind=kind, entropy=return_entropy)
    if batch.backend == "reference":
        from . import reference_topk

        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        output = reference_topk.topk_loss(
            batch, logits, lists, kind, loss_agg_mode, sizes, return_entropy
        )
    else:
        output = _fused(batch, logits, lists, kind, return_entropy, inplace_backward)
    return complete(batch, output)


def _fused(
    batch: Batch,
    logits: Tensor,
    lists: Lists,
    kind: Kind,
    return_entropy: bool,
    inplace_backward: bool,
) -> LossOutput:
    """One scan (or a gather) of the listed words and the label, then row functions."""
    logits, scale, backend = as_batch(logits), 1 / batch.temperature, batch.backend
    renormalized, shard = kind.support == "renormalized", batch.student.shard
    if renormalized and batch.ids is None and not return_entropy:
        scores = vocab_parallel.gather(
            logits, lists.words, batch.valid, scale, inplace_backward, backend, shard
        )
        return finish_lists(batch, lists, kind, scores, None, torch.zeros_like(scores[:, 0]), None)
    gathered, log_probs, _, _, entropy = vocab_parallel.scan(
        logits, with_label(batch, lists), batch.valid, scale, return_entropy, inplace_backward,
        backend, shard,
    )  # fmt: skip
    now = log_probs[:, 0].detach()
    known = log_probs[:, 1:]
    return finish_lists(
        batch, lists, kind, gathered[:, 1:] if renormalized else known, known,
        torch.zeros_like(now) if batch.ids is None else now,
        entropy.detach() if return_entropy else None,
    )  # fmt: skip
