"""One call of an implementation: its time, exact extra memory, and errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import TooLong, within
from .measure import peak_bytes
from .peers.guard import LeftOut
from .truth import Outputs, Truth, errors

Run = tuple[Callable[[], None], Callable[[], Outputs]]  # what is not timed, and what is


class Leaves:
    """What gradients are taken in, and copies of it once somebody overwrites it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = [x.detach().requires_grad_() for x in tensors]
        self.copies: list[Tensor] = []
        self.dirty = False

    def before(self, overwrites: bool) -> None:
        """Restore what the last run overwrote; `overwrites` says whether the next one does."""
        self.restore()
        if overwrites and not self.copies:
            self.copies = [leaf.detach().clone() for leaf in self.tensors]
        self.dirty = overwrites

    def restore(self) -> None:
        """Undo what the last run overwrote."""
        if self.dirty:
            with torch.no_grad():
                for leaf, copy in zip(self.tensors, self.copies, strict=True):
                    leaf.copy_(copy)
        self.dirty = False

    def own(self, x: Tensor) -> bool:
        """Whether a tensor lies in their memory."""
        return x.data_ptr() in {leaf.data_ptr() for leaf in self.tensors}


class Call(NamedTuple):
    """What one call took, and how well it did."""

    seconds: float
    extra_bytes: int  # exact peak beyond the inputs, gradients included
    gradient_bytes: int  # of the gradients that do not lie in a leaf's memory
    errors: dict[str, dict[str, float]]


def call(run: Run, leaves: Leaves, truth: Truth, device: torch.device, limit: float) -> Call:
    """Call once.

    Raises:
        LeftOut: it took longer than `limit` seconds.
    """
    before, work = run
    before()
    try:
        with peak_bytes(device) as memory, within(limit):
            start = time.perf_counter()
            outputs = work()  # kept: gradients count
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    except TooLong:
        raise LeftOut(f"one call takes more than {limit:.2g} s") from None
    grads = [x for name, x in outputs.items() if name.startswith("grad")]
    gradient_bytes = sum(x.nbytes for x in grads if not leaves.own(x))
    return Call(seconds, memory.peak, gradient_bytes, errors(outputs, truth))
