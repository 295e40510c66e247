"""`linear_opd_loss`: the gated sampled-token loss from hidden states and LM head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments, recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.gradients import row_gradient
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, take_rows
from ..call.sampled import take_sampled
from ..call.weighing import finish, spacing_of, valid_rows
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
    rounds,
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
        hidden_states: [B, T, H] or [N, H]; bfloat16, float16, float32 (float64 with the PyTorch
            backend). Under `torch.autocast` both they and the head are cast to its dtype.
        head: the weight [V, H], in the same dtype, or a `Head`. Any strides. A DTensor is gathered
            once, and its gradient, averaged over the ranks, is sharded again. The softcap comes
            before the scale (TRL's chunked losses scale first). Over several chunks its gradient is
            summed in float32 (for bfloat16 on a CPU in 24 bits, or two chunks at once).
        labels: the leading shape of hidden_states, int64 or int32, aligned: row t predicts
            labels[t].
        old_log_probs: the shape of labels, nats: the sampling policy's. None without a drift gate:
            the ratio is then 1 in value, and its gradient that of the current policy.
        teacher_log_probs: the shape of labels, nats; None where `advantages` are given.
        gate: `DriftGate`, or None to train ungated. A `GateNormalizer` for gradient accumulation. A
            tensor of the shape of labels: the weights themselves, of `gate_weights` for example.
        estimator: as above.
        clip: `Clip`: of the ratio, the dual clip and the advantage.
        advantages: the shape of labels: A itself (GRPO, task rewards), for the estimators with a
            ratio; no gradient.
        advantage: "old" as above, or "current": A = teacher_logp - sg(logp), refreshed in each step
            (arXiv 2606.24143).
        ratio: "token", or the geometric mean of r over the valid positions of the "block" (of the
            gate's block_size), "span" or "sequence" (GSPO, arXiv 2507.18071): in value, while the
            gradient is each token's own, as verl's gspo has it.
        teacher_log_prob_min: the teacher's log-probs are at least this, in nats: an engine that cut
            its list gives -inf, which makes the loss infinite or NaN. The metric `floored` counts
            the valid rows where it acted. None: no floor.
        row_weights: v, the shape of labels, any sign; multiplies after the gate's unit mean and is
            not counted in D; no gradient. A row of weight 0 has loss 0 whatever it holds, and its
            logits are not read in the backward; it still counts in D and in the gate. A NaN makes
            the loss NaN. Soft masks and importance weights (TIS, ICE-POP) belong here.
        response_mask: the shape of labels: 1 where valid, 0 elsewhere (bool, integer or float;
            other values raise on a CPU or with `validate`, and count as valid elsewhere). Rows that
            are invalid or whose label is `ignore_index` are not read, get zero gradient, and may
            hold anything.
        cu_seqlens: [B + 1] borders of the sequences of a packed [N] (or [1, N]) batch.
        span_ids: the shape of labels, with `DriftGate(granularity="span")` or ratio "span": see
            `newline_spans`.
        position_ids: the shape of labels, int: positions in their sequences, of which this rank has
            some and the other ranks of `parallel.context_parallel_group` (None for `group`) the
            rest. Any layout will do; row b of the batch (or of cu_seqlens) is the same sequence on
            all of them. Blocks are reduced over all of a sequence.
        temperature: divides the logits; greater than 0.
        ignore_index: label of invalid positions. None: none is ignored, and a GPU need not look.
        reduction: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
            "seq-mean-token-mean": the values of verl's `agg_loss`; or "none": per-token losses. Or
            a `Reduction` with the caller's denominators, for batches larger than this call. Where
            they are None: the valid tokens and the sequences that have any, of this call or of all
            ranks of `parallel.group`, and T (of whole sequences).
        parallel: `Parallel`. The ranks of `group` share the batch (data parallel, context
            parallel): gates have unit mean over all of its rows, and D is counted over them. The
            ranks' losses add up to that of one process, as do their gradients; where an engine
            averages them (DDP, FSDP) give `Reduction(dp_size=...)`, the number of ranks. Metrics
            are of this rank. Over `vocab_parallel_group` the words are sharded: the head [V_r, H]
            is this rank's, in the order of the ranks; everything else is the same on all of them,
            and labels and ids count from the first word of all. The gradient of the head is local,
            that of the hidden states is summed over the ranks (N H numbers). A DTensor head, its
            first dimension sharded, needs no argument beside DTensor hidden states, replicated.
        return_entropy: also return each position's entropy, detached.
        validate: check values (labels, masks, cu_seqlens) on a GPU too, at the cost of a
            synchronisation.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        LossOutput(loss, token_loss, log_probs, gate, drift, entropy, metrics). A batch without a
        valid position has loss 0 and zero gradients, whatever its denominator. A NaN in a valid row
        makes the loss NaN. Unless the reduction is "none", `token_loss` is detached, and
        one backward may run through `loss`: it hands out the gradients that the forward formed
        (with `retain_graph=True` too, a second one raises RuntimeError). Any upstream gradient is
        exact, and under `torch.no_grad()`, or for inputs that need none, no gradient is formed.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit: a label
            outside the vocabulary raises on the CPU and with `validate`, and otherwise makes the
            loss NaN.
    """
    if removed:
        refuse("linear_opd_loss", removed)
    hidden_states, head, shard = local_head(hidden_states, head, parallel)
    with meeting(parallel, position_ids, "" if shard is None else shard.group) as ranks:
        ranks.expect(hidden_states, validate)
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend, shard)
        if labels is None:
            arguments.integer("labels", labels)
        needs = needs_of(*inputs[:3])
        call = take_rows(
            student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids,
            row_weights=row_weights, temperature=temperature, ignore_index=ignore_index,
            reduction=reduction, validate=validate, backend=chosen, ranks=ranks, unit=ratio,
            trains=any(needs),
        )  # fmt: skip
        position, target = take_sampled(
            student, estimator, clip, advantage, ratio, teacher_log_prob_min, teacher_log_probs,
            advantages, bool(ranks.context),
        )  # fmt: skip
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


def _forward(x: Inputs) -> Tensors:
    run = passes_of(x.backend)
    valid = valid_rows(run, x.rows, x.labels, x.hidden)
    work = work_of(x, valid, no_row_is_left_out(x.rows), x.needs)
    common = Common(run, work.head, x.labels, x.rule.chunk_size, x.entropy, rounds(x))
    loss = SampledToken(common, x.rows.old, x.target, x.position)
    done, sums, factor = walk(
        work,
        loss,
        lambda results: finish(
            run,
            x.rows,
            valid,
            results[0],
            x.target,
            x.position,
            spacing=spacing_of(x.weight.dtype, results[-2], results[-1], x.rule.scale),
        ),
        per_unit=x.position.ratio != "token",
    )
    log_probs, entropy = loss.results.all()[:2]
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
    sums = gradients_anew(work, loss, row_gradient(table, grads))
    return hand_out(x, sums, None, None, needs)


def _empty(x: Inputs) -> Tensors:
    like = x.target.new_empty(0)
    found = empty_outcome(x.rows, like, x.entropy)
    return (*found, *empty_sums(x, x.position.ratio != "token"), like.new_empty(()))


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
