"""`linear_topk_loss`: the teacher's K likeliest words, from hidden states and LM head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments, recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.gradients import row_gradient
from ..call.lists import (
    Kind,
    Lists,
    check_lists,
    divergence,
    kind_of,
    listed,
    masses,
    take_lists,
)
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, Student, take_rows
from ..call.weighing import finish, is_sampled, measured_rows, most_measured, spacing_of, valid_rows
from ..choices import Direction, Support
from ..gate import DriftGate
from ..head import sparse
from ..head.check import HeadInputs, HeadRule, head_facts, local_head, take_head
from ..head.chunk_losses import Common, ListedWords
from ..head.scan import scan_head
from ..head.sums import Needs
from ..head.walk import gradients_anew, walk
from ..options import Head, Parallel, Reduction, refuse
from ..outputs import LossOutput
from ..parallel.agreement import meeting
from ..parallel.words import Shard
from ..passes.backends import passes_of
from ..passes.rules import GIVEN, TOKENS, Finished
from .by_reference import by_reference
from .handing import (
    LEAVES,
    SUMS,
    empty_sums,
    hand_out,
    handing_op,
    head_inputs,
    needs_of,
    no_row_is_left_out,
    rounds,
    sum_over_shards,
    work_of,
)
from .topk import empty_masses, unread, with_masses


def linear_topk_loss(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_topk_ids: Tensor,
    teacher_topk_log_probs: Tensor,
    *,
    log_probs: Tensor | None = None,
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
    validate: bool = False,
    backend: str = "auto",
    **removed: Any,
) -> LossOutput:
    """`topk_loss` of the logits that an LM head makes; no [tokens, V] tensor exists.

    With the renormalised support (LSM) the gradient of a row's logits has K entries, and there is
    no dense product in the backward: grad_hidden is K weighted rows of the head, and a row of
    grad_weight sums the hidden states of the rows that list its word. One product of N V H
    multiplications remains, for the log-prob of the labels that the drift needs, with those
    positions alone at which the gate measures it (`DriftGate.sample_every`; `log_probs` and entropy
    of the others are NaN: see `topk_loss`); none where the caller gives `log_probs`, or no labels.
    The other supports are dense: see `linear_opd_loss`.

    Args:
        hidden_states: [B, T, H] or [N, H]; bfloat16, float16, float32 (float64 with the PyTorch
            backend). Under `torch.autocast` both they and the head are cast to its dtype.
        head: the weight [V, H], in the same dtype, or a `Head`. Any strides. A DTensor is gathered
            once, and its gradient, averaged over the ranks, is sharded again. The softcap comes
            before the scale (TRL's chunked losses scale first). Over several chunks its gradient is
            summed in float32 (for bfloat16 on a CPU in 24 bits, or two chunks at once).
        labels: the leading shape of hidden_states, int64 or int32, aligned: row t predicts
            labels[t]. They are for the gate's drift: None is allowed without it, and every position
            is then valid but for the response_mask.
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
        log_probs: current log-probs of the labels, the shape of labels, where the caller has them
            (of the same weights and temperature); the drift is then theirs. They are returned, and
            not read where no drift is measured.
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
        LossOutput; `log_probs`, `drift` are 0 without labels. Metrics have `student_mass` (where a
        logsumexp is known) and `teacher_mass` on the listed words, `overlap` = sum min(p, q) on the
        support, `without_support` and `duplicate_words`. With the renormalised support backward may
        run twice. With the others, unless the reduction is "none", `token_loss` is detached and one
        backward may run through `loss` (a second one raises RuntimeError).

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit: a label
            outside the vocabulary raises on the CPU and with `validate`, and otherwise makes the
            loss NaN; K = 1 with the renormalised support; log_probs without labels.
    """
    if removed:
        refuse("linear_topk_loss", removed)
    hidden_states, head, shard = local_head(hidden_states, head, parallel)
    with meeting(parallel, position_ids, "" if shard is None else shard.group) as ranks:
        ranks.expect(hidden_states, validate)
        kind = kind_of(
            direction, support, beta, log_prob_floor, teacher_temperature, zero_outside_topk
        )
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend, shard)
        needs = needs_of(*inputs[:3])
        call = take_rows(
            student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids,
            row_weights=row_weights, temperature=temperature, ignore_index=ignore_index,
            reduction=reduction, validate=validate, backend=chosen, ranks=ranks,
            trains=any(needs),
        )  # fmt: skip
        lists = take_lists(
            student, teacher_topk_ids, teacher_topk_log_probs, support,
            ignore_unknown_ids=ignore_unknown_ids, validate=validate,
        )  # fmt: skip
        known = _known(student, labels, log_probs)
        if ranks.any:
            ranks.tell(
                **kind._asdict(),
                entropy=return_entropy,
                **head_facts("head", head, inputs.rule),
                log_probs=known is not None,
                ignore_unknown_ids=ignore_unknown_ids,
                words_of_a_row=lists.ids.shape[1] if inputs.shard.group else None,
            )
            check_lists(ranks, call, lists)
    if chosen == "reference":
        if ignore_unknown_ids:
            teacher_topk_ids = torch.where(teacher_topk_ids < student.vocab, teacher_topk_ids, -1)
        return by_reference(linear_topk_loss, locals())
    op = LINEAR_TOPK_SPARSE
    if support != "renormalized":
        op = LINEAR_TOPK_TOKENS if call.rows.per_token else LINEAR_TOPK
    hidden, weight, bias, rule, words = inputs
    x = Inputs(
        hidden, weight, bias, call.labels, known, lists, call.rows, kind, rule, words,
        return_entropy, needs, chosen,
    )  # fmt: skip
    outputs = op(x)
    found = Outcome(*outputs[:7])
    if recording.active is not None and not torch.compiler.is_compiling():
        recording.active.note(linear_topk_loss, locals())
    unknown = () if known is None else ("drift_noise",)  # of log-probs that the caller has
    output = complete(call, found, return_entropy, "floored", "pg_clipfrac", *unknown)
    scanned = (labels is not None and known is None) or op is not LINEAR_TOPK_SPARSE
    return with_masses(output, outputs[7], scanned or return_entropy)


def _known(student: Student, labels: Tensor | None, log_probs: Tensor | None) -> Tensor | None:
    """The caller's log-probs of the labels [N], checked."""
    if log_probs is None:
        return None
    if labels is None:
        raise ValueError("labels must be a tensor where log_probs are given; got None")
    shape, device, dtype = student.shape, student.device, student.dtype
    return arguments.row_data("log_probs", log_probs, shape, device, "labels", dtype)


class Inputs(NamedTuple):
    """Of the ops."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor | None  # [N]
    known: Tensor | None  # [N] log-probs of the labels
    lists: Lists
    rows: RowInputs
    kind: Kind
    rule: HeadRule
    shard: Shard
    entropy: bool
    needs: Needs
    backend: str


def _bare(x: Inputs) -> bool:
    """Whether the listed words are all that is read of the head."""
    return not x.entropy and (x.labels is None or x.known is not None)


def _forward_sparse(x: Inputs) -> Tensors:
    """Scores of the listed words alone have a gradient; a product for the labels' log-probs.

    Rows at which no drift is measured take no part in it.
    """
    run, head = passes_of(x.backend), head_inputs(x)
    before = valid_rows(run, x.rows, x.labels, x.hidden)
    # Kernels read no word that is none: the product is under way before the lists are looked at.
    early = x.backend == "triton" and not x.shard.group and not _bare(x)
    found = None
    if early and not is_sampled(x.rows):
        found = _scanned(x, head, x.lists.ids, before, None)
    words, present, valid, counts = listed(run, x.lists, before, x.rows.vocab, x.rows.check)
    measured = measured_rows(run, x.rows, valid)
    if _bare(x):
        scores, known = sparse.gather(run, head, words, valid), None
        now = torch.zeros_like(scores[:, 0]) if x.known is None else _where(valid, x.known)
        entropy = maximum = log_sum = scores.new_empty(0)
    else:
        scores, known, now, entropy, maximum, log_sum = found or _scanned(
            x, head, words, valid, measured
        )
        now = _where(valid, now if x.known is None else x.known)
        if x.entropy:
            entropy = _where(valid, entropy)
        if measured is not None:
            others = valid & ~measured
            listed_others = sparse.gather(run, head, words, others)
            scores = torch.where(measured[:, None], scores, listed_others)
            entropy = unread(entropy, others)
            now = unread(now, others) if x.known is None else now
    rows, slope = divergence(
        run, x.kind, scores, known, x.lists.teacher, present, valid, x.rows.row_weights
    )
    spacing = None
    if x.known is None and rounds(x):
        spacing = spacing_of(x.weight.dtype, maximum, log_sum, x.rule.scale)
    done = finish(run, x.rows, valid, now, rows[0], GIVEN, measured, spacing)
    sizes = masses(run, rows, done.metrics[TOKENS], counts, measured, entropy)
    return (
        done.loss, done.table, done.metrics, done.totals, valid, now, entropy,
        sizes, words, scores, slope,
    )  # fmt: skip


def _scanned(
    x: Inputs, head: HeadInputs, words: Tensor, valid: Tensor, measured: Tensor | None
) -> tuple[Tensor, ...]:
    """Logits and log-probs of the words [N, K], log-prob of the label [N], entropy, maximum and
    log_sum [N]."""
    whole = no_row_is_left_out(x.rows) and x.backend == "triton"  # see `work_of`
    read, most = None if whole else valid, None
    if measured is not None:
        read, most = measured, most_measured(x.rows) if whole else None
    gathered, log_probs, maximum, log_sum, entropy, now = scan_head(
        passes_of(x.backend), head, words, read, x.entropy, x.rule.scan_size, most, x.labels
    )
    now = torch.zeros_like(maximum) if now is None else now
    return gathered, log_probs, now, entropy, maximum, log_sum


def _where(valid: Tensor, x: Tensor) -> Tensor:
    return torch.where(valid, x, 0)


def _backward_sparse(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    table, valid, words, scores, slope = (outputs[i] for i in (1, 4, 8, 9, 10))
    upstream = row_gradient(table, grads)
    valid = valid & (upstream != 0)
    found = sparse.scatter(
        passes_of(x.backend), x.backend, head_inputs(x), words, valid, scores,
        slope * upstream[:, None], Needs(*needs),
    )  # fmt: skip
    return sum_over_shards(x, found, needs)


def _forward(x: Inputs) -> Tensors:
    """Log-probs of the listed words over the vocabulary: see `head.walk`."""
    run = passes_of(x.backend)
    before = valid_rows(run, x.rows, x.labels, x.hidden)
    words, present, valid, counts = listed(run, x.lists, before, x.rows.vocab, x.rows.check)
    work = work_of(x, valid, no_row_is_left_out(x.rows), x.needs, lists=True)
    loss = _loss(x, run, words, present)
    kept: list[Tensor] = []

    def finished(results: list[Tensor]) -> Finished:
        log_probs = results[2]
        found, _ = divergence(
            run, x.kind, log_probs, log_probs, x.lists.teacher, present, valid, entropy=results[1]
        )
        now = _where(valid, results[0] if x.known is None else x.known)
        spacing = None
        if x.known is None:
            spacing = spacing_of(x.weight.dtype, results[-2], results[-1], x.rule.scale)
        done = finish(run, x.rows, valid, now, found[0], GIVEN, spacing=spacing)
        kept.append(masses(run, found, done.metrics[TOKENS], counts, None, results[1]))
        return done

    done, sums, factor = walk(work, loss, finished, known=x.known)
    now, entropy = loss.results.all()[:2]
    now = _where(valid, now if x.known is None else x.known)
    entropy = _where(valid, entropy) if len(entropy) else entropy
    return (
        done.loss, done.table, done.metrics, done.totals, valid, now, entropy, kept[0], words,
        present, *sums, factor,
    )  # fmt: skip


def _loss(x: Inputs, run: Any, words: Tensor, present: Tensor) -> ListedWords:
    entropy = x.entropy or x.kind.outside
    common = Common(run, head_inputs(x), x.labels, x.rule.chunk_size, entropy, rounds(x))
    return ListedWords(common, words, x.lists.teacher, present, x.kind)


def _anew(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """The logits are made again, where only the backward knows what each row is weighed by."""
    table, valid, words, present, teacher = (outputs[i] for i in (1, 4, 8, 9, 15))
    run = passes_of(x.backend)
    common = Common(run, head_inputs(x), None, x.rule.chunk_size, x.kind.outside)
    loss = ListedWords(common, words, teacher, present, x.kind)
    work = work_of(x, valid, False, Needs(*needs))
    return hand_out(x, gradients_anew(work, loss, row_gradient(table, grads)), None, None, needs)


def _forward_tokens(x: Inputs) -> Tensors:
    return (*_forward(x), x.lists.teacher.clone())


def _empty_common(x: Inputs) -> Tensors:
    found = empty_outcome(x.rows, x.lists.teacher, x.entropy or x.kind.outside)
    return (*found, empty_masses(x), torch.empty_like(x.lists.ids))


def _empty_sparse(x: Inputs) -> Tensors:
    teacher = x.lists.teacher
    return (*_empty_common(x), torch.empty_like(teacher), torch.empty_like(teacher))


def _empty(x: Inputs) -> Tensors:
    present = torch.empty_like(x.lists.ids, dtype=torch.bool)
    return (*_empty_common(x), present, *empty_sums(x), x.lists.teacher.new_empty(()))


def _empty_tokens(x: Inputs) -> Tensors:
    return (*_empty(x), torch.empty_like(x.lists.teacher))


COMMON = (*Outcome._fields, "masses", "words")
LINEAR_TOPK_SPARSE = Op(
    "linear_topk_sparse",
    Inputs,
    _forward_sparse,
    _backward_sparse,
    _empty_sparse,
    outputs=(*COMMON, "scores", "slope"),
    grads=2,
    differentiable=LEAVES,
    keep=(*LEAVES, "table", "valid", "words", "scores", "slope"),
)
LINEAR_TOPK = handing_op("linear_topk", Inputs, _forward, _empty, (*COMMON, "present"))
LINEAR_TOPK_TOKENS = Op(
    "linear_topk_tokens",
    Inputs,
    _forward_tokens,
    _anew,
    _empty_tokens,
    outputs=(*COMMON, "present", *SUMS, "factor", "teacher"),
    grads=2,
    differentiable=LEAVES,
    keep=(*LEAVES, "table", "valid", "words", "present", "teacher"),
)
