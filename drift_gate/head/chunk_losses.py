"""What each `linear_` loss does with the logits of a chunk: values first, then their gradient.

A loss keeps what the caller is to have of every row in `results`: the labels' log-probs first,
entropy second.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..call.lists import Kind, divergence, of_entropy
from ..parallel import words
from ..passes.rules import NO_GATE, PositionRule, ReduceRule, RowData
from .check import HeadInputs
from .chunks import Rows, put, take
from .logits import Room, logits_of, new_buffer, slices, uncap

SUM = ReduceRule()


class Common(NamedTuple):
    """What all of them take."""

    run: Any  # the backend's passes
    head: HeadInputs
    labels: Tensor | None  # [N]
    chunk_size: int
    entropy: bool
    noise: bool = False
    """Whether the rounding of the logits is asked about: `results` end with each row's maximum and
    log_sum then, which are [0] otherwise."""

    def results(self, *shapes: tuple[int, ...]) -> "Results":
        """Log-probs, entropy, more of these shapes, maximum and log_sum."""
        n = len(self.head.hidden)
        entropy, noise = (n if self.entropy else 0,), (n if self.noise else 0,)
        return Results(self.head.hidden, (n,), entropy, *shapes, noise, noise)


class Results:
    """What the caller is to have of every row, chunk by chunk: tensors of these shapes, [N, ...],
    in the accumulation dtype of `like` [N, H]; [0] where one is not wanted."""

    def __init__(self, like: Tensor, *shapes: tuple[int, ...]) -> None:
        self.like, self.shapes = like, shapes
        self._tensors: list[Tensor] = []

    def all(self) -> list[Tensor]:
        """The tensors; rows of which no chunk was are 0."""
        if not self._tensors:
            dtype = torch.promote_types(self.like.dtype, torch.float32)
            self._tensors = [self.like.new_zeros(shape, dtype=dtype) for shape in self.shapes]
        return self._tensors

    def keep(self, at: Rows, *parts: Tensor) -> None:
        """Take each result's part of a chunk; a chunk of all rows is not copied."""
        if isinstance(at, slice) and at.stop - at.start == len(self.like):
            self._tensors = [
                part.contiguous() if shape[0] else part.new_empty(0)
                for shape, part in zip(self.shapes, parts, strict=True)
            ]
            return
        for result, part in zip(self.all(), parts, strict=True):
            if len(result):
                put(result, at, part)


class Chunk:
    """Logits of a few rows, their statistics of the words ids [N, K] (and labels [N]), and then
    their gradient."""

    def __init__(
        self, common: Common, at: Rows, ids: Tensor, room: Room, labels: Tensor | None = None
    ) -> None:
        head = self.head = common.head
        self.run, self.ids, self.room = common.run, take(ids, at), room
        self.logits = logits_of(head, take(head.hidden, at), room.logits)
        theirs = None if labels is None else take(labels, at)
        self.found = words.scan_lists(
            self.run, self.logits[None], theirs, self.ids, None, head.rule.scale, common.entropy,
            head.shard,
        )  # fmt: skip
        self.gathered, self.log_probs, self.maximum, self.log_sum, self.entropy, _ = self.found

    def gradient(self, alpha: Tensor, beta: Tensor, gamma: Tensor | None = None) -> Tensor:
        """[C, V]: d loss / d (hidden W^T + bias) from alpha [C], beta [C, K] and gamma [C]; the
        logits are lost.

        Where there is a cap, float32 logits become their float32 gradient, which is rounded with
        the cap's slope.
        """
        z, cap, scale = self.logits, self.head.rule.softcap, self.head.rule.scale
        ids, rounded = self.ids, self.room.gradient(len(z))
        if self.head.shard.group:
            ids = words.own(self.head.shard, ids, z.shape[1])
        if not cap:
            self.run.expand(
                z[None], ids, self.maximum, self.log_sum, self.gathered, None, alpha, beta, scale,
                rounded[None], gamma,
            )  # fmt: skip
            return rounded
        for rows in slices(z):
            kept = z[rows].to(alpha.dtype, copy=True)
            self.run.expand(
                z[None, rows], ids[rows], self.maximum[rows], self.log_sum[rows],
                self.gathered[rows], None, alpha[rows], beta[rows], scale, z[None, rows],
                None if gamma is None else gamma[rows],
            )  # fmt: skip
            uncap(rounded[rows], z[rows], kept, cap)
        return rounded


class ChunkLoss(Protocol):
    """A loss over the logits of a head."""

    results: Results

    def values(self, at: Rows) -> Tensor:
        """Make a chunk's logits and keep its results; the labels' log-probs [C]."""

    def gradient(self, weights: Tensor, final: bool) -> Tensor:
        """Gradient [C, V] of that chunk's logits before the scale.

        weights [C]: what the positions' losses are multiplied by; where `final`, the gradient of
        what the position loss is a function of (the log-prob, or the loss itself).
        """


