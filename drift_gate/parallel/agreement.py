"""Ranks that call a loss together: they meet once their arguments are checked.

Each says what all must share. Where two differ, or one has failed, every rank raises an error that
names both, instead of waiting for a collective that never comes. The meeting reads values, so on a
GPU it takes place with `validate=True` only; otherwise the groups' own timeout ends the wait.
"""

from __future__ import annotations

import hashlib
import numbers
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from ..options import Parallel, as_parallel
from .ranks import everyones, gather_ranks, name_of, rank_in

Facts = dict[str, str]
FAILED = -1  # instead of a digest


class Meeting:
    """The groups of a call: `with Meeting(...) as ranks:` encloses the checks of its arguments."""

    def __init__(self, group: str = "", context: str = "", vocab: str = "") -> None:
        """Names of the groups, see `ranks.name_of`; "" for none."""
        self.group, self.context, self.vocab = group, context, vocab
        self.facts: Facts = {}
        self.shape = ""
        self.device: torch.device | None = None
        self.any = bool(group or context or vocab)
        self.reads = False
        """Whether the ranks meet, and values that only one of them finds wrong can be told."""

    @property
    def names(self) -> dict[str, str]:
        """The groups, by argument, in the order in which they meet."""
        return {
            "parallel.vocab_parallel_group": self.vocab,
            "parallel.context_parallel_group": self.context,
            "parallel.group": self.group,
        }

    def expect(self, x: object, validate: bool = False) -> None:
        """Decide by a tensor's device whether the ranks meet, before anything can fail."""
        if not self.any:
            return
        device = x.device if isinstance(x, Tensor) else torch.device("cpu")
        if validate or device.type == "cpu":
            self.device, self.reads = device, not torch.compiler.is_compiling()

    def tell(self, shape: Sequence[int] | None = None, /, **facts: object) -> None:
        """What the ranks must share; the shape only those that work on the same rows."""
        if self.reads:
            self.shape = self.shape if shape is None else str(list(shape))
            self.facts.update({name: _written(value) for name, value in facts.items()})

    def __enter__(self) -> Meeting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.reads:
            return
        trouble: Exception | None = None
        heard: set[str] = set()
        for argument, group in self.names.items():
            if group and group not in heard:
                cause = trouble or error  # every group must hear of it, not the first alone
                failure = None if cause is None else f"{type(cause).__name__}: {cause}"
                found = self._meet(argument, group, failure)
                trouble = trouble or found
                heard |= {group} if found else set()  # its ranks need not meet in another role
        if trouble is not None and error is None:
            raise trouble

    def _meet(self, argument: str, group: str, failure: str | None) -> Exception | None:
        """What is wrong in a group, found by all of its ranks alike; or None."""
        facts = dict(self.facts)
        if argument != "parallel.group":
            facts["the shape of labels"] = self.shape
        digest = FAILED if failure else _digest(facts)
        seen = gather_ranks(torch.tensor([digest], device=self.device), group).flatten().tolist()
        if len(set(seen)) == 1 and seen[0] != FAILED:
            return None
        all_facts = everyones((facts, failure), group)
        for rank, (_, failed) in enumerate(all_facts):
            if failed is not None:
                stops = f"rank {rank_in(group)} stops, because rank {rank} of {argument} failed"
                return RuntimeError(f"{stops}: {failed}")
        return ValueError(f"{argument}: " + _difference([facts for facts, _ in all_facts]))


def _written(value: object) -> str:
    """A fact in words: a number is the same as a tensor of it, whatever its type."""
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        value = float(value)
    return str(value)


def _digest(facts: Facts) -> int:
    whole = hashlib.sha256(repr(sorted(facts.items())).encode()).digest()
    return int.from_bytes(whole[:7], "big")


def _difference(facts: list[Facts]) -> str:
    """The first fact about which a rank differs from rank 0."""
    for rank, theirs in enumerate(facts):
        for name in sorted({*facts[0], *theirs}):
            ours, other = facts[0].get(name, "none"), theirs.get(name, "none")
            if ours != other:
                return f"ranks 0 and {rank} disagree about {name}: {ours} and {other}"
    raise AssertionError("ranks with other digests share all facts")


def meeting(
    parallel: Parallel | None, position_ids: Tensor | None = None, vocab: str = ""
) -> Meeting:
    """The groups of `Parallel`; `vocab` names that over which the words are sharded.

    Sequences are cut over the context_parallel_group, or where position_ids are given without one,
    over the group.
    """
    if parallel is None and not vocab:
        return Meeting()
    groups = as_parallel(parallel)
    whole = name_of("parallel.group", groups.group)
    cut = name_of("parallel.context_parallel_group", groups.context_parallel_group)
    if groups.context_parallel_group is not None and position_ids is None:
        raise ValueError(
            "position_ids must be given where parallel.context_parallel_group is; got None"
        )
    if groups.context_parallel_group is None and position_ids is not None:
        cut = whole
    return Meeting(whole or cut, cut, vocab)
