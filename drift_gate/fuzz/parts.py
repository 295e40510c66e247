"""A function over a batch in parts: micro-batches of a step, and ranks.

Ranks share rows, positions of the same sequences, or words; or rows and one of the others. The
parts run the function with what belongs to them, and their results are put together; the reference
takes the undivided batch. Ranks are threads (see `local_ranks`). The gradient of hidden states over
sharded words meets the other ranks in the backward, which runs in one thread here: it is left to
`tests/test_vocab_parallel.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses.accumulation import GateNormalizer
from ..options import Parallel, as_reduction
from ..outputs import GateOutput, LossOutput
from .choices import Choices
from .cuts import (
    LAYOUTS,
    across_positions,
    across_sequences,
    in_order,
    position_ids,
    some_positions,
    some_sequences,
)
from .local_ranks import Groups, run_ranks
from .options import Arguments, Asked, Student, divides_by_0

POSITION_IDS = ("from 0", "from 2^40", "any where not valid")
Rest = Callable[[Choices, Any], Asked]


class Parts(NamedTuple):
    micro_batches: int | None  # through a GateNormalizer
    rows: int
    """Into how many parts the rows fall; each belongs to `across` ranks, one after another,"""
    across: int
    over: str
    """which share it: "words", or the layout of its positions."""
    named: str = "group"
    """The field of `Parallel` that names the ranks over which positions are cut."""
    position_ids: str = POSITION_IDS[0]

    @property
    def ranks(self) -> int:
        return self.rows * self.across

    def groups(self) -> Groups:
        """Ranks that meet, by the field of `Parallel` that names them."""
        alike = [[i * self.across + j for j in range(self.across)] for i in range(self.rows)]
        if self.over == "words":
            groups = {"vocab_parallel_group": alike}
            columns = [list(column) for column in zip(*alike, strict=True)]
            return groups | ({"group": columns} if self.rows > 1 else {})
        groups = {self.named: alike}
        return groups | ({"group": [list(range(self.ranks))]} if self.rows > 1 else {})


def divided(rest: Rest, over: tuple[str, ...], *, steps: bool = False) -> Rest:
    """The rest of a function's arguments, and into which parts its call falls.

    over: what ranks may share. steps: whether it takes a GateNormalizer.
    """

    def drawn(choose: Choices, student: Student) -> Asked:
        asked = rest(choose, student)
        parts = _draw(choose, student, asked.arguments, over, steps)
        arguments = asked.arguments | {"parts": parts}
        if parts is not None and "inplace_backward" in arguments:
            arguments["inplace_backward"] = False  # the gradients of parts are put together
        if parts is not None and asked.valid is not None:
            arguments["valid"] = asked.valid.to(choose.device)
        return asked._replace(arguments=arguments)

    return drawn


def _draw(
    choose: Choices, student: Student, arguments: Arguments, over: tuple[str, ...], steps: bool
) -> Parts | None:
    lead, packed = student.shape.lead, student.shape.cu_seqlens is not None
    padded = len(lead) == 2 and not packed
    count, micro_batches = 1, None
    if divides_by_0(arguments):  # the losses of parts may be of both infinities
        return None
    if (padded or packed) and steps and not isinstance(arguments.get("gate"), Tensor):
        micro_batches = choose("micro-batches", (None, None, None, 1, 2, 3))
    if choose.device.type == "cpu" and not choose.interpreted and dist.is_available():
        count = choose("ranks", (1, 1, 1, 2, 3))
    # Ranks that share sequences have the same number of rows.
    fit = {
        "rows": padded or packed,
        "positions": lead[-1] % count == 0
        and (padded or micro_batches is None)
        and arguments.get("ratio", "token") == "token",
        "words": student.vocab >= count,
    }
    fitting = tuple(x for x in over if fit[x])
    if count == 1 or not fitting:
        return None if micro_batches is None else Parts(micro_batches, 1, 1, "rows")
    shared = choose("ranks share", fitting)
    if shared == "rows":
        return Parts(micro_batches, count, 1, shared)
    rows = 1
    if "rows" in over and (padded or (packed and shared == "words")):
        rows = choose("parts of the rows", (1, 2))
    if shared == "words":
        return Parts(micro_batches, rows, count, shared)
    named = "context_parallel_group"
    if rows == 1:
        named = choose("group of positions", ("group", named))
    ids = choose("position ids", POSITION_IDS)
    return Parts(micro_batches, rows, count, choose("positions", LAYOUTS), named, ids)


def in_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its arguments cut as `parts` says; undivided where it is the reference."""

    def call(*, parts: Parts | None, **arguments: Any) -> Any:
        if parts is None:
            return function(**arguments)
        if arguments.get("backend") == "reference":
            return _told(function(**_without_valid(arguments)), parts)
        if parts.ranks == 1:
            return _told(_step(function, arguments, parts, {}), parts)

        def work(rank: int, named: dict[str, Any]) -> Any:
            return _step(function, _share(arguments, parts, rank), parts, named)

        found = run_ranks(parts.ranks, work, parts.groups())
        return _told(_joined(found, parts, arguments), parts)

    return call


