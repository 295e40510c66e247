"""What every loss does around its position losses: check and flatten, gate, reduce, name."""

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
    flat,
    flat_mask,
    flat_row_data,
    flat_span_ids,
    layout_of,
)
from .gate import DriftGate
from .outputs import LossOutput
from .reduction import Reduction, reduction
from .weighting import check_gate, named

Clips = tuple[float, float, float, float | None]
"""clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip."""
Sizes = tuple[float | Tensor | None, int, float | Tensor | None, float | None]
"""batch_num_tokens, dp_size, global_batch_size, loss_scale_factor."""
MISSING_LABEL = -100  # never a word: stands for ignore_index where there are no labels
NO_CLIPS: Clips = (0.2, 0.2, 3.0, None)


class Student(NamedTuple):
    """What the checks need to know of the student's rows: logits, or what makes them."""

    name: str  # of the argument: "logits" or "hidden_states"
    shape: torch.Size  # of the labels: [B, T] or [N]
    vocab: int
    dtype: torch.dtype  # of the row data: float32, or float64
    device: torch.device


class Batch(NamedTuple):
    """The checked arguments that all losses share, flattened to N rows."""

    student: Student
    ids: Tensor | None  # [N] labels; None where the loss and its gate do without
    valid: Tensor  # [N] bool
    old: Tensor | None  # [N] old log-probs in the accumulation dtype
    spans: Tensor | None  # [N] int64
    layout: Layout
    gate: DriftGate | None
    temperature: float
    reduce: Reduction
    backend: str  # resolved

    def row_data(self, name: str, x: Tensor) -> Tensor:
        """Log-probs of the shape of labels, checked, as [N] in the accumulation dtype."""
        student = self.student
        return flat_row_data(name, x, self.layout, student.device, "labels", student.dtype)


def of_logits(logits: Tensor) -> Student:
    """Logits [B, T, V] or [N, V], checked, as the student."""
    check_logits(logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return Student("logits", logits.shape[:-1], logits.shape[-1], dtype, logits.device)


def prepare(
    student: Student,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    *,
    gate: DriftGate | None,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    span_ids: Tensor | None,
    temperature: float,
    ignore_index: int,
    loss_agg_mode: str,
    batch_num_tokens: float | Tensor | None,
    dp_size: int,
    global_batch_size: float | Tensor | None,
    loss_scale_factor: float | None,
    validate: bool,
    backend: str,  # resolved
) -> Batch:
    """Check what `opd_loss` documents and flatten it; losses that need labels check for None."""
    if labels is None and (gate is not None or old_log_probs is not None):
        raise ValueError("labels must be a tensor where a gate or old_log_probs are used; got None")
    known = labels is not None
    if labels is None:
        labels = torch.zeros(student.shape, dtype=torch.int32, device=student.device)
    check_integer("labels", labels)
    last = "V" if student.name == "logits" else "H"
    of = f"{student.name} without {last}"
    check_like("labels", labels, student.shape, student.device, of)
    check_number("temperature", temperature, above=0)
    if gate is not None:
        check_gate(gate)
        if old_log_probs is None:
            raise ValueError(
                "old_log_probs must be a tensor where a gate is used; got None (gate=None trains "
                "ungated)"
            )
    layout = layout_of("labels", labels, cu_seqlens)
    reduce = reduction(
        loss_agg_mode,
        batch_num_tokens=batch_num_tokens,
        dp_size=dp_size,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
        layout=layout,
    )
    where = layout, student.device, "labels"
    mask = flat_mask(response_mask, *where)
    by_span = gate is not None and gate.granularity == "span"
    spans = flat_span_ids(span_ids, by_span, *where)
    ids = flat(labels)
    ignore_index = ignore_index if known else MISSING_LABEL
    check = validate or student.device.type == "cpu"
    valid = rows.valid_rows(ids, mask, layout.cu_seqlens, ignore_index, student.vocab, check)
    batch = Batch(
        student,
        ids if known else None,
        valid,
        None,
        spans,
        layout,
        gate,
        temperature,
        reduce,
        backend,
    )
    if old_log_probs is None:
        return batch
    return batch._replace(old=batch.row_data("old_log_probs", old_log_probs))


def finish(
    batch: Batch,
    log_probs: Tensor,
    entropy: Tensor | None,
    targets: Tensor,
    estimator: str,
    clips: Clips = NO_CLIPS,
) -> LossOutput:
    """Gate and reduce: log_probs [N], entropy [N], and targets and estimator as the row functions
    take them."""
    shape, valid, old, gate = batch.layout.shape, batch.valid, batch.old, batch.gate
    sequences = batch.layout.cu_seqlens, batch.layout.length
    reduce, backend = batch.reduce, batch.backend
    log_probs = log_probs.contiguous()  # a column of several gathered entries is not
    now = log_probs.detach()
    count = reduce.token_mean or reduce.denominator == "sequences"
    tau, normalize, blocks = 0.0, "off", None
    if gate is not None:
        tau, normalize = float(gate.tau), gate.normalize
        blocks, _ = rows.row_blocks(
            now, old, valid, batch.spans, *sequences,
            gate.granularity, gate.block_size, gate.aggregate, count, backend,
        )  # fmt: skip
        drift = blocks[0]
    else:
        if count:
            blocks, _ = rows.row_blocks(
                now, None, valid, None, *sequences, "token", 1, "mean", True, backend
            )
        drift = torch.zeros_like(now) if old is None else torch.where(valid, old - now, 0)
    loss, row_data, stacked = rows.sampled_token(
        log_probs, old, targets, valid, blocks, *sequences, tau, normalize, estimator, *clips,
        reduce.factor, reduce.denominator, reduce.token_mean, backend,
    )  # fmt: skip
    metrics = named(stacked)
    tokens = metrics.pop("valid_tokens")
    if estimator == "given":
        del metrics["pg_clipfrac"]
    if entropy is not None:
        metrics["entropy"] = entropy.sum() / tokens.clamp(min=1)
    if reduce.divisor is not None:
        loss = loss / reduce.divisor
    token_loss = row_data[1].view(shape)
    return LossOutput(
        loss=token_loss if reduce.none else loss,
        token_loss=token_loss,
        log_probs=now.view(shape),
        gate=row_data[0].detach().view(shape),
        drift=drift.view(shape),
        entropy=None if entropy is None else entropy.view(shape),
        metrics=metrics,
    )
