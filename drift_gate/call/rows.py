"""The arguments that all losses share, checked and flattened to N rows."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..choices import REDUCTIONS
from ..gate import DriftGate
from ..options import Reduction, as_reduction
from ..parallel.agreement import Meeting
from ..parallel.ranks import size_of
from ..parallel.scope import Collector
from ..passes.backends import passes_of
from ..passes.rules import NO_GATE, GateRule, ReduceRule
from . import arguments

Gate = DriftGate | Collector | Tensor | None
"""What the losses take as `gate`."""


class Student(NamedTuple):
    """What the checks need to know of the student's rows: logits, or what makes them."""

    name: str  # of the argument: "logits" or "hidden_states"
    of: str  # the same without its last dimension, in words
    shape: Sequence[int]  # of the labels: [B, T] or [N]
    vocab: int  # of all words, where ranks share them
    dtype: torch.dtype  # of row data: float32, or float64
    device: torch.device


class RowInputs(NamedTuple):
    """What every loss's op takes beside its own: [N] tensors, and the rules for them."""

    response_mask: Tensor | None
    old: Tensor | None
    spans: Tensor | None
    positions: Tensor | None  # where sequences are cut over `context`
    cu_seqlens: Tensor | None
    weights: Tensor | None  # the caller's, as gate
    row_weights: Tensor | None
    divisor: Tensor | None  # a denominator that lies on the device, []
    n_rows: int
    length: int
    gate: GateRule
    reduce: ReduceRule
    per_token: bool  # the loss is the per-token losses
    ignore_index: int
    ignores: bool  # whether labels may be ignore_index
    vocab: int
    check: bool  # whether values are read, and raise
    group: str
    context: str
    collected: bool  # by a GateNormalizer, which rescales the results
    backend: str


class Call(NamedTuple):
    """The checked arguments: what goes into the op, and what is done with its results."""

    labels: Tensor | None  # [N]
    rows: RowInputs
    shape: Sequence[int]
    normalizer: Collector | None
    dtype: torch.dtype


NEVER = -(2**31)  # no word: stands for ignore_index where no label is ignored


def take_rows(
    student: Student,
    labels: Tensor | None,
    old_log_probs: Tensor | None,
    *,
    gate: Gate,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    span_ids: Tensor | None,
    position_ids: Tensor | None,
    row_weights: Tensor | None,
    temperature: float,
    ignore_index: int | None,
    reduction: Reduction | str,
    validate: bool,
    backend: str,
    ranks: Meeting,
    unit: str = "token",
    labelled: bool = True,
    trains: bool = False,
) -> Call:
    """Check what `opd_loss` documents; `backend` is resolved, `unit` that of the ratio.

    labelled: whether a drift is one of labels, which must then be there. trains: whether anything
    needs a gradient: other calls are no part of a GateNormalizer's step.
    """
    name, of, shape, vocab, dtype, device = student
    base = "labels" if labelled else name  # what row data are compared with
    normalizer: Collector | None = None
    rule: DriftGate | Tensor | None
    if not isinstance(gate, DriftGate) and isinstance(gate, Collector):  # an ABC: in Python
        normalizer, rule = gate if trains and torch.is_grad_enabled() else None, gate.gate
    else:
        rule = gate
    if backend == "reference":
        _whole_batch(ranks, normalizer)
    if labels is not None:
        if not (isinstance(labels, Tensor) and labels.dtype in arguments.INTEGERS):
            arguments.integer("labels", labels)
        if labels.shape != shape or labels.device != device:
            arguments.like("labels", labels, shape, device, of)
    elif labelled and (old_log_probs is not None or isinstance(rule, DriftGate)):
        raise ValueError("labels must be a tensor where a gate or old_log_probs are used; got None")
    part = bool(ranks.group) or normalizer is not None
    gated, weights = _gate(rule, old_log_probs, part, shape, device, dtype)
    spans = _spans(span_ids, "span" in (gated.granularity, unit), shape, device, base)
    length = None if cu_seqlens is not None else shape[-1]
    if type(reduction) is str and not ranks.any and not torch.compiler.is_compiling():
        how, reduce, divisor = _reduce_by_name(reduction, length, part)
    else:
        how = as_reduction(reduction)
        reduce, divisor = _reduce(how, length, ranks, part, device)
    arguments.number("temperature", temperature, 0)
    mask = old = weighed = positions = None
    if response_mask is not None:
        mask = mask_of(response_mask, shape, device, base)
    if old_log_probs is not None:
        old = arguments.row_data("old_log_probs", old_log_probs, shape, device, base, dtype)
    if row_weights is not None:
        weighed = arguments.row_data("row_weights", row_weights, shape, device, "labels", dtype)
    if cu_seqlens is not None:
        cu_seqlens = borders_of(cu_seqlens, shape, device, base)
    if position_ids is not None:
        arguments.integer("position_ids", position_ids)
        arguments.like("position_ids", position_ids, shape, device, base)
        positions = arguments.flat(position_ids, torch.int64) if ranks.context else None
    rows = RowInputs(
        mask, old, spans, positions, cu_seqlens, weights, weighed, divisor, math.prod(shape),
        shape[-1], gated, reduce, how.mode == "none",
        NEVER if ignore_index is None else ignore_index,
        labels is not None and ignore_index is not None, vocab, validate or device.type == "cpu",
        ranks.group, ranks.context, normalizer is not None, backend,
    )  # fmt: skip
    ids = None if labels is None else arguments.flat(labels)
    call = Call(ids, rows, shape, normalizer, dtype)
    if ranks.any:
        _agree(
            ranks, call, rule, how, device, temperature=temperature, ignore_index=ignore_index,
            position_ids=position_ids is not None,
        )  # fmt: skip
    return call


