"""Make memory that nobody wrote visible."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

deterministic: Any = torch.utils.deterministic  # sets attributes of its module


@contextmanager
def nan_filled_memory() -> Iterator[None]:
    """Fill what `torch.empty` and its kin return with NaN (integers: the largest value).

    A result that was read before it was written, or never written, then shows as NaN.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
