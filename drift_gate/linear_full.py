"""`linear_full_loss`: the whole vocabulary, from the hidden states of student and teacher."""

from typing import Any, get_args

from torch import Tensor

from .agreement import Meeting
from .arguments import check_number, check_option
from .batch import Batch, Gate, Sizes, Student, complete, finish, prepare
from .full import shared_words
from .gate import DriftGate
from .head import Inputs, check_head
from .head_divergence import head_divergence
from .linear import eager_logits
from .linear_step import detached_tokens, settings_of, step
from .outputs import LossOutput
from .topk_lists import Direction, check_beta


def linear_full_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_hidden_states: Tensor,
    teacher_weight: Tensor,
    *,
    direction: Direction = "reverse",
    beta: float = 0.5,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    teacher_bias: Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
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
    vocab_size: int | None = None,
    return_entropy: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """`full_loss` of the logits that two LM heads make; no [tokens, V] tensor exists.

    Logits of student and teacher exist for a chunk of rows at a time: four products of N V H
    multiplications, the teacher's included, all in the forward; two more where gates cannot be
    formed chunk by chunk or loss_agg_mode is "none" (see `linear_opd_loss`).

    Args:
        hidden_states, weight, bias, softcap, logit_scale, chunk_size: as in
            `linear_token_log_probs`.
        teacher_hidden_states: the leading shape of hidden_states, [..., H'], on the same device.
        teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale: the teacher's head
            [V', H'], [V'], in the dtype of its hidden states. The teacher gets no gradient.
        vocab_size: how many leading words both heads share, see `full_loss`.
        others: as in `full_loss`; there is no `inplace_backward`, as there are no logits.

    Returns:
        LossOutput, as `full_loss`; backward as in `linear_opd_loss`.

    Raises:
        ValueError, TypeError: as `full_loss` and `linear_token_log_probs`.
    """
    with Meeting(group, context_parallel_group, position_ids) as ranks:
        ranks.expect(hidden_states, validate)
        check_option("direction", direction, get_args(Direction))
        check_beta(beta)
        inputs = check_head(
            hidden_states, weight, bias, softcap, logit_scale, temperature, chunk_size, backend
        )
        if teacher_temperature is None:
            teacher_temperature = temperature
        check_number("teacher_temperature", teacher_temperature, above=0)
        theirs = check_head(
            teacher_hidden_states.detach(), teacher_weight.detach(), teacher_bias, teacher_softcap,
            teacher_logit_scale, teacher_temperature, chunk_size, "torch", "teacher_",
        )  # fmt: skip
        inputs = inputs._replace(student=_shared(inputs, theirs, vocab_size))
        batch = prepare(
            inputs.student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, temperature=temperature,
            ignore_index=ignore_index, loss_agg_mode=loss_agg_mode,
            batch_num_tokens=batch_num_tokens, dp_size=dp_size,
            global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            validate=validate, backend=inputs.backend, ranks=ranks, position_ids=position_ids,
        )  # fmt: skip
        ranks.tell(direction=direction, beta=beta)
    options: list[Any] = [inputs.student.vocab, direction, float(beta)]
    if batch.backend == "reference":
        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        output = _reference(
            batch, inputs, theirs, direction, float(beta), loss_agg_mode, sizes, return_entropy
        )
    else:
        output = _fused(batch, inputs, theirs, options, return_entropy)
    return detached_tokens(batch, complete(batch, output))


def _fused(
    batch: Batch, inputs: Inputs, theirs: Inputs, options: list[Any], return_entropy: bool
) -> LossOutput:
    """Gradients formed in the forward, or with "none" in the backward."""
    head = theirs.head
    options = [*options, head.softcap, head.scale]
    targets = [x.detach() for x in (theirs.hidden, head.weight, head.bias) if x is not None]
    if batch.reduce.none:
        settings = settings_of(batch, inputs, "full", options, return_entropy)
        weight, bias, *_ = inputs.head
        log_probs, entropy, losses = head_divergence(
            inputs.hidden, weight, bias, batch.ids, batch.valid, targets, settings
        )
        shown = entropy.detach() if return_entropy else None
        return finish(batch, log_probs.detach(), shown, losses, "given")
    done = step(batch, inputs, "full", options, targets, None, return_entropy)
    log_probs, *shown_entropy, losses = done.results
    entropy_or_none = shown_entropy[0] if return_entropy else None
    return done.attach(finish(batch, log_probs, entropy_or_none, losses, "given"))


def _shared(inputs: Inputs, theirs: Inputs, vocab_size: int | None) -> Student:
    """Check the teacher beside the student; the student with the words that both share."""
    student, teacher = inputs.student, theirs.student
    if teacher.shape != student.shape:
        raise ValueError(
            "teacher_hidden_states must have the leading shape of hidden_states, "
            f"{list(student.shape)}; got shape {[*teacher.shape, theirs.hidden.shape[-1]]}"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"teacher_hidden_states must be on the device of hidden_states, {student.device}; "
            f"got {teacher.device}"
        )
    names = "weight", "teacher_weight"
    return student._replace(vocab=shared_words(student.vocab, teacher.vocab, vocab_size, names))


def _reference(
    batch: Batch,
    inputs: Inputs,
    theirs: Inputs,
    direction: str,
    beta: float,
    loss_agg_mode: str,
    sizes: Sizes,
    return_entropy: bool,
) -> LossOutput:
    from . import reference, reference_full

    words = slice(inputs.student.vocab)
    losses, log_probs, entropy = reference_full.position_losses(
        eager_logits(inputs)[:, words], eager_logits(theirs)[:, words].detach(), batch.ids,
        batch.valid, 1 / inputs.head.scale, 1 / theirs.head.scale, direction, beta,
    )  # fmt: skip
    shown = entropy.detach() if return_entropy else None
    return reference.finish(batch, log_probs.detach(), shown, losses, loss_agg_mode, sizes)
