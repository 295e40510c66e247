"""How rows lie in sequences and blocks, and sums over those.

The sums are segment reductions over rows sorted by segment: fixed order, no atomics.
"""

import torch
from torch import Tensor

from ..rules import RowData


def wide(x: Tensor) -> Tensor:
    """Row data in float64, or in float32 on devices that have nothing wider."""
    return x if x.device.type in ("mps", "xpu") else x.double()


class Segments:
    """Rows grouped by an int64 key in [0, N); reductions give every row its segment's value."""

    def __init__(self, key: Tensor) -> None:
        self.key = key
        ordered, self.order = key.sort(stable=True)
        self.offsets = torch.searchsorted(ordered, torch.arange(len(key) + 1, device=key.device))

    def ranks(self, rows: Tensor) -> Tensor:
        """How many of those rows [N] bool come before each row in its segment, [N] int64."""
        on = rows[self.order].long()
        before = torch.nn.functional.pad(on.cumsum(0), (1, 0))
        ranks = torch.empty_like(self.order)
        ranks[self.order] = before[:-1] - before[self.offsets[self.key[self.order]]]
        return ranks

    def reduce(self, x: Tensor, kind: str) -> Tensor:
        """Per-row result [N] of "sum", "max" or "min" over the row's segment."""
        if x.shape[0] == 0:
            return x
        per_segment = torch.segment_reduce(
            x[self.order].contiguous(), kind, offsets=self.offsets, axis=0, unsafe=True
        )
        return per_segment[self.key]


def sequence_numbers(n_rows: int, length: int, cu_seqlens: Tensor | None, x: Tensor) -> Tensor:
    """A number in [0, N) for each row's sequence, [N] int64 on the device of x: its first row."""
    rows = torch.arange(n_rows, device=x.device)
    if cu_seqlens is None:
        length = max(length, 1)
        return rows // length * length
    borders = cu_seqlens.long()
    return borders[torch.searchsorted(borders, rows, right=True) - 1]


def _dense(sequence: Tensor, ids: Tensor) -> Tensor:
    """Number the distinct pairs (sequence, id), in [0, N)."""
    order = ids.sort(stable=True).indices
    order = order[sequence[order].sort(stable=True).indices]
    s, i = sequence[order], ids[order]
    new = torch.ones_like(s, dtype=torch.bool)
    new[1:] = (s[1:] != s[:-1]) | (i[1:] != i[:-1])
    key = torch.empty_like(order)
    key[order] = new.cumsum(0) - 1
    return key


class Layout:
    """How valid rows lie in their sequences and blocks."""

    def __init__(self, data: RowData, block_size: int) -> None:
        n = len(data.valid)
        self.valid, self.spans, self.block_size = data.valid, data.spans, block_size
        self.rows = torch.arange(n, device=data.valid.device)
        dtype = wide(data.now).dtype
        self.candidate = torch.where(data.valid, self.rows, n).to(dtype)
        self.sequence = sequence_numbers(n, data.length, data.cu_seqlens, data.valid)
        self.sequences = Segments(self.sequence)
        self.count = self.sequences.reduce(data.valid.to(dtype), "sum")

    def first(self, units: Segments) -> Tensor:
        """The first valid row of each row's unit [N]; N without one."""
        return units.reduce(self.candidate, "min").long()

    def units(self, granularity: str) -> Segments:
        """The rows by token, block, span or sequence."""
        if granularity == "token":
            return Segments(self.rows)
        if granularity == "sequence":
            return self.sequences
        if granularity == "span":
            if self.spans is None:
                raise ValueError('granularity "span" needs spans; got None')
            return Segments(_dense(self.sequence, self.spans.long()))
        place = (self.rows - self.first(self.sequences)) // self.block_size
        return Segments(_dense(self.sequence, place))

    def mean(self, x: Tensor, units: Segments, rows: Tensor) -> Tensor:
        """Of x [N], 0 elsewhere, over those rows [N] bool of each row's unit."""
        return units.reduce(x, "sum") / units.reduce(rows.to(x.dtype), "sum").clamp(min=1)