def _agree(
    ranks: Meeting,
    call: Call,
    rule: DriftGate | Tensor | None,
    how: Reduction,
    device: torch.device,
    **others: object,
) -> None:
    """Tell the other ranks what a call is of, and look for values that are wrong on this rank
    alone while the others wait for it."""
    rows = call.rows
    ranks.tell(
        call.shape,
        gate=rule if isinstance(rule, DriftGate) else type(rule).__name__,
        normalizer=call.normalizer is not None,
        reduction=how.mode,
        dp_size=how.dp_size,
        batch_num_tokens=how.batch_num_tokens,
        global_batch_size=how.global_batch_size,
        loss_scale_factor=how.loss_scale_factor,
        dtype=call.dtype,
        labels=call.labels is not None,
        old_log_probs=rows.old is not None,
        row_weights=rows.row_weights is not None,
        **others,
    )
    if ranks.reads:
        passes_of(rows.backend).valid_rows(
            call.labels, rows.response_mask, rows.ignore_index, rows.vocab, rows.cu_seqlens,
            rows.n_rows, device, True,
        )  # fmt: skip


def _whole_batch(ranks: Meeting, normalizer: Collector | None) -> None:
    """Raise where the reference would see a part of its batch."""
    parts = {
        "a GateNormalizer": normalizer is not None,
        "parallel.context_parallel_group": bool(ranks.context),
        "parallel.group": bool(ranks.group),
    }
    for part, given in parts.items():
        if given:
            raise ValueError(f'backend "reference" takes whole batches; got {part}')


