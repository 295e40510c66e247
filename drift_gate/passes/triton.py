"""The passes as Triton kernels, see `kernels/`: for CUDA and ROCm tensors of up to 32 bits."""

import torch
from torch import Tensor

from ..kernels import measured as measured_kernels
from ..kernels import rows as row_kernels
from ..kernels import select as select_kernels
from ..kernels import topk as topk_kernels
from ..kernels.divergence import divergence
from ..kernels.divergence_grad import divergence_grad
from ..kernels.expand import expand, expand_labels
from ..kernels.gather import gather as head_gather
from ..kernels.scan import scan, scan_lists
from ..kernels.sparse import by_word, sum_words, weigh_words
from ..kernels.topk import masses
from . import torch as plain
from .rules import Finished, GateRule, PositionRule, ReduceRule, RowData, Weights, sampled
from .torch import gather
from .torch.select import largest

LONGEST_PAIRED = 512  # beyond it the kernel, which compares entries in pairs, is slower than a sort

__all__ = [
    "by_word",
    "divergence",
    "divergence_grad",
    "expand",
    "expand_labels",
    "finish",
    "gather",
    "head_gather",
    "masses",
    "measured_rows",
    "scan",
    "scan_lists",
    "select",
    "sum_words",
    "topk_rows",
    "topk_support",
    "valid_rows",
    "weigh",
    "weigh_words",
]


def valid_rows(
    labels: Tensor | None,
    response_mask: Tensor | None,
    ignore_index: int,
    vocab: int,
    cu_seqlens: Tensor | None,
    n_rows: int,
    device: torch.device,
    check: bool,
) -> Tensor:
    """valid [N] bool; two launches at most, unless values are checked."""
    if check:
        return plain.valid_rows(
            labels, response_mask, ignore_index, vocab, cu_seqlens, n_rows, device, check
        )
    if labels is None:
        if response_mask is None:
            return torch.ones(n_rows, dtype=torch.bool, device=device)
        return response_mask != 0
    valid = labels != ignore_index
    return valid if response_mask is None else valid.logical_and_(response_mask)


def select(
    logits: Tensor, k: int, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `torch.select`. Lists too long for the kernel are made from all rows, valid or not: the
    host does not know which are."""
    if k <= select_kernels.LONGEST:
        found: tuple[Tensor, Tensor, Tensor] = select_kernels.select(logits, k, valid, scale)
        return found
    ids, values = largest(logits, k, None)
    if valid is not None:
        ids.masked_fill_(~valid[:, None], -1)
        values.masked_fill_(~valid[:, None], -torch.inf)
    return ids, values, scan(logits, ids.new_zeros(len(ids), 1), valid, scale, False)[3]


def measured_rows(data: RowData, gate: GateRule) -> Tensor:
    """See `torch.measured_rows`."""
    run = plain if gate.granularity in ("token", "span") else measured_kernels
    found: Tensor = run.measured_rows(data, gate)
    return found


def weigh(data: RowData, gate: GateRule, given: Tensor | None = None) -> Weights:
    """See `rules.Weights`."""
    data = sampled(data, gate, measured_rows)
    return Weights(*row_kernels.weigh(data, gate, given))


def finish(
    data: RowData,
    gate: GateRule,
    given: Tensor | None,
    row_weights: Tensor | None,
    target: Tensor,
    position: PositionRule,
    reduce: ReduceRule,
) -> Finished:
    """See `rules.Finished`."""
    data = sampled(data, gate, measured_rows)
    return Finished(*row_kernels.finish(data, gate, given, row_weights, target, position, reduce))


def topk_support(
    ids: Tensor, teacher: Tensor, valid: Tensor, vocab: int, check: bool, check_duplicates: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which entries of the lists count; see `torch.topk_support`. The counts [2, ...] are yet to be
    summed, which `masses` does."""
    if check or check_duplicates or ids.shape[1] > LONGEST_PAIRED:
        return plain.topk_support(ids, teacher, valid, vocab, check, check_duplicates)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = topk_kernels.topk_support(ids, teacher, valid)
    return found


def topk_rows(
    scores: Tensor,
    log_probs: Tensor | None,
    teacher: Tensor,
    present: Tensor,
    valid: Tensor,
    direction: str,
    support: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The divergence over the lists; see `torch.topk_rows`."""
    run = topk_kernels.topk_rows
    if scores.shape[1] > topk_kernels.LONGEST:
        run = plain.topk_rows
    found: tuple[Tensor, Tensor] = run(
        scores, log_probs, teacher, present, valid, direction, support, beta
    )
    return found
