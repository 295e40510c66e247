"""A function over a batch in parts: micro-batches of a step, and ranks.

Ranks share rows, positions of the same sequences, or words. The parts run the function with what
belongs to them, and their results are put together; the reference takes the undivided batch.
Ranks are threads (see `local_ranks`). The gradient of hidden states over sharded words meets the
other ranks in the backward, which runs in one thread here: it is left to
`tests/test_vocab_parallel.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..accumulation import GateNormalizer
from ..outputs import GateOutput, LossOutput
from .choices import Choices
from .local_ranks import run_ranks
from .options import Arguments, Asked, Student

WHOLE = ("weight", "bias", "teacher_weight", "batch_num_tokens", "global_batch_size")
"""Tensors that are not cut with the rows."""
LAYOUTS = ("contiguous", "striped")  # of the positions that a rank has
Rest = Callable[[Choices, Any], Asked]


class Parts(NamedTuple):
    micro_batches: int | None  # through a GateNormalizer
    ranks: int
    over: str  # "rows", "words", or the layout of positions


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
        if parts is not None and parts.micro_batches is not None:
            assert asked.valid is not None
            arguments["valid"] = asked.valid.to(choose.device)
        return asked._replace(arguments=arguments)

    return drawn


def _draw(
    choose: Choices, student: Student, arguments: Arguments, over: tuple[str, ...], steps: bool
) -> Parts | None:
    padded = len(student.shape.lead) == 2 and student.shape.cu_seqlens is None
    count, micro_batches = 1, None
    if padded and steps and not isinstance(arguments.get("gate"), Tensor):
        micro_batches = choose("micro-batches", (None, None, None, 1, 2, 3))
    if choose.device.type == "cpu" and not choose.interpreted and dist.is_available():
        count = choose("ranks", (1, 1, 1, 2, 3))
    fit = {"rows": padded, "positions": padded and student.shape.lead[1] % count == 0}
    fit["words"] = student.vocab >= count
    over = tuple(x for x in over if fit[x])
    if count == 1 or not over:
        return None if micro_batches is None else Parts(micro_batches, 1, "rows")
    shared = choose("ranks share", over)
    if shared == "positions":
        shared = choose("positions", LAYOUTS)
    return Parts(micro_batches, count, shared)


def in_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its arguments cut as `parts` says; undivided where it is the reference."""

    def call(*, parts: Parts | None, **arguments: Any) -> Any:
        if parts is None:
            return function(**arguments)
        if arguments.get("backend") == "reference":
            arguments.pop("valid", None)
            return _told(function(**arguments), parts)
        if parts.ranks == 1:
            return _told(_step(function, arguments, parts, {}), parts)

        def work(rank: int, group: Any) -> Any:
            mine, named = _share(arguments, parts, rank, group)
            return _step(function, mine, parts, named)

        return _told(_joined(run_ranks(parts.ranks, work), parts, arguments), parts)

    return call


