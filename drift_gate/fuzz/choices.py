"""A problem is a set of named choices: drawn by hypothesis, or read back from a file.

The first option of a choice is the simplest: what shrinking aims at, and what a file leaves out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Pick = Callable[[str, Sequence[Any]], Any]
MOST_LISTED = 64  # options of a choice that coverage counts one by one


class Choices:
    """Makes choices by name, and keeps what was offered and what was taken."""

    def __init__(self, pick: Pick, device: torch.device) -> None:
        self._pick = pick
        self.device = device
        self.wide = False  # whether the backend takes float64
        self.interpreted = False  # a hundred times slower: small problems
        self.longest = 0  # list of words
        self.taken: dict[str, Any] = {}
        """Only those that are not the first option: this is what a file holds."""
        self.offered: dict[str, tuple[Sequence[Any], Any]] = {}
        self.generator = torch.Generator()

    def __call__(self, name: str, options: Sequence[T]) -> T:
        """One of the options, the simplest first; they are values that JSON can hold."""
        assert name not in self.offered, f"{name} is chosen twice"
        value: T = self._pick(name, options)
        if value != options[0]:
            self.taken[name] = value
        if len(options) <= MOST_LISTED:
            self.offered[name] = options, value
        return value

    def flag(self, name: str) -> bool:
        return self(name, (False, True))


def recorded(choices: Mapping[str, Any]) -> Pick:
    """Choices as they were made; those left out are the simplest."""

    def pick(name: str, options: Sequence[Any]) -> Any:
        return choices.get(name, options[0])

    return pick
