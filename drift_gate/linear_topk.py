"""`linear_topk_loss`: the teacher's K likeliest words, from hidden states and LM head."""

from typing import Any

import torch
from torch import Tensor

from .agreement import Meeting
from .batch import Batch, Gate, complete, prepare
from .gate import DriftGate
from .head import Inputs, check_head, local_head
from .linear import eager_logits, scan_head
from .linear_step import detached_tokens, step
from .outputs import LossOutput
from .sparse import head_gather
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
from .vocab_parallel import from_owners, named_group


def linear_topk_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    *,
    log_probs: Tensor | None = None,
    direction: Direction = "reverse",
    support: Support = "renormalized",
    beta: float = 0.5,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
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
    validate: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """`topk_loss` of the logits that an LM head makes; no [tokens, V] tensor exists.

    With the renormalised support (LSM) the gradient of a row's logits has K entries, and there is
    no dense product in the backward: grad_hidden is K weighted rows of the head, and a row of
    grad_weight sums the hidden states of the rows that list its word. One product of N V H
    multiplications remains, for the log-prob of the labels that the drift needs; none where the
    caller gives `log_probs`, or no labels. The other supports are dense: see `linear_opd_loss`.

    Args:
        hidden_states, weight, bias, softcap, logit_scale, chunk_size: as in
            `linear_token_log_probs`.
        log_probs: current log-probs of the labels, the shape of labels, where the caller has them
            (of the same weights and temperature); the drift is then theirs.
        others: as in `topk_loss`; there is no `inplace_backward`, as there are no logits.

    Returns:
        LossOutput, as `topk_loss`. Unless loss_agg_mode is "none", `token_loss` is detached. With
        the renormalised support backward may run twice; with the others see `linear_opd_loss`.

    Raises:
        ValueError, TypeError: as `topk_loss` and `linear_token_log_probs`; log_probs without
            labels.
    """
    hidden_states, weight, bias, shard = local_head(
        hidden_states, weight, bias, vocab_parallel_group
    )
    with Meeting(group, context_parallel_group, position_ids, named_group(shard)) as ranks:
        ranks.expect(hidden_states, validate)
        check_divergence(direction, support, beta)
        inputs = check_head(
            hidden_states, weight, bias, softcap, logit_scale, temperature, chunk_size, backend,
            shard=shard,
        )  # fmt: skip
        batch = prepare(
            inputs.student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, temperature=temperature,
            ignore_index=ignore_index, loss_agg_mode=loss_agg_mode,
            batch_num_tokens=batch_num_tokens, dp_size=dp_size,
            global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            validate=validate, backend=inputs.backend, ranks=ranks, position_ids=position_ids,
        )  # fmt: skip
        kind = Kind(direction, support, float(beta))
        batch, lists = take_lists(
            batch, teacher_topk_ids, teacher_topk_log_probs, support, validate=validate
        )
        known = _known(batch, log_probs)
        ranks.tell(
            kind=kind, softcap=softcap, chunk_size=chunk_size, entropy=return_entropy,
            log_probs=known is not None,
        )  # fmt: skip
    if batch.backend == "reference":
        from . import reference_topk

        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        batch = batch._replace(temperature=1 / inputs.head.scale)
        logits = eager_logits(inputs)
        result = reference_topk.topk_loss(
            batch, logits, lists, kind, loss_agg_mode, sizes, return_entropy, known
        )
    elif support == "renormalized":
        result = _sparse(batch, inputs, lists, kind, known, return_entropy)
    elif batch.reduce.none:
        result = _anew(batch, inputs, lists, kind, known, return_entropy)
    else:
        result = _deferred(batch, inputs, lists, kind, known, return_entropy)
    return detached_tokens(batch, complete(batch, result))


def _known(batch: Batch, log_probs: Tensor | None) -> Tensor | None:
    """The caller's log-probs of the labels [N], checked; 0 where not valid."""
    if log_probs is None:
        return None
    if batch.ids is None:
        raise ValueError("labels must be a tensor where log_probs are given; got None")
    return torch.where(batch.valid, batch.row_data("log_probs", log_probs), 0)


def _sparse(
    batch: Batch,
    inputs: Inputs,
    lists: Lists,
    kind: Kind,
    known: Tensor | None,
    return_entropy: bool,
) -> LossOutput:
    """Scores of the listed words alone have a gradient."""
    if return_entropy or (batch.ids is not None and known is None):
        return _anew(batch, inputs, lists, kind, known, return_entropy)
    weight, bias, softcap, scale, shard = inputs.head
    words = lists.words
    if shard is not None:
        words = shard.own(words, weight.shape[0]).clamp(min=0)
    scores = head_gather(
        inputs.hidden, weight, bias, words, batch.valid, softcap, scale, inputs.backend
    )
    if shard is not None:
        local = shard.own(lists.words, weight.shape[0])
        scores = from_owners(scores, lists.words, local, shard)
    now = torch.zeros_like(scores[:, 0]) if known is None else known
    return finish_lists(batch, lists, kind, scores, None, now, None)


def _anew(
    batch: Batch,
    inputs: Inputs,
    lists: Lists,
    kind: Kind,
    known: Tensor | None,
    return_entropy: bool,
) -> LossOutput:
    """A scan of all words, whose backward makes the logits again unless its gradient is sparse."""
    renormalized = kind.support == "renormalized"
    gathered, log_probs, _, _, entropy = scan_head(
        inputs, with_label(batch, lists), batch.valid, return_entropy, dense=not renormalized
    )
    now = log_probs[:, 0].detach() if known is None else known
    listed = log_probs[:, 1:]
    return finish_lists(
        batch, lists, kind, gathered[:, 1:] if renormalized else listed, listed,
        torch.zeros_like(now) if batch.ids is None else now,
        entropy.detach() if return_entropy else None,
    )  # fmt: skip


def _deferred(
    batch: Batch,
    inputs: Inputs,
    lists: Lists,
    kind: Kind,
    known: Tensor | None,
    return_entropy: bool,
) -> LossOutput:
    """Gradients formed in the forward."""
    targets = [lists.words, lists.teacher, lists.present]
    done = step(batch, inputs, "listed", list(kind), targets, known, return_entropy)
    now, *shown, log_probs = done.results
    if known is not None:
        now = known
    return done.attach(
        finish_lists(
            batch, lists, kind, log_probs, log_probs, now, shown[0] if return_entropy else None
        )
    )
