"""How the rows of a call weigh, as the row functions take it: by a gate, or as the caller says."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import rows
from .arguments import Layout
from .context_parallel import Context
from .context_parallel import row_blocks as blocks_over_ranks
from .gate import DriftGate


class Gating(NamedTuple):
    """What decides the weights of rows [N]; `gate` and `weights` exclude each other."""

    gate: DriftGate | None
    weights: Tensor | None  # [N] in the dtype of the row data: the caller's
    spans: Tensor | None  # [N] int64
    layout: Layout
    context: Context | None
    backend: str  # resolved
    part: bool = False  # of a batch larger than the call


class Gated(NamedTuple):
    """`rows.row_blocks` of every row, and how `rows.sampled_token` is to read it."""

    blocks: Tensor | None
    tau: float
    normalize: str
    drift: Tensor | None
    """[N]; None without old log-probs."""
    first: Tensor | None = None
    """First valid row of each row's block [N], -1 where not valid; or None,"""
    numbers: Tensor | None = None
    """and where sequences are cut over ranks the number of its block [N]."""


def gated(
    gating: Gating, log_probs: Tensor, old: Tensor | None, valid: Tensor, count: bool
) -> Gated:
    """Drift of rows and blocks; `count`: rows and first rows of the sequences are needed too."""
    gate, weights, spans, layout, context, backend, part = gating
    first = numbers = given = None
    if context is not None:
        blocks, numbers, given = blocks_over_ranks(context, log_probs, old, valid, spans, gate)
    elif gate is not None:
        blocks, first = rows.row_blocks(
            log_probs, old, valid, spans, layout.cu_seqlens, layout.length, gate.granularity,
            gate.block_size, gate.aggregate, count, backend,
        )  # fmt: skip
    elif count or weights is not None:
        blocks, _ = rows.row_blocks(
            log_probs, None, valid, None, layout.cu_seqlens, layout.length, "token", 1, "mean",
            count, backend,
        )  # fmt: skip
    else:
        blocks = None
    drift = None if old is None else torch.where(valid, old - log_probs, 0)
    given = weights if given is None else given
    if given is not None:
        assert blocks is not None
        shown = torch.cat([blocks[:1], torch.where(valid, given, 0)[None], blocks[2:]])
        return Gated(shown, 0.0, "given", drift, first, numbers)
    if gate is None:
        return Gated(blocks, 0.0, "off", drift)
    assert blocks is not None
    if part:
        blocks = rows.part_blocks(blocks, gate.normalize, gate.tau)
    return Gated(blocks, float(gate.tau), gate.normalize, blocks[0], first, numbers)


def unit_weights(gating: Gating, log_probs: Tensor, old: Tensor | None, valid: Tensor) -> Tensor:
    """w [N] of rows whose log-probs are known; unit mean over this call."""
    found = gated(gating, log_probs, old, valid, False)
    layout = gating.layout
    _, row_data, _ = rows.sampled_token(
        log_probs, old, None, valid, found.blocks, layout.cu_seqlens, layout.length, found.tau,
        found.normalize, "ppo", 0.2, 0.2, 3.0, None, 1.0, "given", False, gating.backend,
    )  # fmt: skip
    return row_data[0]
