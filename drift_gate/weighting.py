"""Drift gate: weights of the positions from their log-probs."""

import torch
from torch import Tensor

from . import rows
from .arguments import check_floating, check_like, flat, flat_mask, flat_span_ids, layout_of
from .backends import resolve
from .gate import DriftGate
from .outputs import GateOutput, Metrics


def gate_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    gate: DriftGate = DriftGate(),  # noqa: B008  (frozen)
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
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

    Returns:
        GateOutput(weights, drift, block_ids, metrics); float32, or float64 for float64 log-probs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit.
    """
    check_floating("log_probs", log_probs)
    check_floating("old_log_probs", old_log_probs)
    layout = layout_of("log_probs", log_probs, cu_seqlens)
    device = log_probs.device
    check_like("old_log_probs", old_log_probs, layout.shape, device, "log_probs")
    mask = flat_mask(response_mask, layout, device, "log_probs")
    by_span = check_gate(gate).granularity == "span"
    spans = flat_span_ids(span_ids, by_span, layout, device, "log_probs")
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    new, old = flat(log_probs, dtype), flat(old_log_probs, dtype)
    backend = resolve("auto", new)
    no_labels = torch.zeros_like(new, dtype=torch.int32)
    on_cpu = device.type == "cpu"
    valid = rows.valid_rows(no_labels, mask, layout.cu_seqlens, -1, 1, on_cpu)
    blocks, first = rows.row_blocks(
        new, old, valid, spans, layout.cu_seqlens, layout.length,
        gate.granularity, gate.block_size, gate.aggregate, False, backend,
    )  # fmt: skip
    _, weights, metrics = rows.sampled_token(
        new, old, None, valid, blocks, layout.cu_seqlens, layout.length, float(gate.tau),
        gate.normalize, "ppo", 0.2, 0.2, 3.0, None, 1.0, "given", False, backend,
    )  # fmt: skip
    shape = layout.shape
    block_ids = _number_blocks(first)
    return GateOutput(
        weights[0].view(shape), blocks[0].view(shape), block_ids.view(shape), named(metrics, 6)
    )


def check_gate(gate: DriftGate) -> DriftGate:
    if not isinstance(gate, DriftGate):
        raise TypeError(f"gate must be a DriftGate; got {type(gate).__name__}")
    return gate


def _number_blocks(first: Tensor) -> Tensor:
    """Number blocks in the order in which they begin, from the first valid row of each row's."""
    begins = first == torch.arange(first.shape[0], device=first.device)
    number = begins.cumsum(0) - 1
    return torch.where(first >= 0, number[first.clamp(min=0).long()], -1)


def named(metrics: Tensor, count: int = len(rows.METRICS)) -> Metrics:
    """Name the first `count` entries of the stacked metrics; views, no copies."""
    return dict(zip(rows.METRICS[:count], metrics.detach().unbind(), strict=False))
