"""Gated on-policy-distillation losses from logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import rows
from .arguments import (
    Layout,
    check_integer,
    check_like,
    check_logits,
    check_number,
    check_option,
    flat,
    flat_mask,
    flat_row_data,
    flat_span_ids,
    layout_of,
)
from .backends import resolve
from .gate import DriftGate
from .logits import label_log_probs
from .outputs import LossOutput, Metrics
from .weighting import check_gate, named

ESTIMATORS = ("ppo", "importance", "k1", "k2", "k3")
LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
    "none",
)


class Reduction(NamedTuple):
    """`loss_agg_mode` as the row functions take it: see `rows.sampled_token`."""

    factor: float
    denominator: str
    token_mean: bool
    divisor: Tensor | None
    """A denominator that lives on the device; it divides the finished loss."""


def reduction(
    mode: str,
    *,
    batch_num_tokens: float | Tensor | None,
    dp_size: int,
    global_batch_size: float | Tensor | None,
    loss_scale_factor: float | None,
    layout: Layout,
) -> Reduction:
    """Translate verl's `agg_loss` arguments; raises ValueError where they do not fit."""
    check_option("loss_agg_mode", mode, LOSS_AGG_MODES)
    check_number("dp_size", dp_size, above=0)
    by_sequence = mode.startswith("seq-")
    name = "global_batch_size" if by_sequence else "batch_num_tokens"
    size = global_batch_size if by_sequence else batch_num_tokens
    factor, divisor = float(dp_size), None
    if mode == "none":
        return Reduction(1.0, "given", False, None)
    if mode == "token-sum":
        return Reduction(factor, "given", False, None)
    if size is None:
        if dp_size > 1:
            raise ValueError(f"{name} must be given where dp_size > 1 (dp_size = {dp_size})")
        denominator = "sequences" if by_sequence else "tokens"
    elif isinstance(size, Tensor):
        if size.numel() != 1:
            raise ValueError(f"{name} must be one number; got shape {list(size.shape)}")
        denominator, divisor = "given", size.detach().reshape(())
    else:
        check_number(name, size, above=0)
        denominator, factor = "given", factor / size
    if mode == "seq-mean-token-sum-norm":
        if loss_scale_factor is None and layout.cu_seqlens is not None:
            raise ValueError(
                'loss_scale_factor must be given with "seq-mean-token-sum-norm" in a packed '
                "batch (a padded one takes T)"
            )
        if loss_scale_factor is not None:
            check_number("loss_scale_factor", loss_scale_factor, above=0)
        factor = factor / max(layout.length if loss_scale_factor is None else loss_scale_factor, 1)
    return Reduction(factor, denominator, mode == "seq-mean-token-mean", divisor)


