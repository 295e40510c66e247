"""`gate_weights`: weights of the positions from their log-probs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments
from ..call.op import Op, Tensors
from ..call.rows import Call, RowInputs, Student, take_rows
from ..call.weighing import empty_finished, number_blocks, valid_rows, weigh
from ..gate import DriftGate
from ..options import Parallel, check_groups, refuse
from ..outputs import GateOutput
from ..parallel.agreement import Meeting, meeting
from ..parallel.scope import Totals, totals
from ..passes.backends import passes_of, resolve
from ..passes.rules import GATE_METRICS


def gate_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    gate: DriftGate = DriftGate(),  # noqa: B008  (frozen)
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    parallel: Parallel | None = None,
    **removed: Any,
) -> GateOutput:
    """Weights of blockwise policy-drift gating (arXiv 2606.24084), detached.

    Args:
        log_probs: [B, T] (each row a sequence) or [N] current log-probs of the sampled tokens.
        old_log_probs: the same shape; those of the policy that sampled them.
        gate: what a block is and how its drift becomes a weight.
        response_mask: the same shape, 1 where valid and 0 elsewhere; None for all. Other positions
            may hold anything, NaN included.
        cu_seqlens: [B + 1] int32 or int64 borders of the sequences of a packed [N] (or [1, N])
            batch; without them [N] is one sequence.
        span_ids: int64 or int32, the shape of log_probs, with `granularity="span"`. Equal ids in
            one sequence are one block, adjacent or not.
        position_ids: the shape of log_probs, int: positions in their sequences, of which this rank
            has some and the other ranks of `parallel.context_parallel_group` (None for `group`) the
            rest. Any layout will do; row b of the batch (or of cu_seqlens) is the same sequence on
            all of them. Blocks are reduced over all of a sequence.
        parallel: its `group` is the process group over which the weights have unit mean (metrics
            are of this rank), its `context_parallel_group` the one over which sequences are cut.

    Returns:
        GateOutput(weights, drift, block_ids, metrics); float32, or float64 for float64 log-probs.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit.
    """
    if removed:
        refuse("gate_weights", removed)
    check_groups("gate_weights", parallel, "group", "context_parallel_group")
    with meeting(parallel, position_ids) as ranks:
        ranks.expect(log_probs)
        call, now = _check(
            log_probs, old_log_probs, gate, response_mask, cu_seqlens, span_ids, position_ids, ranks
        )
    weight, drift, ids, metrics, _, _ = WEIGHTS(Inputs(now, call.rows))
    return _output(weight, drift, ids, metrics, call.shape)


def weights_and_totals(
    log_probs: Tensor, old_log_probs: Tensor, gate: DriftGate, **options: Any
) -> tuple[Tensor, Tensor, Totals]:
    """Weights and validity of one call, and what else is needed to join it with others."""
    names = "response_mask", "cu_seqlens", "span_ids"
    unknown = set(options) - set(names)
    if unknown:
        raise TypeError(f"micro_batches must hold arguments of gate_weights; got {sorted(unknown)}")
    mask, borders, spans = (options.get(name) for name in names)
    call, now = _check(
        log_probs, old_log_probs, gate, mask, borders, spans, None, Meeting(), part=True
    )
    weight, _, _, _, stacked, valid = WEIGHTS(Inputs(now, call.rows))
    return weight.view(call.shape), valid.view(call.shape), totals(stacked)


def _check(
    log_probs: Tensor,
    old_log_probs: Tensor,
    gate: DriftGate,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    span_ids: Tensor | None,
    position_ids: Tensor | None,
    ranks: Meeting,
    part: bool = False,
) -> tuple[Call, Tensor]:
    """The checked arguments, and log_probs [N]."""
    arguments.floating("log_probs", log_probs)
    if not isinstance(gate, DriftGate):
        arguments.wrong_type("gate", gate, "a DriftGate")
    if log_probs.dim() not in (1, 2):
        raise ValueError(f"log_probs must be [B, T] or [N]; got shape {list(log_probs.shape)}")
    arguments.floating("old_log_probs", old_log_probs)
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    student = Student("log_probs", "log_probs", log_probs.shape, 1, dtype, log_probs.device)
    now = arguments.flat(log_probs, dtype)
    call = take_rows(
        student, None, old_log_probs, gate=gate, response_mask=response_mask,
        cu_seqlens=cu_seqlens, span_ids=span_ids, position_ids=position_ids, row_weights=None,
        temperature=1.0, ignore_index=None, reduction="token-sum", validate=False,
        backend=resolve("auto", now), ranks=ranks, labelled=False,
    )  # fmt: skip
    if part:
        rule = call.rows.gate._replace(part=True)
        call = call._replace(rows=call.rows._replace(gate=rule))
    return call, now


def _output(
    weight: Tensor, drift: Tensor, ids: Tensor, metrics: Tensor, shape: Sequence[int]
) -> GateOutput:
    measured = metrics.unbind()[: len(GATE_METRICS)]
    named = dict(zip(GATE_METRICS, measured, strict=True))
    return GateOutput(weight.view(shape), drift.view(shape), ids.view(shape), named)


class Inputs(NamedTuple):
    """Of the op."""

    now: Tensor  # [N]
    rows: RowInputs


def _forward(x: Inputs) -> Tensors:
    run = passes_of(x.rows.backend)
    valid = valid_rows(run, x.rows, None, x.now)
    found = weigh(run, x.rows, valid, x.now)
    ids = found.first.long() if x.rows.context else number_blocks(found.first)
    return found.weight, found.drift, ids, found.metrics, found.totals, valid


def _backward(x: Inputs, *rest: Any) -> list[Tensor | None]:
    return [None]


def _empty(x: Inputs) -> Tensors:
    _, _, metrics, totals = empty_finished(x.rows, x.now)
    ids = torch.empty_like(x.now, dtype=torch.int64)
    valid = torch.empty_like(x.now, dtype=torch.bool)
    return torch.empty_like(x.now), torch.empty_like(x.now), ids, metrics, totals, valid


WEIGHTS = Op(
    "weights",
    Inputs,
    _forward,
    _backward,
    _empty,
    outputs=("weight", "drift", "block_ids", "metrics", "totals", "valid"),
    grads=0,
    differentiable=(),
    keep=(),
)
