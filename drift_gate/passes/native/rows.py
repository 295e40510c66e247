"""Row functions in C: `passes.rules` says what they take and give. Row data is float32 here, and
arithmetic on it float64. One call into the library, by one thread."""

import functools
from typing import Any

import torch
from torch import Tensor

from ..rules import (
    GIVEN,
    METRICS,
    Finished,
    GateRule,
    PositionRule,
    ReduceRule,
    RowData,
    Weights,
    sampled,
)
from . import errors
from .jobs import FINISH, GATE, MEASURED_ROWS, POSITION, REDUCE, VALID_ROWS
from .library import (
    BOOL,
    CPU,
    FLOAT32,
    INT32,
    INT64,
    NO_MEMORY,
    booleans,
    choice,
    floats,
    function,
    listed,
    mask_kind,
    no_memory,
)

FLOAT64 = torch.float64
NO_SPACING: tuple[float, ...] = (0, 0, 0, 1.0)
NO_REDUCTION = ReduceRule(1.0, "given", False)


def valid_rows(
    labels: Tensor | None,  # [N] int32 or int64; None: the mask alone decides
    response_mask: Tensor | None,  # [N] any dtype, not 0 where valid
    ignore_index: int,
    vocab: int,
    cu_seqlens: Tensor | None,  # [B + 1] int32 or int64
    n_rows: int,
    device: torch.device,  # the CPU
    check: bool,
) -> Tensor:
    """valid [N] bool: in the response mask, and label not ignored.

    With `check`, ValueError where a float mask holds what is neither 0 nor 1, where a valid label
    is outside [0, vocab) or where cu_seqlens do not rise from 0 to N.
    """
    valid = torch.empty(n_rows, dtype=BOOL, device=CPU)
    labels = None if labels is None else listed(labels, n_rows)
    kind, borders, count = 0, None, 0
    if response_mask is not None:
        response_mask, kind = response_mask.contiguous(), mask_kind(response_mask, n_rows)
    if cu_seqlens is not None:
        borders = listed(cu_seqlens)
        count = borders.numel()
    job = VALID_ROWS.pack(
        n_rows, vocab, ignore_index, check, 0 if labels is None else labels.data_ptr(),
        labels is not None and labels.dtype is INT64,
        0 if response_mask is None else response_mask.data_ptr(), kind,
        0 if borders is None else borders.data_ptr(),
        borders is not None and borders.dtype is INT64, count, valid.data_ptr(),
    )  # fmt: skip
    bad = function("valid_rows", False)(job, 0, n_rows)
    if bad:
        raise errors.invalid_rows(
            bad, labels, response_mask, ignore_index, vocab, cu_seqlens, n_rows
        )
    return valid


def measured_rows(data: RowData, gate: GateRule) -> Tensor:
    """[N] bool: the first valid row of each block, and every `sample_every`-th valid one after."""
    n = data.valid.numel()
    measured = torch.empty(n, dtype=BOOL, device=CPU)
    packed, spans, _ = _gate(gate)
    _kept, row_data = _row_data(data._replace(old=None, measured=None), spans)
    job = MEASURED_ROWS.pack(*row_data, measured.data_ptr(), gate.sample_every)
    if function("measured_rows", False)(job + packed, 0, n) == NO_MEMORY:
        raise no_memory()
    return measured


def weigh(data: RowData, gate: GateRule, given: Tensor | None = None) -> Weights:
    """How rows weigh; `given` [N] as in `finish`. Raises ValueError for unknown options."""
    n = data.valid.numel()
    weight = torch.empty(n, dtype=FLOAT32, device=CPU)
    drift = torch.empty(n, dtype=FLOAT32, device=CPU)
    first, metrics, totals = _others(n)
    outputs = weight.data_ptr(), drift.data_ptr(), 0, 0, 0, first.data_ptr(), 0
    ends = metrics.data_ptr(), totals.data_ptr()
    rules = _rules(gate, GIVEN, NO_REDUCTION)
    if gate.sample_every > 1:
        data = sampled(data, gate, measured_rows)
    _finish(data, given, None, None, (*outputs, *ends), rules)
    return Weights(weight, drift, first, metrics, totals)


