"""Sizes to measure, in the order in which they matter: what a time budget cuts off comes last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

GRIDS = ("targets", "quick", "star", "full", "growth", "dry")

ROWS = (8192, 1024, 256, 2048, 512, 4096, 16384, 32768, 65536)
VOCABS = (151_936, 32_000, 50_257, 128_256, 262_144)
LISTS = (64, 8, 32, 128, 256)  # K
WIDTHS = (4096, 1024, 2048, 8192)  # H
DTYPES = ("bfloat16", "float32", "float16")
GROWTH = 64  # the factor between the shortest and the longest batch of the grid "growth"


class Case(NamedTuple):
    """One size of one suite."""

    what: str  # which work of the suite
    rows: int
    vocab: int
    dtype: str
    k: int = 0  # listed words of a row; 0 where the suite has none
    hidden: int = 0  # width of the hidden states; 0 where the suite starts from logits
    kind: str = "peaked"  # or "live", "zipf", "normal": see inputs.py

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    def __str__(self) -> str:
        sizes = f"{self.rows} x {self.vocab}" if self.vocab else f"{self.rows} rows"
        sizes += f", K {self.k}" if self.k else ""
        sizes += f", H {self.hidden}" if self.hidden else ""
        return f"{self.what}, {sizes}, {self.dtype}, {self.kind}"


def cases(anchor: Case, works: Sequence[str], grid: str, on_gpu: bool) -> list[Case]:
    """The grid around `anchor`; that size comes first.

    quick: the anchor alone, for each work. star: one of rows, vocabulary, list, width, dtype and
    kind of input varied at a time, for the first work. full: all products. growth: rows over a
    factor of 64, a vocabulary so small that the longest fits. dry: tiny. The grid "targets" is that
    of targets.py.
    """
    if grid == "dry":
        small = anchor._replace(
            rows=70, vocab=min(anchor.vocab, 259), dtype="float32",
            k=min(anchor.k, 8), hidden=min(anchor.hidden, 16),
        )  # fmt: skip
        return [small._replace(what=what) for what in works]
    anchors = [anchor._replace(what=what) for what in works]
    if grid == "quick":
        return anchors
    if grid == "growth":
        short = 1024 if on_gpu else 256
        small = anchor._replace(
            vocab=min(anchor.vocab, 32_000), k=min(anchor.k, 64),
            hidden=min(anchor.hidden, 1024 if on_gpu else 256),
        )  # fmt: skip
        powers = range(1, GROWTH.bit_length() - 1)  # between the ends, which come first
        rows = [short, GROWTH * short, *(short << power for power in powers)]
        return [small._replace(rows=n) for n in rows]
    kinds = ("normal", "zipf") if anchor.k and anchor.hidden else ("normal",)
    axes: dict[str, Sequence[int | str]] = {"rows": ROWS, "kind": kinds, "dtype": DTYPES}
    if anchor.vocab:
        axes["vocab"] = VOCABS
    if anchor.k:
        axes["k"] = LISTS
    if anchor.hidden:
        axes["hidden"] = WIDTHS
    found = list(anchors)
    if grid == "star":
        found += [anchor._replace(**{name: v}) for name, values in axes.items() for v in values]
    else:
        axes["kind"] = ("peaked", *kinds)
        for name, values in axes.items():
            anchors = [case._replace(**{name: value}) for case in anchors for value in values]
        found += anchors
    return list(dict.fromkeys(found))


Anchor = Callable[[bool], Case]  # whether on a GPU -> the size that the README quotes
