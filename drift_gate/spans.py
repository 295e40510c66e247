"""`newline_spans`: blocks that follow the lines of a response."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.library import custom_op

from .call import arguments
from .call.rows import borders_of, mask_of
from .passes.torch.rows import check_borders

Ints = npt.NDArray[np.int64]


def newline_spans(
    labels: Tensor,
    newline_ids: int | Sequence[int] | Tensor,
    *,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    min_length: int = 16,
    max_length: int = 128,
) -> Tensor:
    """Span ids for `DriftGate(granularity="span")`: one span a line (arXiv 2606.24084).

    A span ends with a newline token. Consecutive spans are joined until they hold `min_length`
    positions, what is left at the end joins the span before it, and a span of more than
    `max_length` is cut into pieces of `max_length`, of which the last two are evened out where the
    rest would be shorter than `min_length`. So text without newlines falls into blocks of
    `max_length`. The paper states no exact rule; this one is the package's choice. Spans begin at
    a sequence's first valid position and end at its last; masked positions between count.

    The work is done on the host, once per batch of rollouts: on a GPU it synchronises.

    Args:
        labels: [B, T] or [N], int64 or int32: the sampled tokens.
        newline_ids: ids of the tokens that end a line: one, several, or an integer tensor.
        response_mask: the shape of labels, not 0 where valid; None for labels of 0 or more.
        cu_seqlens: [B + 1] borders of the sequences of a packed [N] batch.
        min_length: positions that a span has at least, where the text allows; at least 1.
        max_length: positions that a span has at most; at least min_length.

    Returns:
        int64, the shape of labels: 0, 1, ... in each sequence, -1 outside its response.

    Raises:
        ValueError, TypeError: an argument's shape, dtype or value does not fit.
    """
    arguments.integer("labels", labels)
    shape, device = labels.shape, labels.device
    if labels.dim() not in (1, 2):
        raise ValueError(f"labels must be [B, T] or [N]; got shape {list(shape)}")
    borders = None if cu_seqlens is None else borders_of(cu_seqlens, shape, device, "labels")
    mask = None if response_mask is None else mask_of(response_mask, shape, device, "labels")
    min_length = arguments.whole("min_length", min_length, -(2**63))
    max_length = arguments.whole("max_length", max_length, -(2**63))
    if not 1 <= min_length <= max_length:
        raise ValueError(
            "min_length must be at least 1 and at most max_length; "
            f"got min_length = {min_length}, max_length = {max_length}"
        )
    ids = _id_list(newline_ids)
    rows = _newline_spans(
        arguments.flat(labels), ids, mask, borders, shape[-1], min_length, max_length
    )
    return rows.view(labels.shape)


def _id_list(newline_ids: int | Sequence[int] | Tensor) -> list[int]:
    if isinstance(newline_ids, Tensor):
        arguments.integer("newline_ids", newline_ids)
        return [int(i) for i in newline_ids.reshape(-1).tolist()]
    ids = [newline_ids] if isinstance(newline_ids, int) else list(newline_ids)
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int):
            raise TypeError(f"newline_ids must be ints; got {i!r}")
    return ids


@custom_op("drift_gate::newline_spans", mutates_args=())
def _newline_spans(
    labels: Tensor,
    newline_ids: list[int],
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    min_length: int,
    max_length: int,
) -> Tensor:
    n = labels.shape[0]
    tokens = labels.cpu().numpy().astype(np.int64)
    valid = tokens >= 0 if response_mask is None else response_mask.bool().cpu().numpy()
    newline = np.isin(tokens, np.array(newline_ids, dtype=np.int64))
    if cu_seqlens is None:
        borders = [*range(0, n, max(length, 1)), n]
    else:
        check_borders(cu_seqlens, n)
        borders = cu_seqlens.tolist()
    out = np.full(n, -1, dtype=np.int64)
    for start, stop in pairwise(borders):
        positions = np.flatnonzero(valid[start:stop])
        if len(positions):
            response = slice(start + positions[0], start + positions[-1] + 1)
            lengths = _span_lengths(newline[response], min_length, max_length)
            out[response] = np.repeat(np.arange(len(lengths)), lengths)
    return torch.from_numpy(out).to(labels.device)


@_newline_spans.register_fake
def _(
    labels: Tensor,
    newline_ids: list[int],
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    min_length: int,
    max_length: int,
) -> Tensor:
    return torch.empty(labels.shape, dtype=torch.int64, device=labels.device)


def _span_lengths(newline: npt.NDArray[np.bool_], min_length: int, max_length: int) -> Ints:
    """Lengths of the spans of one response, from where its lines end."""
    ends = [*(np.flatnonzero(newline) + 1).tolist(), len(newline)]
    joined: list[int] = []
    begin = 0
    for end in ends:
        if end - begin >= min_length:
            joined.append(end - begin)
            begin = end
    rest = len(newline) - begin
    if rest and joined:
        joined[-1] += rest
    elif rest:
        joined = [rest]
    return np.array(
        [piece for span in joined for piece in _cut(span, min_length, max_length)], dtype=np.int64
    )


def _cut(span: int, min_length: int, max_length: int) -> list[int]:
    """Pieces of at most max_length; the last two evened out if the last is too short."""
    pieces = [max_length] * (span // max_length)
    rest = span % max_length
    if rest == 0:
        return pieces
    if pieces and rest < min_length:
        both = pieces.pop() + rest
        return [*pieces, both - both // 2, both // 2]
    return [*pieces, rest]
