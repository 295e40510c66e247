"""What every loss does around its position losses: check and flatten, gate, reduce, name."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import rows
from .accumulation import GateNormalizer
from .agreement import Meeting
from .arguments import (
    Layout,
    check_floating,
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
from .context_parallel import context_of
from .gate import DriftGate
from .gating import Gated, Gating, gated
from .outputs import LossOutput
from .ranks import size_of
from .reduction import Reduction, reduction
from .scope import Scope, Totals, call_totals, rescale
from .torch_rows import wide
from .vocab_parallel import Shard
from .weighting import check_gate, named

Gate = DriftGate | GateNormalizer | Tensor | None
"""What the losses take as `gate`."""

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
    shard: Shard | None = None  # of the words, of which `vocab` counts all


class Batch(NamedTuple):
    """The checked arguments that all losses share, flattened to N rows."""

    student: Student
    ids: Tensor | None  # [N] labels; None where the loss and its gate do without
    valid: Tensor  # [N] bool
    old: Tensor | None  # [N] old log-probs in the accumulation dtype
    gating: Gating
    temperature: float
    reduce: Reduction
    scope: Scope

    @property
    def layout(self) -> Layout:
        return self.gating.layout

    @property
    def backend(self) -> str:
        return self.gating.backend

    @property
    def sequences(self) -> tuple[Tensor | None, int]:
        """cu_seqlens, or where there are none rows of a sequence."""
        return self.layout.cu_seqlens, self.layout.length

    @property
    def counts(self) -> bool:
        """Whether the loss needs rows or first rows of the sequences."""
        return self.reduce.token_mean or self.reduce.denominator == "sequences"

    def row_data(self, name: str, x: Tensor) -> Tensor:
        """Log-probs of the shape of labels, checked, as [N] in the accumulation dtype."""
        student = self.student
        return flat_row_data(name, x, self.layout, student.device, "labels", student.dtype)


def of_logits(logits: Tensor, shard: Shard | None = None) -> Student:
    """Logits [B, T, V] or [N, V], checked, as the student."""
    check_logits(logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    vocab = logits.shape[-1] if shard is None else shard.total
    return Student("logits", logits.shape[:-1], vocab, dtype, logits.device, shard)


def prepare(
    student: Student,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    *,
    gate: Gate,
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
    ranks: Meeting,
    position_ids: Tensor | None,
) -> Batch:
    """Check what `opd_loss` documents and flatten it; losses that need labels check for None."""
    normalizer: GateNormalizer | None = None
    rule: DriftGate | Tensor | None
    if isinstance(gate, GateNormalizer):
        normalizer, rule = gate, gate.gate
    else:
        rule = gate
    by_drift = not (rule is None or isinstance(rule, Tensor))
    if labels is None and (by_drift or old_log_probs is not None):
        raise ValueError("labels must be a tensor where a gate or old_log_probs are used; got None")
    known = labels is not None
    if labels is None:
        labels = torch.zeros(student.shape, dtype=torch.int32, device=student.device)
    check_integer("labels", labels)
    last = "V" if student.name == "logits" else "H"
    of = f"{student.name} without {last}"
    check_like("labels", labels, student.shape, student.device, of)
    check_number("temperature", temperature, above=0)
    layout = layout_of("labels", labels, cu_seqlens)
    scope = Scope(ranks.group, normalizer)
    reduce = reduction(
        loss_agg_mode,
        batch_num_tokens=batch_num_tokens,
        dp_size=dp_size,
        global_batch_size=global_batch_size,
        loss_scale_factor=loss_scale_factor,
        length=layout.length if layout.cu_seqlens is None else None,
        ranks_along=size_of(ranks.context) if ranks.context else 1,
        single=scope.single,
    )
    gating = _gating(
        rule, old_log_probs, span_ids, position_ids, ranks.context, layout, student, backend
    )._replace(part=not scope.single)
    mask = flat_mask(response_mask, layout, student.device, "labels")
    ids = flat(labels)
    ignore_index = ignore_index if known else MISSING_LABEL
    check = validate or student.device.type == "cpu"
    valid = rows.valid_rows(ids, mask, layout.cu_seqlens, ignore_index, student.vocab, check)
    ranks.tell(
        labels.shape, gate=gating.gate, normalizer=normalizer is not None,
        loss_agg_mode=loss_agg_mode, dp_size=dp_size, dtype=student.dtype, temperature=temperature,
        denominator=reduce.denominator,
    )  # fmt: skip
    batch = Batch(student, ids if known else None, valid, None, gating, temperature, reduce, scope)
    if old_log_probs is None:
        return batch
    return batch._replace(old=batch.row_data("old_log_probs", old_log_probs))


def _gating(
    gate: DriftGate | Tensor | None,
    old_log_probs: Tensor | None,
    span_ids: Tensor | None,
    position_ids: Tensor | None,
    context_group: str,
    layout: Layout,
    student: Student,
    backend: str,
) -> Gating:
    """Check what decides the weights."""
    where = layout, student.device, "labels"
    weights = None
    if isinstance(gate, Tensor):
        check_floating("gate", gate)
        weights = flat_row_data("gate", gate, *where, student.dtype)
        gate = None
    elif gate is not None:
        check_gate(gate)
        if old_log_probs is None:
            raise ValueError(
                "old_log_probs must be a tensor where a gate is used; got None (gate=None trains "
                "ungated)"
            )
    spans = flat_span_ids(span_ids, gate is not None and gate.granularity == "span", *where)
    context = context_of(position_ids, context_group, *where)
    if context is not None and backend == "reference":
        raise ValueError('backend "reference" takes whole sequences; got position_ids')
    return Gating(gate, weights, spans, layout, context, backend)


def finish(
    batch: Batch,
    log_probs: Tensor,
    entropy: Tensor | None,
    targets: Tensor,
    estimator: str,
    clips: Clips = NO_CLIPS,
) -> LossOutput:
    """Gate and reduce: log_probs [N], entropy [N], and targets and estimator as the row functions
    take them. The loss is this call's: see `complete`."""
    shape, valid, old = batch.layout.shape, batch.valid, batch.old
    reduce, backend = batch.reduce, batch.backend
    log_probs = log_probs.contiguous()  # a column of several gathered entries is not
    now = log_probs.detach()
    found = gated(batch.gating, now, old, valid, batch.counts)
    loss, row_data, stacked = rows.sampled_token(
        log_probs, old, targets, valid, found.blocks, *batch.sequences, found.tau, found.normalize,
        estimator, *clips, reduce.factor, reduce.denominator, reduce.token_mean, backend,
    )  # fmt: skip
    metrics = named(stacked)
    tokens = metrics.pop("valid_tokens")
    if estimator == "given":
        del metrics["pg_clipfrac"]
    if entropy is not None:
        metrics["entropy"] = entropy.sum() / tokens.clamp(min=1)
    if reduce.divisor is not None:
        loss = loss / reduce.divisor
    weights = row_data[0].detach()
    if not batch.scope.single:
        metrics.update(zip(TOTALS, _totals(batch, found, weights), strict=True))
    token_loss = row_data[1].view(shape)
    drift = torch.zeros_like(now) if found.drift is None else found.drift
    return LossOutput(
        loss=token_loss if reduce.none else loss,
        token_loss=token_loss,
        log_probs=now.view(shape),
        gate=weights.view(shape),
        drift=drift.view(shape),
        entropy=None if entropy is None else entropy.view(shape),
        metrics=metrics,
    )


TOTALS = tuple(f"call {name}" for name in Totals._fields)
"""Metrics that lead from `finish` to `complete`, in batches larger than the call."""


def _totals(batch: Batch, found: Gated, weights: Tensor) -> Totals:
    size = None
    if batch.reduce.denominator == "sequences":
        assert found.blocks is not None
        size = wide(found.blocks[3].sum())
    return call_totals(found, weights, batch.valid, size)


def complete(batch: Batch, output: LossOutput) -> LossOutput:
    """The output of a call as a part of its batch: over ranks, and over micro-batches."""
    if batch.scope.single:
        return output
    call = Totals(*(output.metrics.pop(name) for name in TOTALS))
    counted = batch.reduce.denominator != "given"
    return rescale(batch.scope, output, batch.valid, call, counted, batch.reduce.none)
