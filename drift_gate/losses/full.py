"""`full_loss`: distillation from the teacher's logits over the whole vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments, gradients, recording
from ..call.finishing import Outcome, complete, empty_outcome
from ..call.lists import check_beta
from ..call.logits import as_batch, logits_like, of_logits
from ..call.op import Op, Tensors
from ..call.rows import Gate, RowInputs, take_rows
from ..call.weighing import finish, spacing_of, valid_rows
from ..choices import FULL_DIRECTIONS, FullDirection
from ..gate import DriftGate
from ..options import Parallel, Reduction, refuse
from ..outputs import LossOutput
from ..parallel.agreement import meeting
from ..passes.backends import passes_of, resolve
from ..passes.rules import GIVEN, Spacing, limit_of
from .by_reference import by_reference


def full_loss(
    logits: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_logits: Tensor,
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
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
    **removed: Any,
) -> LossOutput:
    """Divergence between student and teacher over the whole vocabulary, gated.

    With p = softmax(logits / temperature) and q = softmax(teacher_logits / teacher_temperature)
    at a valid position,

        "reverse"  L = KL(p || q) = sum p log(p / q)
        "forward"  L = KL(q || p) = sum q log(q / p)
        "jsd"      L = beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
                   (generalised JSD, arXiv 2306.13649, weighed as in TRL; at beta = 0 "forward", at
                   1 "reverse")

    The forward reads both logits once ("jsd" twice on a GPU), the backward reads both and writes
    the student's gradient; nothing else has the size of the logits. The teacher gets no gradient.

    Args:
        logits: [B, T, V], [N, V]; bfloat16, float16, float32 (float64 with the PyTorch backend).
            Last dimension contiguous, outer strides free.
        labels: [B, T] or [N], int64 or int32, aligned: row t of the logits predicts labels[t]. They
            are for the gate's drift: None is allowed without it, and every position is then valid
            but for the response_mask.
        old_log_probs: the shape of labels, nats: the sampling policy's, for the gate's drift; None
            is allowed without it.
        teacher_logits: the leading shape of logits, any float dtype, last dimension contiguous,
            outer strides free. Where the student's logit is -inf the word has no part in "reverse";
            a word that only the teacher excludes makes "reverse" infinite, one that only the
            student excludes "forward". "jsd" is finite for 0 < beta < 1. Where the loss is infinite
            the gradient is not to be used. Logits below -1e30, as of words masked with the lowest
            number of bfloat16 or float32, have no mass either: finite losses are those of -inf, and
            where that is infinite the CPU may give a large number.
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
        inplace_backward: let the backward overwrite `logits` with their gradient. Saves a [tokens,
            V] tensor; the logits are lost, and autograd refuses whatever still needs them, a second
            backward included. Where `torch.compile` traces the call, the compiler decides where the
            gradient goes.
        validate: check values (labels, masks, cu_seqlens) on a GPU too, at the cost of a
            synchronisation.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        LossOutput; `log_probs` and `drift` are 0 without labels.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit: a label
            outside the vocabulary raises on the CPU and with `validate`, and otherwise makes the
            loss NaN; student and teacher differ in V without a `vocab_size`; it exceeds either;
            words are sharded (DTensor, vocab_parallel_group).
    """
    if removed:
        refuse("full_loss", removed)
    with meeting(parallel, position_ids) as ranks:
        ranks.expect(logits, validate)
        no_shards("full_loss", parallel, logits=logits, teacher_logits=teacher_logits)
        arguments.option("direction", direction, FULL_DIRECTIONS)
        check_beta(beta)
        if teacher_temperature is None:
            teacher_temperature = temperature
        arguments.number("teacher_temperature", teacher_temperature, 0)
        student, batch, _, _ = of_logits(logits, None, inplace_backward, backend)
        _check_teacher(logits, teacher_logits)
        vocab = shared_words(
            logits.shape[-1], teacher_logits.shape[-1], vocab_size, ("logits", "teacher_logits")
        )
        chosen = resolve(backend, logits, teacher_logits)
        call = take_rows(
            student._replace(vocab=vocab), labels, old_log_probs, gate=gate,
            response_mask=response_mask, cu_seqlens=cu_seqlens, span_ids=span_ids,
            position_ids=position_ids, row_weights=row_weights, temperature=temperature,
            ignore_index=ignore_index, reduction=reduction, validate=validate, backend=chosen,
            ranks=ranks,
            trains=logits.requires_grad,
        )  # fmt: skip
        if ranks.any:
            ranks.tell(
                direction=direction,
                beta=beta,
                teacher_temperature=teacher_temperature,
                vocab_size=vocab,
                entropy=return_entropy,
            )
    if chosen == "reference":
        return by_reference(full_loss, locals())
    teacher = teacher_logits if vocab_size is None else teacher_logits[..., :vocab]
    x = Inputs(
        batch, as_batch(teacher.detach()), call.labels, call.rows,
        limit_of(direction, beta, FULL_DIRECTIONS), float(beta), 1 / float(temperature),
        1 / float(teacher_temperature), return_entropy, inplace_backward, chosen,
    )  # fmt: skip
    outputs = FULL(x)
    found = Outcome(*outputs[:7])
    if recording.active is not None and not torch.compiler.is_compiling():
        recording.active.note(full_loss, locals())
    return complete(call, found, return_entropy, "floored", "pg_clipfrac")


def no_shards(function: str, parallel: Parallel | None, **tensors: Any) -> None:
    """Raise where words are sharded, which the full divergences do not take."""
    if parallel is not None and parallel.vocab_parallel_group is not None:
        raise ValueError(
            f"{function} takes whole rows of logits; got parallel.vocab_parallel_group (topk_loss "
            "and opd_loss take shards)"
        )
    for name, x in tensors.items():
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{name} must be a torch.Tensor with all words; got a DTensor "
                f"({name}.full_tensor() gathers it, topk_loss and opd_loss take shards)"
            )


def _check_teacher(logits: Tensor, teacher: Tensor) -> None:
    """Check the teacher's logits beside the student's."""
    arguments.floating("teacher_logits", teacher)
    if teacher.dim() == 0 or teacher.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits must have the leading shape of logits, {list(logits.shape[:-1])}; "
            f"got shape {list(teacher.shape)}"
        )
    if teacher.device != logits.device:
        raise ValueError(
            f"teacher_logits must be on the device of logits, {logits.device}; got {teacher.device}"
        )
    logits_like("teacher_logits", teacher)


def shared_words(
    vocab: int, teacher_vocab: int, vocab_size: int | None, names: tuple[str, str]
) -> int:
    """The number of words to use of both, whose arguments have these names."""
    if vocab_size is None:
        if vocab != teacher_vocab:
            raise ValueError(
                f"{names[0]} and {names[1]} must have the same words; got V = {vocab} and "
                f"{teacher_vocab} (vocab_size says how many leading words they share)"
            )
        return vocab
    size = arguments.whole("vocab_size", vocab_size, -(2**63))
    if not 1 <= size <= min(vocab, teacher_vocab):
        raise ValueError(
            f"vocab_size must be between 1 and the words of {names[0]} ({vocab}) and of "
            f"{names[1]} ({teacher_vocab}); got {vocab_size}"
        )
    return size


class Inputs(NamedTuple):
    """Of the op."""

    logits: Tensor  # [B, T, V]
    teacher: Tensor  # [B, T, U], U <= V: the student's words beyond take no part
    labels: Tensor | None  # [N]
    rows: RowInputs
    direction: str
    beta: float
    scale: float
    teacher_scale: float
    entropy: bool
    inplace: bool
    backend: str


def _forward(x: Inputs) -> Tensors:
    """A read of both logits ("jsd" two on a GPU), then row functions."""
    run = passes_of(x.backend)
    valid = valid_rows(run, x.rows, x.labels, x.logits)
    losses, log_probs, statistics, entropy = run.divergence(
        x.logits, x.teacher, x.labels, valid, x.scale, x.teacher_scale, x.direction, x.beta,
        x.entropy,
    )  # fmt: skip
    spacing = spacing_in(x.backend, x.logits.dtype, statistics[0], statistics[1], x.scale)
    done = finish(run, x.rows, valid, log_probs, losses, GIVEN, spacing=spacing)
    return (
        done.loss, done.table, done.metrics, done.totals, valid, log_probs, entropy, statistics,
    )  # fmt: skip


def spacing_in(
    backend: str, dtype: torch.dtype, maximum: Tensor, log_sum: Tensor, scale: float
) -> Spacing | None:
    """Of the student's logits, from the statistics of `divergence`: the kernels' maxima are those
    before the scale."""
    if backend == "triton" and scale != 1:
        maximum = maximum * scale
    return spacing_of(dtype, maximum, log_sum, scale)


def _backward(
    x: Inputs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    """A read of both logits and a write."""
    _, table, _, _, valid, _, _, statistics = outputs
    upstream = gradients.row_gradient(table, grads)
    logits = x.logits
    out = gradients.room_for(logits, x.inplace)
    passes_of(x.backend).divergence_grad(
        logits, x.teacher, statistics, valid, upstream, x.scale, x.teacher_scale, x.direction,
        x.beta, out,
    )  # fmt: skip
    return [gradients.written(logits, out, x.inplace)]


def _empty(x: Inputs) -> Tensors:
    like = x.logits.new_empty(0, dtype=torch.promote_types(x.logits.dtype, torch.float32))
    return (*empty_outcome(x.rows, like, x.entropy), like.new_empty(5, x.rows.n_rows))


FULL = Op(
    "full",
    Inputs,
    _forward,
    _backward,
    _empty,
    outputs=(*Outcome._fields, "statistics",),
    grads=2,
    differentiable=("logits",),
    keep=("logits", "teacher", "table", "valid", "statistics"),
)  # fmt: skip
