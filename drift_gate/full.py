"""`full_loss`: distillation from the teacher's logits over the whole vocabulary."""

from typing import Any, get_args

from torch import SymInt, Tensor

from .agreement import Meeting
from .arguments import as_batch, check_floating, check_logits, check_number, check_option
from .backends import resolve
from .batch import Gate, complete, finish, of_logits, prepare
from .divergence import divergence
from .gate import DriftGate
from .outputs import LossOutput
from .topk_lists import Direction, check_beta


def full_loss(
    logits: Tensor,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    teacher_logits: Tensor,
    *,
    direction: Direction = "reverse",
    beta: float = 0.5,
    teacher_temperature: float | None = None,
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
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """Divergence between student and teacher over the whole vocabulary, gated.

    With p = softmax(logits / temperature) and q = softmax(teacher_logits / teacher_temperature)
    at a valid position,

        "reverse"  L = KL(p || q) = sum p log(p / q)
        "forward"  L = KL(q || p) = sum q log(q / p)
        "jsd"      L = beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
                   (generalised JSD, arXiv 2306.13649, weighed as in TRL)

    The forward reads both logits once ("jsd" twice on a GPU), the backward reads both and writes
    the student's gradient; nothing else has the size of the logits. The teacher gets no gradient.

    Args:
        logits: [B, T, V], [N, V]; as in `opd_loss`.
        labels, old_log_probs: as in `opd_loss`, for the gate's drift; None is allowed without it.
            Without labels every position is valid but for the response_mask.
        teacher_logits: the leading shape of logits, any float dtype, last dimension contiguous,
            outer strides free. Where the student's logit is -inf the word has no part in
            "reverse"; a word that only the teacher excludes makes "reverse" infinite, one that
            only the student excludes "forward". "jsd" is always finite. Where the loss is
            infinite the gradient is not to be used. Logits below -1e30, as of words masked with
            the lowest number of bfloat16 or float32, have no mass either: finite losses are those
            of -inf, and where that is infinite the CPU may give a large number.
        direction, beta: as above; 0 < beta < 1 weighs the teacher in the mixture.
        teacher_temperature: divides the teacher's logits; None for `temperature`.
        vocab_size: how many leading words student and teacher share, where the rest is padding of
            the embedding: only these are used, and the student's others get zero gradient. Needed
            where the two differ in V.
        others: as in `opd_loss`.

    Returns:
        LossOutput; `log_probs` and `drift` are 0 without labels.

    Raises:
        ValueError, TypeError: as `opd_loss`; student and teacher differ in V without a
            `vocab_size`; it exceeds either.
    """
    with Meeting(group, context_parallel_group, position_ids) as ranks:
        ranks.expect(logits, validate)
        check_option("direction", direction, get_args(Direction))
        check_beta(beta)
        if teacher_temperature is None:
            teacher_temperature = temperature
        check_number("teacher_temperature", teacher_temperature, above=0)
        _check_teacher(logits, teacher_logits)
        vocab = shared_words(
            logits.shape[-1], teacher_logits.shape[-1], vocab_size, ("logits", "teacher_logits")
        )
        shared = logits[..., :vocab]
        batch = prepare(
            of_logits(shared), labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, temperature=temperature,
            ignore_index=ignore_index, loss_agg_mode=loss_agg_mode,
            batch_num_tokens=batch_num_tokens, dp_size=dp_size,
            global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            validate=validate, backend=resolve(backend, logits), ranks=ranks,
            position_ids=position_ids,
        )  # fmt: skip
        ranks.tell(direction=direction, beta=beta)
    teacher = teacher_logits[..., :vocab].detach()
    if batch.backend == "reference":
        from . import reference, reference_full

        losses, log_probs, entropy = reference_full.position_losses(
            shared.reshape(-1, vocab), teacher.reshape(-1, vocab), batch.ids, batch.valid,
            temperature, teacher_temperature, direction, beta,
        )  # fmt: skip
        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        shown = entropy.detach() if return_entropy else None
        output = reference.finish(batch, log_probs.detach(), shown, losses, loss_agg_mode, sizes)
    else:
        losses, log_probs, _, entropy = divergence(
            as_batch(logits), as_batch(teacher), batch.ids, batch.valid, 1 / temperature,
            1 / teacher_temperature, direction, float(beta), return_entropy, inplace_backward,
            batch.backend,
        )  # fmt: skip
        shown = entropy.detach() if return_entropy else None
        output = finish(batch, log_probs.detach(), shown, losses, "given")
    return complete(batch, output)


def _check_teacher(logits: Tensor, teacher: Tensor) -> None:
    """Check the teacher's logits beside the student's."""
    check_logits(logits)
    check_floating("teacher_logits", teacher)
    if teacher.dim() == 0 or teacher.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"teacher_logits must have the leading shape of logits, {list(logits.shape[:-1])}; "
            f"got shape {list(teacher.shape)}"
        )
    if teacher.device != logits.device:
        raise ValueError(
            f"teacher_logits must be on the device of logits, {logits.device}; got {teacher.device}"
        )
    if teacher.stride(-1) != 1 and teacher.shape[-1] > 1 and teacher.numel() > 0:
        raise ValueError(
            "teacher_logits must be contiguous in their last dimension; got strides "
            f"{list(teacher.stride())}. teacher_logits.contiguous() copies them once"
        )


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
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, SymInt)):
        raise TypeError(f"vocab_size must be an int; got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= min(vocab, teacher_vocab):
        raise ValueError(
            f"vocab_size must be between 1 and the words of {names[0]} ({vocab}) and of "
            f"{names[1]} ({teacher_vocab}); got {vocab_size}"
        )
    return vocab_size
