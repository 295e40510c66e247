"""`linear_opd_loss`: the gated sampled-token loss from hidden states and LM head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments, recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, take_rows
from ..call.sampled import check_cut, position_of, target_of
from ..call.weighing import finish, valid_rows
from ..choices import Advantage
from ..gate import DriftGate
from ..head.check import HeadRule, head_facts, local_head, take_head
from ..head.chunk_losses import Common, SampledToken
from ..head.sums import Needs
from ..head.walk import gradients_anew, walk
from ..options import Clip, Head, Parallel, Reduction, refuse
from ..outputs import LossOutput
from ..parallel.agreement import meeting
from ..parallel.words import Shard
from ..passes.backends import passes_of
from ..passes.rules import PositionRule
from .by_reference import by_reference
from .handing import (
    LEAVES,
    SUMS,
    empty_sums,
    hand_out,
    handing_op,
    needs_of,
    no_row_is_left_out,
    upstream_of,
    work_of,
)


def linear_opd_loss(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor | None,
    *,
    gate: Gate = DriftGate(),  # noqa: B008  (frozen)
    estimator: str = "ppo",
    clip: Clip = Clip(),  # noqa: B008  (frozen)
    advantages: Tensor | None = None,
    advantage: Advantage = "old",
    ratio: str = "token",
    teacher_log_prob_min: float | None = None,
    row_weights: Tensor | None = None,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    reduction: Reduction | str = "token-mean",
    parallel: Parallel | None = None,
    return_entropy: bool = False,
    validate: bool = False,
    backend: str = "auto",
    **removed: Any,
) -> LossOutput:
    """`opd_loss` of the logits that an LM head makes; no [tokens, V] tensor exists.

        z = logit_scale * cap(hidden_states W^T + bias) / temperature
        cap(x) = softcap * tanh(x / softcap), or x without a softcap

    Where all valid rows fit one chunk their log-probs come first, then gates and unit mean, and the
    gradient is final. Else the rows are walked in chunks of whole blocks of the gate: each chunk's
    gradients are formed at once, with gates that lack their unit mean; that is one number for the
    batch, and multiplies the sums at the end. So three products of N V H multiplications are done
    in all, in the forward; the backward hands out what they gave. Where gates cannot be formed
    chunk by chunk (a block, span or sequence longer than a chunk, `normalize="sequence"`, a ratio
    over more than a token, sequences cut over ranks) the log-probs of all rows come first, for a
    fourth product. So does reduction "none", whose upstream weights only the backward knows.

    Args:
        hidden_states, head: as in `linear_token_log_probs`. Over several chunks grad_weight is
            summed in float32 (for bfloat16 on a CPU in 24 bits, or two chunks at once).
        others: as in `opd_loss`; there is no `inplace_backward`, as there are no logits.

    Returns:
        LossOutput, as `opd_loss`. Unless the reduction is "none", `token_loss` is detached, and
        one backward may run through `loss`: it hands out the gradients that the forward formed
        (with `retain_graph=True` too, a second one raises RuntimeError). Any upstream gradient is
        exact, and under `torch.no_grad()`, or for inputs that need none, no gradient is formed.

    Raises:
        ValueError, TypeError: as `opd_loss` and `linear_token_log_probs`.
    """
    if removed:
        refuse("linear_opd_loss", removed)
    hidden_states, head, shard = local_head(hidden_states, head, parallel)
    with meeting(parallel, position_ids, "" if shard is None else shard.group) as ranks:
        ranks.expect(hidden_states, validate)
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend, shard)
        if labels is None:
            arguments.integer("labels", labels)
        position = position_of(
            estimator, clip, advantage, ratio, teacher_log_prob_min, advantages is not None
        )
        needs = needs_of(*inputs[:3])
        call = take_rows(
            student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids,
            row_weights=row_weights, temperature=temperature, ignore_index=ignore_index,
            reduction=reduction, validate=validate, backend=chosen, ranks=ranks, unit=ratio,
            trains=any(needs),
        )  # fmt: skip
        if ranks.context:
            check_cut(position)
        target = target_of(student, estimator, old_log_probs, teacher_log_probs, advantages)
        if ranks.any:
            ranks.tell(
                **position._asdict(),
                entropy=return_entropy,
                **head_facts("head", head, inputs.rule),
            )
    if chosen == "reference":
        return by_reference(linear_opd_loss, locals())
    assert call.labels is not None
    op = LINEAR_OPD_TOKENS if call.rows.per_token else LINEAR_OPD
    hidden, weight, bias, rule, words = inputs
    x = Inputs(
        hidden, weight, bias, call.labels, target, call.rows, position, rule, words,
        return_entropy, needs, chosen,
    )  # fmt: skip
    outputs = op(x)
    found = Outcome(*outputs[:7])
    if recording.active is not None and not torch.compiler.is_compiling():
        recording.active.note(linear_opd_loss, locals())
    floored = () if teacher_log_prob_min is not None else ("floored",)
    return complete(call, found, return_entropy, *floored)


class Inputs(NamedTuple):
    """Of the ops."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N]
    target: Tensor  # [N]
    rows: RowInputs
    position: PositionRule
    rule: HeadRule
    shard: Shard
    entropy: bool
    needs: Needs
    backend: str


def _per_unit(x: Inputs) -> bool:
    return x.position.ratio != "token"


def _forward(x: Inputs) -> Tensors:
    run = passes_of(x.backend)
    valid = valid_rows(run, x.rows, x.labels, x.hidden)
    work = work_of(x, valid, no_row_is_left_out(x.rows), x.needs)
    common = Common(run, work.head, x.labels, x.rule.chunk_size, x.entropy)
    loss = SampledToken(common, x.rows.old, x.target, x.position)
    done, sums, factor = walk(
        work,
        loss,
        lambda results: finish(run, x.rows, valid, results[0], x.target, x.position),
        per_unit=_per_unit(x),
    )
    log_probs, entropy = loss.results
    return (
        done.loss, done.table, done.metrics, done.totals, valid, log_probs, entropy, *sums, factor,
    )  # fmt: skip


def _anew(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """The logits are made again, where only the backward knows what each row is weighed by."""
    table, valid = outputs[1], outputs[4]
    work = work_of(x, valid, False, Needs(*needs))
    common = Common(work.run, work.head, x.labels, x.rule.chunk_size, False)
    loss = SampledToken(common, None, x.labels, x.position)
    sums = gradients_anew(work, loss, upstream_of(table, grads))
    return hand_out(x, sums, None, None, needs)


def _empty(x: Inputs) -> Tensors:
    like = x.target.new_empty(0)
    found = empty_outcome(x.rows, like, x.entropy)
    return (*found, *empty_sums(x, _per_unit(x)), like.new_empty(()))


LINEAR_OPD = handing_op("linear_opd", Inputs, _forward, _empty, Outcome._fields)
LINEAR_OPD_TOKENS = Op(
    "linear_opd_tokens",
    Inputs,
    _forward,
    _anew,
    _empty,
    outputs=(*Outcome._fields, *SUMS, "factor"),
    grads=2,
    differentiable=LEAVES,
    keep=(*LEAVES, "labels", "table", "valid"),
)
