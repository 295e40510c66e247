"""Drift gate: weights of the positions from their log-probs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rows
from .agreement import Meeting
from .arguments import check_floating, check_like, flat, flat_mask, flat_span_ids, layout_of
from .backends import resolve
from .context_parallel import context_of
from .gate import DriftGate
from .gating import Gated, Gating, gated
from .outputs import GateOutput, Metrics
from .scope import Scope, Totals, call_totals, rescaled, scaled, scales


def gate_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    gate: DriftGate = DriftGate(),  # noqa: B008  (frozen)
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
    group: Any = None,
    context_parallel_group: Any = None,
    position_ids: Tensor | None = None,
) -> GateOutput:
    """Weights of blockwise policy-drift gating (arXiv 2606.24084), detached.

    Args:
        log_probs: [B, T] (each row a sequence) or [N] current log-probs of the sampled tokens.
        old_log_probs: the same shape; those of the policy that sampled them.
        gate: what a block is and how its drift becomes a weight.
        response_mask: the same shape, not 0 where valid; None for all. Other positions may hold
            anything, NaN included.
        cu_seqlens: [B + 1] int32 or int64 borders of the sequences of a packed [N] (or [1, N])
            batch; without them [N] is one sequence.
        span_ids: int64 or int32, the shape of log_probs, with `granularity="span"`. Equal ids
            in one sequence are one block, adjacent or not.
        group: process group over which the weights have unit mean; metrics are of this rank.
        context_parallel_group, position_ids: where sequences are cut over ranks, as in `opd_loss`.

    Returns:
        GateOutput(weights, drift, block_ids, metrics); float32, or float64 for float64 log-probs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit.
    """
    with Meeting(group, context_parallel_group, position_ids) as ranks:
        ranks.expect(log_probs)
        rows_ = _check(
            log_probs, old_log_probs, gate, response_mask, cu_seqlens, span_ids, position_ids,
            ranks.context, bool(ranks.group),
        )  # fmt: skip
        ranks.tell(log_probs.shape, gate=gate)
    output, found = _weigh(rows_)
    if not ranks.group:
        return output
    call = call_totals(found, flat(output.weights), rows_.valid)
    scale = scales(Scope(ranks.group), call, False).gate.to(output.weights.dtype)
    valid = rows_.valid.view(output.weights.shape)
    return output._replace(
        weights=rescaled(output.weights, scale, valid), metrics=scaled(output.metrics, scale)
    )


def gate_and_totals(
    log_probs: Tensor, old_log_probs: Tensor, gate: DriftGate, **options: Any
) -> tuple[Tensor, Tensor, Totals]:
    """Weights and validity of one call, and what else is needed to join it with others."""
    names = "response_mask", "cu_seqlens", "span_ids"
    unknown = set(options) - set(names)
    if unknown:
        raise TypeError(f"micro_batches must hold arguments of gate_weights; got {sorted(unknown)}")
    mask, borders, spans = (options.get(name) for name in names)
    rows_ = _check(log_probs, old_log_probs, gate, mask, borders, spans, None, "", True)
    output, found = _weigh(rows_)
    valid = rows_.valid.view(output.weights.shape)
    return output.weights, valid, call_totals(found, flat(output.weights), rows_.valid)


class _Rows(NamedTuple):
    """Checked and flattened arguments."""

    gating: Gating
    log_probs: Tensor
    old: Tensor
    valid: Tensor


def _check(
    log_probs: Tensor,
    old_log_probs: Tensor,
    gate: DriftGate,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    span_ids: Tensor | None,
    position_ids: Tensor | None,
    context_group: str,
    part: bool,
) -> _Rows:
    check_floating("log_probs", log_probs)
    check_floating("old_log_probs", old_log_probs)
    layout = layout_of("log_probs", log_probs, cu_seqlens)
    device = log_probs.device
    check_like("old_log_probs", old_log_probs, layout.shape, device, "log_probs")
    mask = flat_mask(response_mask, layout, device, "log_probs")
    by_span = check_gate(gate).granularity == "span"
    spans = flat_span_ids(span_ids, by_span, layout, device, "log_probs")
    context = context_of(position_ids, context_group, layout, device, "log_probs")
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    new, old = flat(log_probs, dtype), flat(old_log_probs, dtype)
    gating = Gating(gate, None, spans, layout, context, resolve("auto", new), part)
    no_labels = torch.zeros_like(new, dtype=torch.int32)
    on_cpu = device.type == "cpu"
    valid = rows.valid_rows(no_labels, mask, layout.cu_seqlens, -1, 1, on_cpu)
    return _Rows(gating, new, old, valid)


def _weigh(checked: _Rows) -> tuple[GateOutput, Gated]:
    """Weights of unit mean over the call."""
    gating, new, old, valid = checked
    layout, gate = gating.layout, gating.gate
    assert gate is not None
    found = gated(gating, new, old, valid, False)
    assert found.blocks is not None and found.drift is not None
    _, weights, metrics = rows.sampled_token(
        new, old, None, valid, found.blocks, layout.cu_seqlens, layout.length, found.tau,
        found.normalize, "ppo", 0.2, 0.2, 3.0, None, 1.0, "given", False, gating.backend,
    )  # fmt: skip
    numbers = found.numbers
    if numbers is None:
        assert found.first is not None
        numbers = rows.number_blocks(found.first)
    shape, w = layout.shape, weights[0]
    output = GateOutput(
        w.view(shape), found.drift.view(shape), numbers.view(shape), named(metrics, 6)
    )
    return output, found


def check_gate(gate: DriftGate) -> DriftGate:
    if not isinstance(gate, DriftGate):
        raise TypeError(f"gate must be a DriftGate; got {type(gate).__name__}")
    return gate


def named(metrics: Tensor, count: int = len(rows.METRICS)) -> Metrics:
    """Name the first `count` entries of the stacked metrics; views, no copies."""
    return dict(zip(rows.METRICS[:count], metrics.detach().unbind(), strict=False))