def undivided(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A reference of its own, which takes the whole batch."""

    def call(*, parts: Parts | None, **arguments: Any) -> Any:
        out = reference(**arguments)
        return out if parts is None else _told(out, parts)

    return call


def _told(out: Any, parts: Parts) -> Any:
    """What of the results is the same for a batch in parts. Metrics are of a call's rows."""
    if parts.over == "words" and parts.micro_batches is None:
        return out
    if isinstance(out, LossOutput):
        return out._replace(metrics={})
    if isinstance(out, GateOutput):  # and so are the numbers of blocks
        return out._replace(block_ids=out.block_ids.clamp(max=0), metrics={})
    return out


def _of_rows(arguments: Arguments) -> dict[str, Tensor]:
    return {k: x for k, x in arguments.items() if isinstance(x, Tensor) and k not in WHOLE}


def _share(
    arguments: Arguments, parts: Parts, rank: int, group: Any
) -> tuple[Arguments, dict[str, Any]]:
    """A rank's part of the arguments, and those that name its group; its rows' come first."""
    if parts.over == "words":
        words = _words(arguments["logits"].shape[-1], parts.ranks)[rank]
        mine = {"logits": arguments["logits"][..., words]}
        return arguments | mine, {"vocab_parallel_group": group}
    rows = _of_rows(arguments)
    if parts.over == "rows":
        mine = {k: x.tensor_split(parts.ranks)[rank] for k, x in rows.items()}
        return arguments | mine, {"group": group}
    mine = {k: _positions(x, parts, rank) for k, x in rows.items()}
    lead = next(x for x in rows.values()).shape[:2]
    place = torch.arange(lead[1]).expand(lead)
    mine["position_ids"] = _positions(place, parts, rank)
    return arguments | mine, {"group": group}


def _words(vocab: int, ranks: int) -> list[slice]:
    """Of each rank: one word, two, and so on, and the rest the last."""
    first = [i * (i + 1) // 2 for i in range(ranks)]
    if first[-1] >= vocab:
        first = list(range(ranks))
    return [slice(a, b) for a, b in zip(first, [*first[1:], vocab], strict=True)]


def _positions(x: Tensor, parts: Parts, rank: int) -> Tensor:
    """The part of [B, T, ...] that a rank has."""
    if parts.over == "striped":
        return x[:, rank :: parts.ranks]
    return x.tensor_split(parts.ranks, 1)[rank]


def _step(
    function: Callable[..., Any], arguments: Arguments, parts: Parts, named: Mapping[str, Any]
) -> Any:
    """A rank's call, or its micro-batches."""
    if parts.micro_batches is None:
        return function(**arguments, **named)
    valid = arguments.pop("valid")
    normalizer, outs = _accumulated(function, arguments, parts.micro_batches, named)
    found = _cat(outs, LossOutput._fields[1:-1])
    factors = normalizer.gate_factor(), normalizer.factor()
    weighs, completes = (x.to(outs[0].loss.dtype) for x in factors)
    for name in ("token_loss", "gate"):
        found[name] = torch.where(valid, found[name] * weighs, 0)
    if arguments["loss_agg_mode"] == "none":
        return LossOutput(loss=found["token_loss"], metrics={}, **found)
    loss = torch.stack([out.loss for out in outs]).sum() * completes
    return LossOutput(loss=loss, metrics={}, **found)


def _accumulated(
    function: Callable[..., Any], arguments: Arguments, count: int, named: Mapping[str, Any]
) -> tuple[GateNormalizer, list[Any]]:
    """The calls in an order that the normaliser takes: none far above the first."""
    rows = _of_rows(arguments)
    cut = [{k: x.tensor_split(count)[i] for k, x in rows.items()} for i in range(count)]
    order = list(range(count))
    while True:
        normalizer, outs = GateNormalizer(arguments["gate"]), {}
        try:
            for i in order:
                outs[i] = function(**arguments | cut[i] | {"gate": normalizer}, **named)
        except ValueError as error:
            if not str(error).startswith("the mean gate of this micro-batch") or i == order[0]:
                raise
            order.remove(i)
            order.insert(0, i)
            continue
        return normalizer, [outs[i] for i in range(count)]


def _cat(outs: list[Any], names: tuple[str, ...], dim: int = 0) -> dict[str, Any]:
    found = {name: [getattr(out, name) for out in outs] for name in names}
    return {k: None if x[0] is None else torch.cat(x, dim) for k, x in found.items()}


def _joined(outs: list[Any], parts: Parts, arguments: Arguments) -> Any:
    """What the ranks found, as one process would have it."""
    if parts.over == "words":
        return _alike(outs)
    names = tuple(name for name in outs[0]._fields if name not in ("loss", "metrics"))
    found = _cat(outs, names, 0 if parts.over == "rows" else 1)
    if parts.over == "striped":
        length = next(x for x in found.values() if x is not None).shape[1]
        places = torch.cat([torch.arange(length)[r :: parts.ranks] for r in range(parts.ranks)])
        order = places.argsort()
        found = {k: x if x is None else x[:, order] for k, x in found.items()}
    if isinstance(outs[0], LossOutput):
        losses = [out.loss for out in outs]
        if arguments["loss_agg_mode"] == "none":
            found["loss"] = found["token_loss"]
        else:
            found["loss"] = torch.stack(losses).sum()  # the ranks' losses add up
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
