"""`opd_loss`: the gated sampled-token loss from logits."""

from typing import Any

from torch import Tensor

from .agreement import Meeting
from .arguments import check_integer, check_number, check_option
from .batch import Batch, Gate, complete, finish, of_logits, prepare
from .gate import DriftGate
from .logits import label_log_probs
from .outputs import LossOutput
from .vocab_parallel import local_words, named_group, resolve_for

ESTIMATORS = ("ppo", "importance", "k1", "k2", "k3")


def opd_loss(
    logits: Tensor,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor,
    *,
    gate: Gate = DriftGate(),  # noqa: B008  (frozen)
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
    estimator: str = "ppo",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    advantage_clip: float | None = None,
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
    inplace_backward: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """Sampled-token on-policy distillation with drift gating (arXiv 2606.24084).

    For each valid position t with the sampled token y_t = labels[t]:

        logp = log softmax(logits / temperature)[y]
        A = teacher_logp - old_logp (frozen),  r = exp(clamp(logp - old_logp, -20, 20))
        "ppo":         L = -min(r A, clip(r, 1 - low, 1 + high) A), and for A < 0 at most -c A
        "importance":  L = -r A
        "k1", "k2", "k3":  estimators of KL(student || teacher) from logp - teacher_logp, with
                       the value and gradient of verl's `kl_penalty`
        loss = sum_t w_t L_t / D,  w from `gate` (see `DriftGate`), D from `loss_agg_mode`

    The gate is detached and never changes D. Two passes over the logits: one read forward, one
    read and one write backward.

    Args:
        logits: [B, T, V], [N, V]; bfloat16, float16, float32 (float64 with the PyTorch backend).
            Last dimension contiguous, outer strides free.
        labels: [B, T] or [N], int64 or int32, aligned: row t of the logits predicts labels[t].
        old_log_probs: the shape of labels, nats: the sampling policy's. None is allowed without
            a gate for k1, k2 and k3.
        teacher_log_probs: the shape of labels, nats.
        gate: `DriftGate`, or None to train ungated. A `GateNormalizer` for gradient accumulation.
            A tensor of the shape of labels: the weights themselves, of `gate_weights` for example.
        response_mask: the shape of labels, not 0 where valid. Rows that are invalid or whose label
            is `ignore_index` are not read, get zero gradient, and may hold anything.
        cu_seqlens: [B + 1] borders of the sequences of a packed [N] (or [1, N]) batch.
        span_ids: the shape of labels, with `DriftGate(granularity="span")`: see `newline_spans`.
        estimator: "ppo", "importance", "k1", "k2" or "k3".
        clip_ratio_low, clip_ratio_high, clip_ratio_c: PPO's clip and dual clip (c > 1).
        advantage_clip: bounds A to [-advantage_clip, advantage_clip].
        temperature: divides the logits; greater than 0.
        ignore_index: label of invalid positions.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
            "seq-mean-token-mean": the values of verl's `agg_loss`; or "none": per-token losses.
        batch_num_tokens, dp_size, global_batch_size, loss_scale_factor: the caller's denominators
            with verl's meaning, for batches larger than this call. The first and third may be
            tensors of one element. Where None: the valid tokens and the sequences that have any,
            of this call or of all ranks of `group`, and T (of whole sequences).
        group: process group whose ranks share the batch (data parallel, context parallel): gates
            have unit mean over all of its rows, and D is counted over them. The ranks' losses add
            up to that of one process, as do their gradients; where an engine averages them (DDP,
            FSDP) give dp_size, the number of ranks. Metrics are of this rank.
        position_ids: the shape of labels, int: positions in their sequences, of which this rank
            has some and the other ranks of `context_parallel_group` (None for `group`) the rest.
            Any layout will do; row b of the batch (or of cu_seqlens) is the same sequence on all
            of them. Blocks are reduced over all of a sequence.
        context_parallel_group: process group over which sequences are cut; part of `group`.
        vocab_parallel_group: process group over which the words are sharded: `logits` are this
            rank's, [..., V_r], in the order of the ranks; everything else is the same on all
            of them, and labels and ids count from the first word of all. The gradient is that of
            this rank's logits. A DTensor with its last dimension sharded needs no argument.
        return_entropy: also return each position's entropy, detached.
        inplace_backward: let the backward overwrite `logits` with their gradient, see
            `token_log_probs`.
        validate: check labels and cu_seqlens on a GPU too, at the cost of a synchronisation.
        backend: "auto" (Triton on a GPU, else PyTorch), "triton", "torch" or "reference".

    Returns:
        LossOutput(loss, token_loss, log_probs, gate, drift, entropy, metrics). A batch without a
        valid position has loss 0 and zero gradients. A NaN in a valid row makes the loss NaN.

    Raises:
        ValueError, TypeError: an argument's shape, dtype, device or value does not fit. A label
            outside the vocabulary raises on the CPU and with `validate`; on a GPU it otherwise
            makes the loss NaN, and nothing outside its row is read or written.
    """
    logits, shard = local_words("logits", logits, vocab_parallel_group, -1)
    with Meeting(group, context_parallel_group, position_ids, named_group(shard)) as ranks:
        ranks.expect(logits, validate)
        check_options(estimator, clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip)
        check_integer("labels", labels)
        batch = prepare(
            of_logits(logits, shard), labels, old_log_probs, gate=gate,
            response_mask=response_mask, cu_seqlens=cu_seqlens, span_ids=span_ids,
            temperature=temperature, ignore_index=ignore_index, loss_agg_mode=loss_agg_mode,
            batch_num_tokens=batch_num_tokens, dp_size=dp_size,
            global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            validate=validate, backend=resolve_for(backend, logits, shard), ranks=ranks,
            position_ids=position_ids,
        )  # fmt: skip
        check_old(batch, estimator)
        teacher = batch.row_data("teacher_log_probs", teacher_log_probs)
        ranks.tell(estimator=estimator)
    clips = clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip
    if batch.backend == "reference":
        from . import reference

        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        output = reference.opd_loss(
            batch, logits, teacher, estimator, clips, loss_agg_mode, sizes, return_entropy
        )
    else:
        assert batch.ids is not None
        log_probs, entropy = label_log_probs(
            logits, batch.ids, batch.valid, temperature, return_entropy, inplace_backward,
            batch.backend, shard,
        )  # fmt: skip
        output = finish(batch, log_probs, entropy, teacher, estimator, clips)
    return complete(batch, output)


def check_options(
    estimator: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    advantage_clip: float | None,
) -> None:
    """Raise unless the options of the position loss fit."""
    check_option("estimator", estimator, ESTIMATORS)
    check_number("clip_ratio_low", clip_ratio_low, above=0, inclusive=True)
    check_number("clip_ratio_high", clip_ratio_high, above=0, inclusive=True)
    check_number("clip_ratio_c", clip_ratio_c, above=1)
    if advantage_clip is not None:
        check_number("advantage_clip", advantage_clip, above=0)


def check_old(batch: Batch, estimator: str) -> None:
    """Raise unless the old log-probs are there where the estimator needs them."""
    if batch.old is None and estimator in ("ppo", "importance"):
        raise ValueError(
            f"old_log_probs must be a tensor with estimator {estimator!r}; got None (k1, k2 and "
            "k3 do without)"
        )
