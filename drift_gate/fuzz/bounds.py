"""What a kernel launch may touch: the elements of its tensor arguments, and nothing between."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class KernelFault(AssertionError):
    """A kernel did what a GPU would have let pass: a wild access, a race, an undefined result."""


@dataclass(frozen=True)
class _View:
    name: str
    address: int  # of element 0, in bytes
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    def span(self) -> int:
        """Bytes from the first element to the end of the last one, padding included."""
        last = sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else (last + 1) * self.itemsize

    def contains(self, addresses: np.ndarray) -> np.ndarray:
        """Which addresses are elements. Takes the widest stride first, as a mixed-radix number."""
        offset = addresses - self.address
        inside = (offset >= 0) & (offset < self.span())
        rest = offset // self.itemsize
        for stride, size in sorted(zip(self.strides, self.shape, strict=True), reverse=True):
            if stride > 0:
                rest = rest - np.minimum(rest // stride, size - 1) * stride
        return inside & (rest == 0)


class Extents:
    """The exact memory of one launch's tensor arguments.

    Addresses are tested against the union of all arguments: an access meant for one tensor that
    lands on an element of another is not seen.
    """

    def __init__(self, arguments: Iterable[tuple[str, Any]]) -> None:
        self._views = [
            _View(name, t.data_ptr(), t.element_size(), tuple(t.shape), t.stride())
            for name, t in _tensors(arguments)
        ]

    def outside(self, addresses: np.ndarray) -> np.ndarray:
        """A mask of the addresses that belong to no argument."""
        left = np.ones(addresses.shape, dtype=bool)
        for view in self._views:
            left &= ~view.contains(addresses)
        return left

    def describe(self, address: int) -> str:
        """The address in words, relative to the nearest argument."""
        if not self._views:
            return "memory of no argument"

        def distance(view: _View) -> int:
            return max(view.address - address, address - view.address - view.span() + 1, 0)

        view = min(self._views, key=distance)
        offset = (address - view.address) // view.itemsize
        if view.contains(np.array([address]))[0]:
            where = "an element"
        else:
            where = "outside" if distance(view) else "between the elements"
        layout = f"shape {view.shape}, strides {view.strides}"
        return f"offset {offset}, {where} of `{view.name}` ({layout})"


def _tensors(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments:
        if isinstance(value, tuple):
            yield from _tensors((name, item) for item in value)
        elif hasattr(value, "block_shape"):  # a host-side tensor descriptor
            yield name, value.base
        elif isinstance(value, torch.Tensor):
            yield name, value
