"""Shapes, sequence borders and memory layouts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .choices import Choices

ROWS = (1, 2, 3, 0, 33, 5, 8, 13, 31, 32, 70)  # about the tile of 32 rows; two tiles and a part
BATCHES = (1, 2, 3, 0, 5)
LENGTHS = (1, 2, 3, 0, 5, 9, 16, 33)
PACKED = (1, 2, 3, 5, 70)  # sequences: more than the tile of 64 borders
# Up to two words about every power of two: the borders of tiles and of 16-byte vectors. 50257 is
# GPT-2's odd vocabulary.
VOCABS = tuple(
    sorted({1, 2, 3, 5, 11, *(2**e + d for e in range(2, 14) for d in (-1, 0, 1)), 50257})
)
MOST_WORDS = 1 << 14  # in a problem of several rows, to keep cases cheap
INTERPRETED_WORDS = 600
OVERLAPS = ("no", "expanded", "windows")  # of logits
SENTINEL = math.nan  # in memory between rows


class Shape(NamedTuple):
    """How rows form sequences: the shape of labels, and cu_seqlens of a packed batch."""

    lead: tuple[int, ...]
    cu_seqlens: list[int] | None

    @property
    def rows(self) -> int:
        return math.prod(self.lead)


def draw_shape(choose: Choices, kinds: tuple[str, ...] = ("flat", "padded", "packed")) -> Shape:
    kind = choose("batch", kinds)
    few = 5 if choose.interpreted else None
    if kind == "flat":
        return Shape((choose("rows", ROWS[:few]),), None)
    if kind == "padded":
        return Shape((choose("sequences", BATCHES), choose("length", LENGTHS[:few])), None)
    count = choose("sequences", PACKED)
    if count > 5:
        lengths = [i * i % 3 % 2 for i in range(count)]  # of 0 and 1 rows
    else:
        lengths = [choose(f"length {i}", LENGTHS[:few]) for i in range(count)]
    borders = [sum(lengths[:i]) for i in range(count + 1)]
    lead = (1, borders[-1]) if choose.flag("leading one") else (borders[-1],)
    return Shape(lead, borders)


def draw_vocab(choose: Choices, rows: int) -> int:
    product = INTERPRETED_WORDS if choose.interpreted else MOST_WORDS
    most = max(product // max(rows, 1), 1)
    if rows == 1 and not choose.interpreted:
        most = VOCABS[-1]
    return choose("vocab", tuple(v for v in VOCABS if v <= most))


def place(choose: Choices, name: str, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`values` [..., V] in a chosen memory layout, and the storage [M] around them.

    What lies between the rows is NaN, which a wild read would show.
    """
    *lead, vocab = values.shape
    layouts = ["contiguous", "wide rows", "aligned wide rows", "off a boundary"]
    if len(lead) == 2:
        layouts += ["shifted", "batch second"]
    layout = choose(f"{name} layout", layouts)
    storage_shape, offset = [*lead, vocab], 0
    if layout == "wide rows":
        storage_shape[-1] += 1
    elif layout == "aligned wide rows":
        storage_shape[-1] = (vocab // 8 + 1) * 8
    elif layout == "shifted":
        storage_shape[1] += 1
    elif layout == "batch second":
        storage_shape[:2] = storage_shape[1::-1]
    else:
        offset = 3 * (layout == "off a boundary")
    storage = torch.full((math.prod(storage_shape) + offset,), SENTINEL, dtype=dtype)
    storage = storage.to(choose.device)
    view = storage[offset:].view(storage_shape)
    if layout == "batch second":
        view = view.transpose(0, 1)
    if layout == "shifted":
        view = view[:, :-1]
    view = view[..., :vocab]
    view.copy_(values)
    return view, storage


def overlapping(kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., V] that share memory, made of these values, and the storage."""
    *lead, vocab = values.shape
    rows = values.reshape(-1, vocab)
    if kind == "expanded":
        storage = rows[len(rows) // 2].clone() if len(rows) else values.new_zeros(vocab)
        return storage.expand(*lead, vocab), storage
    storage = rows.flatten()[: len(rows) + vocab - 1].clone()  # each row begins a word later
    strides = [math.prod(lead[i + 1 :]) for i in range(len(lead))]
    return storage.as_strided((*lead, vocab), (*strides, 1)), storage


def spread_rows(choose: Choices, x: Tensor, strided: bool) -> Tensor:
    """Row data on the device, with gaps between the elements where strided."""
    if not strided or not x.dim():
        return x.to(choose.device)
    return torch.stack((x, x), -1).to(choose.device)[..., 0]
