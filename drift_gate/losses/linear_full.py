"""`linear_full_loss`: the whole vocabulary, from the hidden states of student and teacher."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments, recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.gradients import row_gradient
from ..call.lists import check_beta
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, Student, take_rows
from ..call.weighing import finish, valid_rows
from ..choices import FULL_DIRECTIONS, FullDirection
from ..gate import DriftGate
from ..head.check import HeadInputs, HeadRule, head_facts, take_head
from ..head.chunk_losses import Common, WholeVocabulary
from ..head.sums import Needs
from ..head.walk import gradients_anew, walk
from ..options import Head, Parallel, Reduction, as_head, refuse
from ..outputs import LossOutput
from ..parallel.agreement import meeting
from ..parallel.words import Shard
from ..passes.backends import passes_of, resolve
from ..passes.rules import GIVEN, Finished, limit_of
from .by_reference import by_reference
from .full import no_shards, shared_words, spacing_in
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
    work_of,
)


def linear_full_loss(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_hidden_states: Tensor,
    teacher_head: Head | Tensor,
    *,
    direction: FullDirection = "reverse",
    beta: float = 0.5,
    teacher_temperature: float | None = None,
    vocab_size: int | None = None,
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
    """`full_loss` of the logits that two LM heads make; no [tokens, V] tensor exists.

    Logits of student and teacher exist for a chunk of rows at a time: four products of N V H
    multiplications, the teacher's included, all in the forward; two more where gates cannot be
    formed chunk by chunk or the reduction is "none" (see `linear_opd_loss`).

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
        teacher_hidden_states: the leading shape of hidden_states, [..., H'], on the same device.
        teacher_head: the teacher's weight [V', H'] or `Head`, in the dtype of its hidden states;
            chunks are those of `head`. The teacher gets no gradient.
        direction: "reverse", "forward" or "jsd", as above.
        beta: weighs the teacher in the mixture of "jsd"; from 0 to 1. The others do not read it.
        teacher_temperature: divides the teacher's logits; None for `temperature`.
        vocab_size: how many leading words student and teacher share, where the rest is padding of
            the embedding: only these are used, and the student's others get zero gradient. Needed
            where the two differ in V.
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
            are of this rank. Vocabularies are whole.
        return_entropy: also return each position's entropy, detached.
        validate: check values (labels, masks, cu_seqlens) on a GPU too, at the cost of a
            synchronisation.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        LossOutput; `log_probs` and `drift` are 0 without labels. Unless the reduction is "none",
        `token_loss` is detached, and one backward may run through `loss`: it hands out the
        gradients that the forward formed (with `retain_graph=True` too, a second one raises
        RuntimeError). Any upstream gradient is exact, and under `torch.no_grad()`, or for inputs
        that need none, no gradient is formed.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit: a label
            outside the vocabulary raises on the CPU and with `validate`, and otherwise makes the
            loss NaN; the heads differ in V without a `vocab_size`; it exceeds either; words are
            sharded.
    """
    if removed:
        refuse("linear_full_loss", removed)
    with meeting(parallel, position_ids) as ranks:
        ranks.expect(hidden_states, validate)
        no_shards("linear_full_loss", parallel)
        arguments.option("direction", direction, FULL_DIRECTIONS)
        check_beta(beta)
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend)
        if teacher_temperature is None:
            teacher_temperature = temperature
        theirs, teacher = _teacher(teacher_hidden_states, teacher_head, teacher_temperature)
        resolve(chosen, inputs.hidden, theirs.hidden)
        if theirs.rule.wide and as_head(head).chunk_size is None:  # the larger logits decide
            size = min(inputs.rule.chunk_size, theirs.rule.chunk_size)
            inputs = inputs._replace(rule=inputs.rule._replace(chunk_size=size))
        student = _shared(student, teacher, vocab_size)
        needs = needs_of(*inputs[:3])
        call = take_rows(
            student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids,
            row_weights=row_weights, temperature=temperature, ignore_index=ignore_index,
            reduction=reduction, validate=validate, backend=chosen, ranks=ranks,
            trains=any(needs),
        )  # fmt: skip
        if ranks.any:
            ranks.tell(
                direction=direction,
                beta=beta,
                teacher_temperature=teacher_temperature,
                vocab_size=student.vocab,
                entropy=return_entropy,
                **head_facts("head", head, inputs.rule),
                **head_facts("teacher_head", teacher_head, theirs.rule),
            )
    if chosen == "reference":
        return by_reference(linear_full_loss, locals())
    op = LINEAR_FULL_TOKENS if call.rows.per_token else LINEAR_FULL
    hidden, weight, bias, rule, words = inputs
    x = Inputs(
        hidden, weight, bias, call.labels, theirs.hidden, theirs.weight, theirs.bias, theirs.rule,
        call.rows, limit_of(direction, beta, FULL_DIRECTIONS), float(beta), student.vocab, rule,
        words, return_entropy, needs, chosen,
    )  # fmt: skip
    outputs = op(x)
    found = Outcome(*outputs[:7])
    if recording.active is not None and not torch.compiler.is_compiling():
        recording.active.note(linear_full_loss, locals())
    return complete(call, found, return_entropy, "floored", "pg_clipfrac")


def _teacher(
    hidden_states: Tensor, head: Head | Tensor, temperature: float
) -> tuple[HeadInputs, Student]:
    """The teacher's side, detached; its chunks are the student's."""
    arguments.floating("teacher_hidden_states", hidden_states)
    given = as_head(head, "teacher_head")
    if given.chunk_size is not None:
        raise ValueError(
            "teacher_head.chunk_size must be None, as chunks are those of head.chunk_size; got "
            f"{given.chunk_size}"
        )
    inputs, student, _ = take_head(
        hidden_states.detach(), given, temperature, "torch", prefix="teacher_"
    )
    bias = None if inputs.bias is None else inputs.bias.detach()
    return inputs._replace(weight=inputs.weight.detach(), bias=bias), student


def _shared(student: Student, teacher: Student, vocab_size: int | None) -> Student:
    """Check the teacher beside the student; the student with the words that both share."""
    if teacher.shape != student.shape:
        raise ValueError(
            "teacher_hidden_states must have the leading shape of hidden_states, "
            f"{list(student.shape)}; got {list(teacher.shape)}"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_hidden_states must be on the device of hidden_states, {student.device}; "
            f"got {teacher.device}"
        )
    names = "head.weight", "teacher_head.weight"
    return student._replace(vocab=shared_words(student.vocab, teacher.vocab, vocab_size, names))


class Inputs(NamedTuple):
    """Of the ops."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor | None  # [N]
    teacher_hidden: Tensor  # [N, H']
    teacher_weight: Tensor  # [V', H']
    teacher_bias: Tensor | None  # [V']
    teacher_rule: HeadRule
    rows: RowInputs
    direction: str
    beta: float
    vocab: int  # words that both share
    rule: HeadRule
    shard: Shard
    entropy: bool
    needs: Needs
    backend: str


def _loss(
    x: Inputs, run: Any, vocab: int, labels: Tensor | None, entropy: bool, noise: bool = False
) -> WholeVocabulary:
    theirs = HeadInputs(
        x.teacher_hidden, x.teacher_weight, x.teacher_bias, x.teacher_rule,
        Shard(x.teacher_weight.shape[0]),
    )  # fmt: skip
    common = Common(run, head_inputs(x), labels, x.rule.chunk_size, entropy, noise)
    return WholeVocabulary(common, theirs, vocab, x.direction, x.beta)


def _forward(x: Inputs) -> Tensors:
    run = passes_of(x.backend)
    valid = valid_rows(run, x.rows, x.labels, x.hidden)
    work = work_of(x, valid, no_row_is_left_out(x.rows), x.needs)
    loss = _loss(x, run, x.vocab, x.labels, x.entropy, rounds(x))

    def finished(results: list[Tensor]) -> Finished:
        now, _, losses, maximum, log_sum = results
        spacing = spacing_in(x.backend, x.weight.dtype, maximum, log_sum, x.rule.scale)
        return finish(run, x.rows, valid, now, losses, GIVEN, spacing=spacing)

    done, sums, factor = walk(work, loss, finished)
    now, entropy = loss.results.all()[:2]
    return (
        done.loss, done.table, done.metrics, done.totals, valid, now, entropy, *sums, factor,
    )  # fmt: skip


def _anew(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """The logits are made again, where only the backward knows what each row is weighed by."""
    table, valid = outputs[1], outputs[4]
    run = passes_of(x.backend)
    loss = _loss(x, run, x.vocab, None, False)
    work = work_of(x, valid, False, Needs(*needs))
    return hand_out(x, gradients_anew(work, loss, row_gradient(table, grads)), None, None, needs)


def _empty(x: Inputs) -> Tensors:
    like = x.hidden.new_empty(0, dtype=torch.promote_types(x.hidden.dtype, torch.float32))
    return (*empty_outcome(x.rows, like, x.entropy), *empty_sums(x), like.new_empty(()))


LINEAR_FULL = handing_op("linear_full", Inputs, _forward, _empty, Outcome._fields)
LINEAR_FULL_TOKENS = Op(
    "linear_full_tokens",
    Inputs,
    _forward,
    _anew,
    _empty,
    outputs=(*Outcome._fields, *SUMS, "factor"),
    grads=2,
    differentiable=LEAVES,
    keep=(
        *LEAVES, "teacher_hidden", "teacher_weight", "teacher_bias", "table", "valid",
    ),
)  # fmt: skip
