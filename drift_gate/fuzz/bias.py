"""No signed bias: whether results err towards or away from zero, over many problems.

One problem has too few elements to tell. Errors inside one are not independent, so each gives one
sample: its mean error away from zero, in units in the last place of the element.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .evaluate import Results

ALLOWED = 0.03  # units in the last place; truncation instead of rounding is half of one
NARROW = (torch.float32, torch.bfloat16, torch.float16)  # than the truth
ERRORS = 6.0  # standard errors beyond that


@dataclasses.dataclass
class Moments:
    """Samples of a result, and of eager PyTorch's in its place."""

    count: int = 0
    total: float = 0.0
    square: float = 0.0
    eager: float = 0.0

    def add(self, sample: float, eager: float) -> None:
        self.count += 1
        self.total += sample
        self.square += sample * sample
        self.eager += eager

    def bias(self) -> float:
        return self.total / self.count

    def excess(self) -> float:
        """By how much the bias is over what chance and twice eager PyTorch's own allow; <= 0."""
        deviation = math.sqrt(max(self.square / self.count - self.bias() ** 2, 0.0))
        chance = ERRORS * deviation / math.sqrt(self.count)
        return abs(self.bias()) - 2 * abs(self.eager / self.count) - chance - ALLOWED


class Bias:
    """Moments of every result of every function, by dtype."""

    def __init__(self) -> None:
        self._moments: dict[tuple[str, str, torch.dtype], Moments] = {}

    def add(self, function: str, got: Results, eager: Results, truth: Results) -> None:
        for name, t in truth.items():
            g = got.get(name)
            if g is None or g.dtype not in NARROW or name.startswith("metric"):
                continue
            sample = _mean_outward(g, t)
            if sample is not None:
                other = _mean_outward(eager[name], t) or 0.0
                moments = self._moments.setdefault((function, name, g.dtype), Moments())
                moments.add(sample, other)

    def faults(self) -> Iterator[str]:
        for (function, name, dtype), moments in self._moments.items():
            if moments.count >= 30 and moments.excess() > 0:
                yield (
                    f"{function}: {name} ({dtype}) is biased by {moments.bias():.3f} units in the "
                    f"last place over {moments.count} problems (negative: towards zero)"
                )


def _mean_outward(got: Tensor, truth: Tensor) -> float | None:
    """Mean error away from zero in units in the last place, each at most one unit."""
    info = torch.finfo(got.dtype)
    g, t = got.double(), truth.double()
    counted = g.isfinite() & (t.abs() > info.tiny / info.eps) & (t.abs() < info.max)
    if not bool(counted.any()):
        return None
    unit = info.eps * t.abs()
    errors = ((g - t) * t.sign() / unit).clamp(-1, 1)
    return float(torch.where(counted, errors, 0).sum() / counted.sum())
