"""`topk_loss`: distillation from the teacher's K likeliest words, from logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.gradients import expand, row_gradient
from ..call.lists import (
    MASSES,
    Kind,
    Lists,
    check_lists,
    divergence,
    kind_of,
    listed,
    masses,
    of_entropy,
    take_lists,
)
from ..call.logits import of_logits
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, take_rows
from ..call.weighing import finish, is_sampled, measured_rows, spacing_of, valid_rows
from ..choices import Direction, Support
from ..gate import DriftGate
from ..options import Parallel, Reduction, refuse
from ..outputs import LossOutput
from ..parallel.agreement import meeting
from ..parallel.words import Shard, from_owners, local_words, own, scan_lists
from ..passes.backends import passes_of
from ..passes.rules import GIVEN, TOKENS
from .by_reference import by_reference


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
    teacher_temperature: float | None = None,
    log_prob_floor: float | None = None,
    zero_outside_topk: bool = False,
    ignore_unknown_ids: bool = False,
    gate: Gate = DriftGate(),  # noqa: B008  (frozen)
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
    """Divergence between student and teacher over the words that the teacher lists, gated.

    With p the student's and q the teacher's mass of the K listed words of a valid position,

        "reverse"  L = sum p log(p / q)
        "forward"  L = sum q log(q / p)
        "jsd"      L = beta sum q log(q / m) + (1 - beta) sum p log(p / m),
                   m = beta q + (1 - beta) p; at beta = 0 "forward", at 1 "reverse", as in TRL
        "mixed"    L = beta forward + (1 - beta) reverse  (NeMo-RL's default, at beta = 0.5)

    over the support: "renormalized" softmaxes both over the list ("reverse" on it is LSM, local
    support matching, arXiv 2603.25562: the direct loss); "truncated" takes both as they are, of the
    full softmax (what verl and VeOmni compute; not clamped, so it may be negative); "tail" adds a
    bucket with the rest of either mass, held above the dtype's epsilon (generalised JSD as in TRL).

    Where the support is renormalised the gradient has K entries in a row: the backward writes
    it without reading the logits. Without labels (and so without a drift: `gate` None, or the
    weights themselves) the forward then reads the K entries alone. With a gate's `sample_every` it
    reads whole rows where the drift is measured, and the K entries elsewhere: there `log_probs` and
    `entropy` are NaN, and the metrics `student_mass` and `entropy` are
    means over the measured positions. The other supports need, and give, all log-probs.

    Args:
        logits: [B, T, V], [N, V]; bfloat16, float16, float32 (float64 with the PyTorch backend).
            Last dimension contiguous, outer strides free.
        labels: [B, T] or [N], int64 or int32, aligned: row t of the logits predicts labels[t]. They
            are for the gate's drift: None is allowed without it, and every position is then valid
            but for the response_mask.
        old_log_probs: the shape of labels, nats: the sampling policy's, for the gate's drift; None
            is allowed without it.
        teacher_topk_ids: [..., K] int64 or int32, in any order; the student's own words will do as
            well. -1 marks a missing entry, as does a log-prob of -inf: it is left out of the
            support. A position with no entry left is not valid; the metric `without_support` counts
            them. A word listed twice in a row counts once, by its first entry (engines return the
            sampled token, then the top K): `duplicate_words` counts the others; with `validate`
            they raise. Other padding (id 0 with log-prob 0, or -1e9) cannot be told from a word.
        teacher_topk_log_probs: [..., K] nats. With the renormalised support a row's raw logits do
            as well, since a constant cancels (but `teacher_mass` then means nothing).
        direction: "reverse", "forward", "jsd" or "mixed", as above.
        support: "renormalized", "truncated" or "tail", as above.
        beta: weighs the teacher in the mixture of "jsd" and the forward part of "mixed"; from 0 to
            1. The others do not read it.
        teacher_temperature: divides the teacher's log-probs before they are renormalised.
        log_prob_floor: log-probs of listed words, the student's and the teacher's, are at least
            this with the supports "truncated" and "tail" (verl's `log_prob_min_clamp`), and have no
            gradient below.
        zero_outside_topk: with the support "truncated" and the directions "reverse" and "mixed":
            the teacher's mass is all on its list, which is renormalised, and every other word adds
            p (log p + 100), so that the student leaves it (NeMo-RL's option of this name). The
            forward takes the entropy in the same read, and the backward writes its gradient.
        ignore_unknown_ids: leave out ids of V and more, of a teacher with more words, in place of
            refusing them.
        gate: `DriftGate`, or None to train ungated. A `GateNormalizer` for gradient accumulation. A
            tensor of the shape of labels: the weights themselves, of `gate_weights` for example.
        row_weights: v, the shape of labels, any sign; multiplies after the gate's unit mean and is
            not counted in D; no gradient. A row of weight 0 has loss 0 whatever it holds, and its
            logits are not read in the backward; it still counts in D and in the gate. A NaN makes
            the loss NaN. Soft masks and importance weights (TIS, ICE-POP) belong here.
        response_mask: the shape of labels: 1 where valid, 0 elsewhere (bool, integer or float;
            other values raise on a CPU or with `validate`, and count as valid elsewhere). Rows that
            are invalid or whose label is `ignore_index` are not read, get zero gradient, and may
            hold anything.
        cu_seqlens: [B + 1] borders of the sequences of a packed [N] (or [1, N]) batch.
        span_ids: the shape of labels, with `DriftGate(granularity="span")`: see `newline_spans`.
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
        LossOutput; `log_probs`, `drift` are 0 without labels. Metrics have `student_mass` (where a
        logsumexp is known) and `teacher_mass` on the listed words, `overlap` = sum min(p, q) on the
        support, `without_support` and `duplicate_words`.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit: a label
            outside the vocabulary raises on the CPU and with `validate`, and otherwise makes the
            loss NaN; K = 1 with the renormalised support, which is 0 whatever the student does; an
            id outside the vocabulary that is not -1.
    """
    if removed:
        refuse("topk_loss", removed)
    logits, shard = local_words("logits", logits, parallel, -1)
    with meeting(parallel, position_ids, "" if shard is None else shard.group) as ranks:
        ranks.expect(logits, validate)
        kind = kind_of(
            direction, support, beta, log_prob_floor, teacher_temperature, zero_outside_topk
        )
        student, batch, chosen, shard = of_logits(logits, shard, inplace_backward, backend)
        call = take_rows(
            student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids,
            row_weights=row_weights, temperature=temperature, ignore_index=ignore_index,
            reduction=reduction, validate=validate, backend=chosen, ranks=ranks,
            trains=logits.requires_grad,
        )  # fmt: skip
        lists = take_lists(
            student, teacher_topk_ids, teacher_topk_log_probs, support,
            ignore_unknown_ids=ignore_unknown_ids, validate=validate,
        )  # fmt: skip
        if ranks.any:
            ranks.tell(
                **kind._asdict(),
                entropy=return_entropy,
                ignore_unknown_ids=ignore_unknown_ids,
                words_of_a_row=lists.ids.shape[1] if shard.group else None,
            )
            check_lists(ranks, call, lists)
    if chosen == "reference":
        if ignore_unknown_ids:
            teacher_topk_ids = torch.where(teacher_topk_ids < student.vocab, teacher_topk_ids, -1)
        return by_reference(topk_loss, locals())
    x = Inputs(
        batch, call.labels, lists, call.rows, kind, 1 / float(temperature), return_entropy,
        inplace_backward, shard, chosen,
    )  # fmt: skip
    outputs = TOPK(x)
    found = Outcome(*outputs[:7])
    if recording.active is not None and not torch.compiler.is_compiling():
        recording.active.note(topk_loss, locals())
    output = complete(call, found, return_entropy, "floored", "pg_clipfrac")
    known = labels is not None or support != "renormalized" or return_entropy
    return with_masses(output, outputs[7], known)


def with_masses(output: LossOutput, sizes: Tensor, known: bool) -> LossOutput:
    """The output with the metrics that `masses` gives; `known`: the student's masses are."""
    found = sizes.unbind()
    values = dict(zip(MASSES, found[: len(MASSES)], strict=True))
    if not known:
        del values["student_mass"]
    output.metrics.update(values)
    if output.entropy is not None and len(found) > len(MASSES):
        output.metrics["entropy"] = found[-1]
    return output


class Inputs(NamedTuple):
    """Of the op."""

    logits: Tensor  # [B, T, V], this rank's words
    labels: Tensor | None  # [N]
    lists: Lists
    rows: RowInputs
    kind: Kind
    scale: float
    entropy: bool
    inplace: bool
    shard: Shard
    backend: str


def _forward(x: Inputs) -> Tensors:
    """One scan (or a gather) of the listed words and the label, then row functions.

    With the renormalised support rows at which no drift is measured are gathered.
    """
    run = passes_of(x.backend)
    found = listed(
        run, x.lists, valid_rows(run, x.rows, x.labels, x.logits), x.rows.vocab, x.rows.check
    )
    renormalized, (words, present, valid, counts) = x.kind.support == "renormalized", found
    measured = measured_rows(run, x.rows, valid) if renormalized else None
    if renormalized and x.labels is None and not x.entropy:
        gathered = _gather(run, x, words, valid)
        known, scores = None, gathered
        maximum = log_sum = entropy = gathered.new_empty(0)
        now = gathered.new_zeros(len(valid))
    else:
        gathered, known, maximum, log_sum, entropy, of_labels = scan_lists(
            run, x.logits, x.labels, words, valid if measured is None else measured, x.scale,
            x.entropy or x.kind.outside, x.shard,
        )  # fmt: skip
        scores = gathered if renormalized else known
        now = torch.zeros_like(maximum) if of_labels is None else of_labels
    if measured is not None:
        others = valid & ~measured
        scores = gathered = torch.where(measured[:, None], gathered, _gather(run, x, words, others))
        now, entropy = unread(now, others), unread(entropy, others)
    rows, slope = divergence(
        run, x.kind, scores, known, x.lists.teacher, present, valid, x.rows.row_weights, entropy
    )
    spacing = spacing_of(x.logits.dtype, maximum, log_sum, x.scale)
    done = finish(run, x.rows, valid, now, rows[0], GIVEN, measured, spacing)
    sizes = masses(run, rows, done.metrics[TOKENS], counts, measured, entropy)
    return (
        done.loss, done.table, done.metrics, done.totals, valid, now, entropy,
        sizes, words, gathered, maximum, log_sum, slope,
    )  # fmt: skip


def unread(x: Tensor, rows: Tensor) -> Tensor:
    """x [N] or [0], NaN in rows [N] bool of which no logsumexp is known."""
    return x.masked_fill(rows, torch.nan) if len(x) else x


def _gather(run: Any, x: Inputs, words: Tensor, valid: Tensor) -> Tensor:
    """z of the listed words, of the ranks that have them."""
    if not x.shard.group:
        found: Tensor = run.gather(x.logits, words, valid, x.scale)
        return found
    width = x.logits.shape[2]
    local = own(x.shard, words, width).clamp(min=0)
    return from_owners(run.gather(x.logits, local, valid, x.scale), words, x.shard, width)


def _backward(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """K entries a row, and where the support is not renormalised alpha = -sum beta."""
    _, table, _, _, valid, _, entropy, _, words, *statistics, slope = outputs
    upstream = row_gradient(table, grads)
    beta = slope * upstream[:, None]
    alpha: Tensor | None = None
    gamma: Tensor | None = None
    if x.kind.support == "renormalized":
        statistics = [None] * 3
    else:
        alpha = -beta.sum(-1)
        if x.kind.outside:
            gamma, more = of_entropy(x.kind, upstream, entropy)
            alpha = alpha + more
    gathered, maximum, log_sum = statistics
    return [
        expand(
            x.backend,
            x.logits,
            words,
            maximum,
            log_sum,
            gathered,
            valid,
            alpha,
            beta,
            x.scale,
            x.shard,
            x.inplace,
            gamma,
        )
    ]


def empty_masses(x: Any) -> Tensor:
    """`masses` of an op's inputs, empty."""
    sampled = is_sampled(x.rows) and x.kind.support == "renormalized"
    return x.lists.teacher.new_empty(len(MASSES) + sampled)


def _empty(x: Inputs) -> Tensors:
    ids, teacher = x.lists.ids, x.lists.teacher
    n = ids.shape[0]
    bare = x.kind.support == "renormalized" and x.labels is None and not x.entropy
    return (
        *empty_outcome(x.rows, teacher, x.entropy or x.kind.outside), empty_masses(x),
        torch.empty_like(ids), torch.empty_like(teacher), teacher.new_empty(0 if bare else n),
        teacher.new_empty(0 if bare else n), torch.empty_like(teacher),
    )  # fmt: skip


TOPK = Op(
    "topk",
    Inputs,
    _forward,
    _backward,
    _empty,
    outputs=(*Outcome._fields, "masses", "words", "gathered", "maximum", "log_sum", "slope"),
    grads=2,
    differentiable=("logits",),
    keep=(
        "logits", "table", "valid", "entropy", "words", "gathered", "maximum", "log_sum", "slope",
    ),
)  # fmt: skip