def finish(
    data: RowData,
    gate: GateRule,
    given: Tensor | None,  # [N]: the caller's weights, where the gate's normalize is "given"
    row_weights: Tensor | None,  # [N]: what multiplies a row beside; None for 1
    target: Tensor,  # [N]: as the position's rule takes it
    position: PositionRule,
    reduce: ReduceRule,
) -> Finished:
    """Weights, position losses, and their sum. Raises ValueError for unknown options."""
    n = data.valid.numel()
    table = torch.empty(5, n, dtype=FLOAT32, device=CPU)
    loss = torch.empty((), dtype=FLOAT32, device=CPU)
    first, metrics, totals = _others(n)
    weight, row = table.data_ptr(), 4 * n  # bytes
    outputs = weight, weight + 4 * row, weight + row, weight + 2 * row, weight + 3 * row
    ends = first.data_ptr(), loss.data_ptr(), metrics.data_ptr(), totals.data_ptr()
    rules = _rules(gate, position, reduce)
    if gate.sample_every > 1:
        data = sampled(data, gate, measured_rows)
    _finish(data, given, row_weights, target, (*outputs, *ends), rules)
    return Finished(loss, table, first, metrics, totals)


def _others(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """first, metrics and totals."""
    first = torch.empty(n, dtype=INT32, device=CPU)
    metrics = torch.empty(len(METRICS), dtype=FLOAT32, device=CPU)
    return first, metrics, torch.empty(4, dtype=FLOAT64, device=CPU)


Rules = tuple[bytes, bool, bool]
"""Packed; whether spans are needed; whether weights are given."""


@functools.lru_cache(maxsize=256)
def _gate(gate: GateRule) -> Rules:
    if gate.block_size < 1:
        raise ValueError(f"block_size must be at least 1; got {gate.block_size}")
    packed = GATE.pack(
        choice("granularity", gate.granularity), gate.block_size,
        choice("aggregate", gate.aggregate), choice("normalize", gate.normalize), gate.part,
        gate.tau,
    )  # fmt: skip
    return packed, gate.granularity == "span", gate.normalize == "given"


@functools.lru_cache(maxsize=256)
def _rules(gate: GateRule, position: PositionRule, reduce: ReduceRule) -> Rules:
    packed, by_span, by_given = _gate(gate)
    packed += POSITION.pack(
        choice("estimator", position.estimator), choice("advantage", position.advantage),
        choice("ratio", position.ratio), position.clamp, position.low, position.high,
        position.dual, position.advantage_low, position.advantage_high, position.floor,
    )  # fmt: skip
    packed += REDUCE.pack(
        choice("denominator", reduce.denominator), reduce.token_mean, reduce.factor
    )
    return packed, by_span or position.ratio == "span", by_given


def _finish(
    data: RowData,
    given: Tensor | None,
    row_weights: Tensor | None,
    target: Tensor | None,
    outputs: tuple[int, ...],
    rules: Rules,
) -> None:
    packed, by_span, by_given = rules
    n = data.valid.numel()
    given = given if by_given else None
    if by_given and given is None:
        raise ValueError("given must be a tensor where normalize is 'given'; got None")
    _kept, row_data = _row_data(data, by_span)
    _kept_too, floats_at = floats(n, given, row_weights, target)
    job = FINISH.pack(*row_data, *floats_at, *outputs)
    if function("finish", False)(job + packed, 0, n) == NO_MEMORY:
        raise no_memory()


def _row_data(data: RowData, by_span: bool) -> tuple[Any, tuple[Any, ...]]:
    """`struct row_data`, and the tensors that it points to."""
    valid, now, old, spans, cu_seqlens, length, measured, spacing = data
    n = valid.numel()
    mask, mask_at = booleans(valid, n)
    kept, (now_at, old_at) = floats(n, now, old)
    spans = listed(spans, n, INT64) if by_span and spans is not None else None
    borders = None if cu_seqlens is None else listed(cu_seqlens)
    if by_span and spans is None:
        raise ValueError("spans must be a tensor where a granularity is 'span'; got None")
    measured, measured_at = booleans(measured, n)
    statistics, at = None, NO_SPACING
    if spacing is not None and old is not None:
        statistics, places = floats(n, spacing.maximum, spacing.log_sum)
        at = *places, spacing.bits, spacing.scale
    return (mask, kept, spans, borders, measured, statistics), (
        n, max(length, 1), mask_at, now_at, old_at, 0 if spans is None else spans.data_ptr(),
        0 if borders is None else borders.data_ptr(),
        borders is not None and borders.dtype is INT64,
        0 if borders is None else borders.numel() - 1, measured_at, *at,
    )  # fmt: skip
