"""`opd_loss`: the gated sampled-token loss from logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments, recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.gradients import expand_labels, row_gradient
from ..call.logits import empty_scan, of_logits
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, take_rows
from ..call.sampled import take_sampled
from ..call.weighing import finish, spacing_of, valid_rows
from ..choices import Advantage
from ..gate import DriftGate
from ..options import Clip, Parallel, Reduction, refuse
from ..outputs import LossOutput
from ..parallel.agreement import meeting
from ..parallel.words import Shard, local_words, scan
from ..passes.backends import passes_of
from ..passes.rules import PositionRule
from .by_reference import by_reference


def opd_loss(
    logits: Tensor,
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
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
    **removed: Any,
) -> LossOutput:
    """Sampled-token on-policy distillation with drift gating (arXiv 2606.24084).

    For each valid position t with the sampled token y_t = labels[t]:

        logp = log softmax(logits / temperature)[y],  r = exp(clamp(logp - old_logp, -20, 20))
        A = teacher_logp - old_logp (frozen), or as `advantage` and `advantages` say
        "ppo":         L = -min(r A, clip(r, 1 - low, 1 + high) A), and for A < 0 at most -dual A
        "importance":  L = -r A
        "cispo":       L = -sg(clip(r, 1 - low, 1 + high)) A logp  (arXiv 2506.13585)
        "k1", "k2", "k3":  estimators of KL(student || teacher) from logp - teacher_logp, with
                       the value and gradient of verl's `kl_penalty`; k3 is held at 10 nats, with no
                       gradient beyond, unless `Clip(kl=False)`
        loss = sum_t v_t w_t L_t / D,  w from `gate` (see `DriftGate`), v from `row_weights`, D from
                       `reduction`

    The gate is detached and never changes D. Two passes over the logits: one read forward, one
    read and one write backward.

    Args:
        logits: [B, T, V], [N, V]; bfloat16, float16, float32 (float64 with the PyTorch backend).
            Last dimension contiguous, outer strides free.
        labels: [B, T] or [N], int64 or int32, aligned: row t of the logits predicts labels[t].
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
            are of this rank. Over `vocab_parallel_group` the words are sharded: `logits` are this
            rank's, [..., V_r], in the order of the ranks; everything else is the same on all of
            them, and labels and ids count from the first word of all. The gradient is that of this
            rank's logits. A DTensor with its last dimension sharded needs no argument.
        return_entropy: also return each position's entropy, detached.
        inplace_backward: let the backward overwrite `logits` with their gradient. Saves a [tokens,
            V] tensor; the logits are lost, and autograd refuses whatever still needs them, a second
            backward included. Where `torch.compile` traces the call, the compiler decides where the
            gradient goes.
        validate: check values (labels, masks, cu_seqlens) on a GPU too, at the cost of a
            synchronisation.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        LossOutput(loss, token_loss, log_probs, gate, drift, entropy, metrics). A batch without a
        valid position has loss 0 and zero gradients, whatever its denominator. A NaN in a valid row
        makes the loss NaN.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit. A label
            outside the vocabulary raises on the CPU and with `validate`; on a GPU it otherwise
            makes the loss NaN, and nothing outside its row is read or written.
    """
    if removed:
        refuse("opd_loss", removed)
    logits, shard = local_words("logits", logits, parallel, -1)
    with meeting(parallel, position_ids, "" if shard is None else shard.group) as ranks:
        ranks.expect(logits, validate)
        student, batch, chosen, shard = of_logits(logits, shard, inplace_backward, backend)
        if labels is None:
            arguments.integer("labels", labels)
        call = take_rows(
            student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids,
            row_weights=row_weights, temperature=temperature, ignore_index=ignore_index,
            reduction=reduction, validate=validate, backend=chosen, ranks=ranks, unit=ratio,
            trains=logits.requires_grad,
        )  # fmt: skip
        position, target = take_sampled(
            student, estimator, clip, advantage, ratio, teacher_log_prob_min, teacher_log_probs,
            advantages, bool(ranks.context),
        )  # fmt: skip
        if ranks.any:
            ranks.tell(**position._asdict(), entropy=return_entropy)
    if chosen == "reference":
        return by_reference(opd_loss, locals())
    assert call.labels is not None
    x = Inputs(
        batch, call.labels, target, call.rows, position, 1 / float(temperature), return_entropy,
        inplace_backward, shard, chosen,
    )  # fmt: skip
    outputs = OPD(x)
    found = Outcome(*outputs[:7])
    if recording.active is not None and not torch.compiler.is_compiling():
        recording.active.note(opd_loss, locals())
    floored = () if teacher_log_prob_min is not None else ("floored",)
    return complete(call, found, return_entropy, *floored)


class Inputs(NamedTuple):
    """Of the op."""

    logits: Tensor  # [B, T, V], this rank's words
    labels: Tensor  # [N]
    target: Tensor  # [N]
    rows: RowInputs
    position: PositionRule
    scale: float
    entropy: bool
    inplace: bool
    shard: Shard
    backend: str


def _forward(x: Inputs) -> Tensors:
    """One read of the logits, then row functions."""
    run = passes_of(x.backend)
    valid = valid_rows(run, x.rows, x.labels, x.logits)
    gathered, log_probs, maximum, log_sum, entropy = scan(
        run, x.logits, x.labels[:, None], valid, x.scale, x.entropy, x.shard
    )
    done = finish(
        run, x.rows, valid, log_probs.view(-1), x.target, x.position,
        spacing=spacing_of(x.logits.dtype, maximum, log_sum, x.scale),
    )  # fmt: skip
    return (
        done.loss, done.table, done.metrics, done.totals, valid, log_probs, entropy, gathered,
        maximum, log_sum,
    )  # fmt: skip


def _backward(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """One read and one write: alpha = dL/d logsumexp, beta = dL/d z[label] = -alpha."""
    _, table, _, _, valid, _, _, gathered, maximum, log_sum = outputs
    slope = row_gradient(table, grads)
    return [
        expand_labels(
            x.backend,
            x.logits,
            x.labels,
            maximum,
            log_sum,
            gathered,
            valid,
            slope,
            x.scale,
            x.shard,
            x.inplace,
        )
    ]


def _empty(x: Inputs) -> Tensors:
    gathered, log_probs, maximum, log_sum, _ = empty_scan(x.logits, x.rows.n_rows, 1, False)
    found = empty_outcome(x.rows, maximum, x.entropy)._replace(log_probs=log_probs)
    return (*found, gathered, maximum, log_sum)


OPD = Op(
    "opd",
    Inputs,
    _forward,
    _backward,
    _empty,
    outputs=(*Outcome._fields, "gathered", "maximum", "log_sum"),
    grads=2,
    differentiable=("logits",),
    keep=("logits", "labels", "table", "valid", "gathered", "maximum", "log_sum"),
)