def undivided(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference of its own, which takes the whole batch."""

    def call(*, parts: Parts | None, **arguments: Any) -> Any:
        out = reference(**_without_valid(arguments))
        return out if parts is None else _told(out, parts)

    return call


def _told(out: Any, parts: Parts) -> Any:
    """What of the results is the same for a batch in parts. Metrics are of a call's rows."""
    if parts.rows == 1 and parts.over == "words" and parts.micro_batches is None:
        return out
    if isinstance(out, LossOutput):
        return _without_numbers_of_nan(out)._replace(metrics={})
    if isinstance(out, GateOutput):  # and so are the numbers of blocks
        return out._replace(block_ids=out.block_ids.clamp(max=0), metrics={})
    return out


def _without_numbers_of_nan(out: LossOutput) -> LossOutput:
    """A NaN among the gates makes their mean NaN, by which parts multiply rows of weight 0 too."""
    bad = out.gate.isnan()
    if not bad.any():
        return out
    tokens = torch.where(bad, torch.nan, out.token_loss)
    return out._replace(loss=tokens if out.loss.dim() else out.loss + torch.nan, token_loss=tokens)


def _share(arguments: Arguments, parts: Parts, rank: int) -> Arguments:
    """A rank's part of the arguments."""
    at, place = divmod(rank, parts.across)
    mine = arguments
    if parts.rows > 1:
        mine = mine | some_sequences(mine, parts.rows, at)
    if parts.over == "words":
        words = _words(mine["logits"].shape[-1], parts.across)[place]
        return mine | {"logits": mine["logits"][..., words]}
    if parts.over == "rows":
        return mine
    ids = position_ids(mine)
    if parts.position_ids == "from 2^40":
        ids = ids + (1 << 40)
    elif parts.position_ids == "any where not valid":
        ids = torch.where(mine["valid"], ids, -7)
    mine = mine | {"position_ids": ids}
    return mine | some_positions(mine, parts.across, place, parts.over)


def _words(vocab: int, ranks: int) -> list[slice]:
    """Of each rank: one word, two, and so on, and the rest the last."""
    first = [i * (i + 1) // 2 for i in range(ranks)]
    if first[-1] >= vocab:
        first = list(range(ranks))
    return [slice(a, b) for a, b in zip(first, [*first[1:], vocab], strict=True)]


def _step(
    function: Callable[..., Any], arguments: Arguments, parts: Parts, named: Mapping[str, Any]
) -> Any:
    """A rank's call, or its micro-batches."""
    arguments = arguments | ({"parallel": Parallel(**named)} if named else {})
    if parts.micro_batches is None:
        return function(**_without_valid(arguments))
    normalizer, outs = _accumulated(function, arguments, parts.micro_batches)
    found = _cat(outs, LossOutput._fields[1:-1], across_sequences(arguments))
    factors = normalizer.gate_factor(), normalizer.factor()
    weighs, completes = (x.to(outs[0].loss.dtype) for x in factors)
    for name in ("token_loss", "gate"):
        found[name] = torch.where(arguments["valid"], found[name] * weighs, 0)
    if as_reduction(arguments["reduction"]).mode == "none":
        return LossOutput(loss=found["token_loss"], metrics={}, **found)
    loss = torch.stack([out.loss for out in outs]).sum() * completes
    return LossOutput(loss=loss, metrics={}, **found)


def _accumulated(
    function: Callable[..., Any], arguments: Arguments, count: int
) -> tuple[GateNormalizer, list[Any]]:
    """The calls in an order that the normaliser takes: none far above the first."""
    cut = [arguments | some_sequences(arguments, count, i) for i in range(count)]
    order = list(range(count))
    while True:
        normalizer, outs = GateNormalizer(arguments["gate"]), {}
        try:
            for i in order:
                outs[i] = function(**_without_valid(cut[i]) | {"gate": normalizer})
        except ValueError as error:
            if not str(error).startswith("the mean gate of this micro-batch") or i == order[0]:
                raise
            order.remove(i)
            order.insert(0, i)
            continue
        return normalizer, [outs[i] for i in range(count)]


def _without_valid(arguments: Arguments) -> Arguments:
    return {name: x for name, x in arguments.items() if name != "valid"}


def _cat(outs: list[Any], names: Sequence[str], dim: int) -> dict[str, Any]:
    found = {name: [getattr(out, name) for out in outs] for name in names}
    return {k: None if x[0] is None else torch.cat(x, dim) for k, x in found.items()}


def _joined(outs: list[Any], parts: Parts, arguments: Arguments) -> Any:
    """What the ranks found, as one process would have it."""
    across = [outs[i : i + parts.across] for i in range(0, len(outs), parts.across)]
    if parts.over == "words":
        found = [_alike(each) for each in across]
    elif parts.over == "rows":
        found = outs
    else:
        found = [_of_positions(each, parts, arguments) for each in across]
    if len(found) == 1:
        return found[0]
    return _put_together(found, across_sequences(arguments))


def _of_positions(outs: list[Any], parts: Parts, arguments: Arguments) -> Any:
    """Of the ranks that share sequences."""
    dim = across_positions(arguments)
    found = _put_together(outs, dim)
    data = {name: getattr(found, name) for name in _row_data(found)}
    return found._replace(
        **{name: in_order(x, dim, parts.across, parts.over) for name, x in data.items()}
    )


def _row_data(out: Any) -> list[str]:
    """Fields that hold a number for each position: with the reduction "none" the loss is one."""
    return [k for k, x in out._asdict().items() if isinstance(x, Tensor) and x.dim()]


def _put_together(outs: list[Any], dim: int) -> Any:
    """Row data one after another; the ranks' losses add up."""
    found = _cat(outs, _row_data(outs[0]), dim)
    if isinstance(outs[0], LossOutput) and "loss" not in found:
        found["loss"] = torch.stack([out.loss for out in outs]).sum()
    return outs[0]._replace(**found)


class _Alike(torch.autograd.Function):
    """One of several equal tensors, each of which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, *found: Tensor) -> Tensor:
        ctx.count = len(found)
        return found[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads * ctx.count


def _alike(outs: list[Any]) -> Any:
    """The results of ranks that share words, which must have the same bits."""
    if isinstance(outs[0], Tensor):
        for x in outs[1:]:
            torch.testing.assert_close(x, outs[0], rtol=0, atol=0, equal_nan=True)
        return _Alike.apply(*outs)  # type: ignore[no-untyped-call]
    if outs[0] is None:
        return None
    if isinstance(outs[0], dict):
        return {name: _alike([out[name] for out in outs]) for name in outs[0]}
    found = [_alike(list(each)) for each in zip(*outs, strict=True)]
    return type(outs[0])(*found) if hasattr(outs[0], "_fields") else tuple(found)