def opd_loss(
    logits: Tensor,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor,
    *,
    gate: DriftGate | None = DriftGate(),  # noqa: B008  (frozen)
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
        gate: `DriftGate`, or None to train ungated.
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
            tensors of one element. Where None: this call's valid tokens, sequences that have
            any, and T.
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
    check_logits(logits)
    check_integer("labels", labels)
    check_like("labels", labels, logits.shape[:-1], logits.device, "logits without V")
    _check_options(
        estimator, clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip, temperature
    )
    _check_old_log_probs(gate, estimator, old_log_probs)
    chosen = resolve(backend, logits)
    layout = layout_of("labels", labels, cu_seqlens)
    reduce = reduction(
        loss_agg_mode,
        batch_num_tokens=batch_num_tokens,
        dp_size=dp_size,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
        layout=layout,
    )
    device, dtype = logits.device, torch.promote_types(logits.dtype, torch.float32)
    where = layout, device, "labels"
    old = None
    if old_log_probs is not None:
        old = flat_row_data("old_log_probs", old_log_probs, *where, dtype)
    teacher = flat_row_data("teacher_log_probs", teacher_log_probs, *where, dtype)
    mask = flat_mask(response_mask, *where)
    by_span = gate is not None and gate.granularity == "span"
    spans = flat_span_ids(span_ids, by_span, *where)
    ids = flat(labels)
    check = validate or device.type == "cpu"
    valid = rows.valid_rows(ids, mask, layout.cu_seqlens, ignore_index, logits.shape[-1], check)
    clips = clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip
    if chosen == "reference":
        from . import reference

        return reference.opd_loss(
            logits, ids, old, teacher, valid, layout, spans, gate, estimator, clips, temperature,
            loss_agg_mode, batch_num_tokens, dp_size, global_batch_size, loss_scale_factor,
            return_entropy,
        )  # fmt: skip

    log_probs, entropy = label_log_probs(
        logits, ids, valid, temperature, return_entropy, inplace_backward, chosen
    )
    loss, row_data, drift, metrics = _finish(
        log_probs, old, teacher, valid, spans, layout, gate, estimator, clips, reduce, chosen
    )
    tokens = metrics.pop("valid_tokens")
    if entropy is not None:
        metrics["entropy"] = entropy.sum() / tokens.clamp(min=1)
    shape = layout.shape
    token_loss = row_data[1].view(shape)
    return LossOutput(
        loss=token_loss if loss_agg_mode == "none" else loss,
        token_loss=token_loss,
        log_probs=log_probs.detach().view(shape),
        gate=row_data[0].detach().view(shape),
        drift=drift.view(shape),
        entropy=None if entropy is None else entropy.view(shape),
        metrics=metrics,
    )


def _check_options(
    estimator: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    advantage_clip: float | None,
    temperature: float,
) -> None:
    check_option("estimator", estimator, ESTIMATORS)
    check_number("clip_ratio_low", clip_ratio_low, above=0, inclusive=True)
    check_number("clip_ratio_high", clip_ratio_high, above=0, inclusive=True)
    check_number("clip_ratio_c", clip_ratio_c, above=1)
    if advantage_clip is not None:
        check_number("advantage_clip", advantage_clip, above=0)
    check_number("temperature", temperature, above=0)


def _check_old_log_probs(
    gate: DriftGate | None, estimator: str, old_log_probs: Tensor | None
) -> None:
    """A gate and the ratio need the sampling policy's log-probs."""
    if gate is not None:
        check_gate(gate)
    if old_log_probs is not None:
        return
    if gate is not None:
        raise ValueError(
            "old_log_probs must be a tensor where a gate is used; got None (gate=None trains "
            "ungated)"
        )
    if estimator in ("ppo", "importance"):
        raise ValueError(
            f"old_log_probs must be a tensor with estimator {estimator!r}; got None (k1, k2 and "
            "k3 do without)"
        )


Clips = tuple[float, float, float, float | None]
Finished = tuple[Tensor, Tensor, Tensor, Metrics]


def _finish(
    log_probs: Tensor,
    old: Tensor | None,
    teacher: Tensor | None,
    valid: Tensor,
    spans: Tensor | None,
    layout: Layout,
    gate: DriftGate | None,
    estimator: str,
    clips: Clips,
    reduce: Reduction,
    backend: str,
) -> Finished:
    """Gate, loss and reduction of flat rows: (loss, [weight, token loss, ...], drift, metrics)."""
    blocks = None
    count = reduce.token_mean or reduce.denominator == "sequences"
    sequences = layout.cu_seqlens, layout.length
    if gate is not None:
        blocks, _ = rows.row_blocks(
            log_probs.detach(), old, valid, spans, *sequences,
            gate.granularity, gate.block_size, gate.aggregate, count, backend,
        )  # fmt: skip
    elif count:
        blocks, _ = rows.row_blocks(
            log_probs.detach(), None, valid, None, *sequences, "token", 1, "mean", True, backend
        )
    tau, normalize = (0.0, "off") if gate is None else (float(gate.tau), gate.normalize)
    loss, row_data, metrics = rows.sampled_token(
        log_probs, old, teacher, valid, blocks, *sequences, tau, normalize, estimator, *clips,
        reduce.factor, reduce.denominator, reduce.token_mean, backend,
    )  # fmt: skip
    if gate is not None:
        assert blocks is not None
        drift = blocks[0]
    else:
        drift = torch.zeros_like(valid, dtype=log_probs.dtype)
        if old is not None:
            drift = torch.where(valid, old - log_probs.detach(), drift)
    if reduce.divisor is not None:
        loss = loss / reduce.divisor
    return loss, row_data, drift, named(metrics)