class SampledToken:
    """`linear_opd_loss`."""

    def __init__(
        self, common: Common, old: Tensor | None, target: Tensor, position: PositionRule
    ) -> None:
        assert common.labels is not None
        self.common, self.ids = common, common.labels[:, None]
        self.old, self.target, self.position = old, target, position
        self.results = common.results()
        self.room = Room(common.head, common.chunk_size)

    def values(self, at: Rows) -> Tensor:
        c = self.common
        self.at = at
        self.chunk = Chunk(c, at, self.ids, self.room)
        self.log_probs = self.chunk.log_probs[:, 0].contiguous()
        chunk = self.chunk
        self.results.keep(at, self.log_probs, chunk.entropy, chunk.maximum, chunk.log_sum)
        return self.log_probs

    def gradient(self, weights: Tensor, final: bool) -> Tensor:
        slope = weights if final else self._slope(weights)
        return self.chunk.gradient(-slope, slope[:, None])

    def _slope(self, weights: Tensor) -> Tensor:
        now, at = self.log_probs, self.at
        old = None if self.old is None else take(self.old, at)
        whole = torch.ones_like(now, dtype=torch.bool)
        data = RowData(whole, now, old, None, None, len(now))
        done = self.common.run.finish(
            data, NO_GATE, None, weights, take(self.target, at), self.position, SUM
        )
        slope: Tensor = done.table[2]
        return slope


class ListedWords:
    """`linear_topk_loss`; its third result are the words' log-probs [N, K]."""

    def __init__(
        self, common: Common, listed: Tensor, teacher: Tensor, present: Tensor, kind: Kind
    ) -> None:
        self.common, self.listed, self.teacher = common, listed, teacher
        self.present, self.kind = present, kind
        first = listed[:, :1] if common.labels is None else common.labels[:, None]
        self.ids = torch.cat([first.to(listed.dtype), listed], 1)
        self.results = common.results(tuple(listed.shape))
        self.room = Room(common.head, common.chunk_size)

    def values(self, at: Rows) -> Tensor:
        c = self.common
        self.at = at
        self.chunk = Chunk(c, at, self.ids, self.room)
        now = self.chunk.log_probs[:, 0].contiguous()
        if c.labels is None:
            now = torch.zeros_like(now)
        self.results.keep(
            at, now, self.chunk.entropy, self.chunk.log_probs[:, 1:], self.chunk.maximum,
            self.chunk.log_sum,
        )  # fmt: skip
        return now

    def gradient(self, weights: Tensor, final: bool) -> Tensor:
        log_probs = self.chunk.log_probs[:, 1:].contiguous()
        teacher, present = take(self.teacher, self.at), take(self.present, self.at)
        whole = torch.ones_like(weights, dtype=torch.bool)
        run = self.common.run
        _, slope = divergence(
            run, self.kind, log_probs, None, teacher, present, whole, weights, self.chunk.entropy
        )
        slope = slope * weights[:, None]
        beta, alpha = torch.nn.functional.pad(slope, (1, 0)), -slope.sum(-1)
        if not self.kind.outside:
            return self.chunk.gradient(alpha, beta)
        gamma, more = of_entropy(self.kind, weights, self.chunk.entropy)
        return self.chunk.gradient(alpha + more, beta, gamma)


class WholeVocabulary:
    """`linear_full_loss`; its third result are the position losses [N]."""

    def __init__(
        self, common: Common, teacher: HeadInputs, vocab: int, direction: str, beta: float
    ) -> None:
        self.common, self.teacher, self.vocab = common, teacher, vocab
        self.options = common.head.rule.scale, teacher.rule.scale, direction, beta
        self.results = common.results((len(common.head.hidden),))
        self.room = Room(common.head, common.chunk_size)
        self.other = new_buffer(teacher, common.chunk_size)

    def values(self, at: Rows) -> Tensor:
        c = self.common
        self.logits = logits_of(c.head, take(c.head.hidden, at), self.room.logits)
        theirs = logits_of(self.teacher, take(self.teacher.hidden, at), self.other)
        self.theirs = theirs[None, :, : self.vocab]
        labels = None if c.labels is None else take(c.labels, at)
        whole = torch.ones_like(self.logits[:, 0], dtype=torch.bool)
        losses, log_probs, self.statistics, entropy = c.run.divergence(
            self.logits[None], self.theirs, labels, whole, *self.options, c.entropy
        )
        self.results.keep(at, log_probs, entropy, losses, *self.statistics[:2])
        kept: Tensor = log_probs
        return kept

    def gradient(self, weights: Tensor, final: bool) -> Tensor:
        z, cap = self.logits, self.common.head.rule.softcap
        rounded = self.room.gradient(len(z))
        out = z if cap else rounded
        for part in slices(z) if cap else [slice(0, len(z))]:
            kept = z[part].to(weights.dtype, copy=True) if cap else None
            whole = torch.ones_like(weights[part], dtype=torch.bool)
            self.common.run.divergence_grad(
                z[None, part], self.theirs[:, part], self.statistics[:, part].contiguous(), whole,
                weights[part].contiguous(), *self.options, out[None, part],
            )  # fmt: skip
            if kept is not None:
                uncap(rounded[part], z[part], kept, cap)
        return rounded