def _gate(
    gate: DriftGate | Tensor | None,
    old: Tensor | None,
    part: bool,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[GateRule, Tensor | None]:
    """The rule, and the caller's weights."""
    if gate is None:
        return NO_GATE, None
    if isinstance(gate, DriftGate):
        if old is None:
            raise ValueError(
                "old_log_probs must be a tensor where a gate is used; got None (gate=None trains "
                "ungated)"
            )
        return gate_rule(gate, part), None
    if isinstance(gate, Tensor):
        weights = arguments.row_data("gate", gate, shape, device, "labels", dtype)
        return NO_GATE._replace(normalize="given"), weights
    arguments.wrong_type("gate", gate, "a DriftGate, a GateNormalizer, weights or None")


def gate_rule(gate: DriftGate, part: bool) -> GateRule:
    """A `DriftGate` as the row functions take it; blocks of one row are measured there."""
    single = gate.granularity == "token" or (gate.granularity, gate.block_size) == ("block", 1)
    return GateRule(
        gate.granularity, gate.block_size, gate.aggregate, float(gate.tau), gate.normalize, part,
        1 if single else gate.sample_every,
    )  # fmt: skip


def _spans(
    span_ids: Tensor | None, needed: bool, shape: Sequence[int], device: torch.device, base: str
) -> Tensor | None:
    """Span ids as [N] int64, there exactly where a granularity is "span"."""
    if span_ids is None:
        if needed:
            raise ValueError(
                'span_ids must be given with gate granularity "span" (newline_spans makes them)'
            )
        return None
    if not needed:
        raise ValueError(
            'span_ids are used with gate granularity "span" alone; leave them out, or pass '
            'gate=DriftGate(granularity="span")'
        )
    arguments.integer("span_ids", span_ids)
    arguments.like("span_ids", span_ids, shape, device, base)
    return arguments.flat(span_ids, torch.int64)


def mask_of(mask: Tensor, shape: Sequence[int], device: torch.device, base: str) -> Tensor:
    """The response mask as [N]; bool, integer or float."""
    if not isinstance(mask, Tensor):
        arguments.wrong_type("response_mask", mask, "a torch.Tensor")
    if mask.shape != shape or mask.device != device:
        arguments.like("response_mask", mask, shape, device, base)
    return arguments.flat(mask)


def borders_of(cu_seqlens: Tensor, shape: Sequence[int], device: torch.device, base: str) -> Tensor:
    """The borders of a packed batch, [B + 1]."""
    arguments.integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [B + 1], B >= 1; got shape {list(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(
            f"cu_seqlens must be on the device of {base}, {device}; got {cu_seqlens.device}"
        )
    if len(shape) == 2 and shape[0] != 1:
        raise ValueError(
            f"{base} must be packed, [N] or [1, N], where cu_seqlens is given; "
            f"got shape {list(shape)}"
        )
    return cu_seqlens.contiguous()


def _reduce(
    reduction: Reduction, length: int | None, ranks: Meeting, part: bool, device: torch.device
) -> tuple[ReduceRule, Tensor | None]:
    """`Reduction` as the row functions take it, and a denominator that is a tensor.

    length: T of a padded batch. part: something else counts what this call does not see.
    """
    name = reduction.mode
    arguments.option("reduction.mode", name, REDUCTIONS)
    mode = REDUCTIONS[name]
    dp_size = reduction.dp_size
    arguments.number("reduction.dp_size", dp_size, 0)
    factor, divisor, denominator = float(dp_size), None, mode.denominator
    if name == "none":
        factor = 1.0
    if denominator == "given":
        return ReduceRule(factor, denominator, False), None
    field = "batch_num_tokens" if denominator == "tokens" else "global_batch_size"
    size = reduction.batch_num_tokens if denominator == "tokens" else reduction.global_batch_size
    if size is None:
        if dp_size > 1 and not part:
            raise ValueError(
                f"reduction.{field} must be given where reduction.dp_size > 1 and there is no "
                f"parallel.group (it is {dp_size})"
            )
    elif isinstance(size, Tensor):
        if size.numel() != 1:
            raise ValueError(f"reduction.{field} must be one number; got shape {list(size.shape)}")
        denominator, divisor = "given", size.detach().reshape(())
    else:
        arguments.number(f"reduction.{field}", size, 0, inclusive=True)
        denominator = "given"
        if size == 0:  # of a batch without rows, or else the loss is infinite
            divisor = torch.zeros((), device=device)
        else:
            factor = factor / float(size)
    if mode.by_length:
        factor = factor / _length(reduction.loss_scale_factor, length, ranks)
    return ReduceRule(factor, denominator, mode.token_mean), divisor


@functools.lru_cache(maxsize=1024)
def _reduce_by_name(
    mode: str, length: int | None, part: bool
) -> tuple[Reduction, ReduceRule, Tensor | None]:
    """`_reduce` of a mode alone, on this rank alone: it depends on nothing else."""
    reduction = Reduction(mode)
    return reduction, *_reduce(reduction, length, Meeting(), part, torch.device("cpu"))


def _length(factor: float | None, length: int | None, ranks: Meeting) -> float:
    """What "seq-mean-token-sum-norm" divides by."""
    if factor is not None:
        arguments.number("reduction.loss_scale_factor", factor, 0)
        return float(factor)
    if length is None:
        raise ValueError(
            'reduction.loss_scale_factor must be given with "seq-mean-token-sum-norm" in a packed '
            "batch (a padded one takes T)"
        )
    return max(length * (size_of(ranks.context) if ranks.context else 1), 1)
