"""What each `linear_` loss does with the logits of a chunk: values first, then their gradient.

A loss keeps what the caller is to have of every row in `results`, [N, ...] tensors: the labels'
log-probs first, entropy second ([0] where it is not wanted).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import rows
from .chunks import Rows, put, take
from .divergence import divergence, divergence_grad_
from .head import Head, logits_of, slices
from .head_scan import Chunk, new_buffer, uncap
from .topk_rows import topk_rows


class Common(NamedTuple):
    """What all of them take."""

    hidden: Tensor  # [N, H]
    head: Head
    labels: Tensor | None  # [N]
    chunk_size: int
    entropy: bool
    backend: str

    def new(self, *shape: int) -> Tensor:
        """Zeros in the accumulation dtype."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        return self.hidden.new_zeros(shape, dtype=dtype)

    def results(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Log-probs, entropy, and more of these shapes."""
        n = len(self.hidden)
        return [self.new(n), self.new(n * self.entropy), *(self.new(*shape) for shape in shapes)]

    def keep(self, results: list[Tensor], at: Rows, *parts: Tensor) -> None:
        """Put each result's part of a chunk."""
        for result, part in zip(results, parts, strict=True):
            if len(result):
                put(result, at, part)


class HeadLoss(Protocol):
    """A loss over the logits of a head."""

    results: list[Tensor]

    def values(self, at: Rows) -> Tensor:
        """Make a chunk's logits and keep its results; the labels' log-probs [C]."""

    def gradient(self, weights: Tensor) -> Tensor:
        """Gradient [C, V] of that chunk's logits before the scale, positions weighed [C]."""


class SampledToken:
    """`opd_loss`."""

    def __init__(
        self,
        common: Common,
        old: Tensor | None,
        teacher: Tensor,
        estimator: str,
        clips: tuple[float, float, float, float | None],
    ) -> None:
        assert common.labels is not None
        self.common, self.ids = common, common.labels[:, None]
        self.old, self.teacher, self.estimator, self.clips = old, teacher, estimator, clips
        self.results = common.results()
        self.buffer = new_buffer(common.head, len(common.hidden), common.chunk_size)

    def values(self, at: Rows) -> Tensor:
        c = self.common
        self.at, ids = at, take(self.ids, at)
        self.chunk = Chunk(c.head, take(c.hidden, at), ids, self.buffer, c.entropy, c.backend)
        self.log_probs = self.chunk.log_probs[:, 0].contiguous()
        c.keep(self.results, at, self.log_probs, self.chunk.entropy)
        return self.log_probs

    def gradient(self, weights: Tensor) -> Tensor:
        new = self.log_probs
        old = None if self.old is None else take(self.old, self.at)
        whole = torch.ones_like(new, dtype=torch.bool)
        _, row_data, _ = rows.sampled_token(
            new, old, take(self.teacher, self.at), whole, None, None, len(new), 0.0, "off",
            self.estimator, *self.clips, 1.0, "given", False, self.common.backend,
        )  # fmt: skip
        slope = row_data[2] * weights
        return self.chunk.gradient(-slope, slope[:, None])


class Listed:
    """`topk_loss`; its third result are the words' log-probs [N, K]."""

    def __init__(
        self,
        common: Common,
        words: Tensor,
        teacher: Tensor,
        present: Tensor,
        kind: tuple[str, str, float],
    ) -> None:
        self.common, self.words, self.teacher, self.present = common, words, teacher, present
        self.kind = kind
        first = words[:, :1] if common.labels is None else common.labels[:, None]
        self.ids = torch.cat([first, words], 1)
        self.results = common.results(tuple(words.shape))
        self.buffer = new_buffer(common.head, len(common.hidden), common.chunk_size)

    def values(self, at: Rows) -> Tensor:
        c = self.common
        self.at, ids = at, take(self.ids, at)
        self.chunk = Chunk(c.head, take(c.hidden, at), ids, self.buffer, c.entropy, c.backend)
        now = self.chunk.log_probs[:, 0].contiguous()
        if c.labels is None:
            now = torch.zeros_like(now)
        c.keep(self.results, at, now, self.chunk.entropy, self.chunk.log_probs[:, 1:])
        return now

    def gradient(self, weights: Tensor) -> Tensor:
        log_probs = self.chunk.log_probs[:, 1:].contiguous()
        parts = [take(x, self.at) for x in (self.teacher, self.present)]
        whole = torch.ones_like(weights, dtype=torch.bool)
        _, slope = topk_rows(log_probs, None, *parts, whole, *self.kind, self.common.backend)
        beta = torch.cat([torch.zeros_like(slope[:, :1]), slope * weights[:, None]], 1)
        return self.chunk.gradient(-beta.sum(-1), beta)


class Teacher(NamedTuple):
    """Hidden states [N, H'] and head of the teacher."""

    hidden: Tensor
    head: Head


class Divergence:
    """`full_loss`; its third result are the position losses [N]."""

    def __init__(
        self, common: Common, teacher: Teacher, vocab: int, direction: str, beta: float
    ) -> None:
        self.common, self.teacher, self.vocab = common, teacher, vocab
        self.options = common.head.scale, teacher.head.scale, direction, beta
        n = len(common.hidden)
        self.results = common.results((n,))
        self.buffer = new_buffer(common.head, n, common.chunk_size)
        self.other = new_buffer(teacher.head, n, common.chunk_size)

    def values(self, at: Rows) -> Tensor:
        c = self.common
        self.logits = logits_of(c.head, take(c.hidden, at), self.buffer)
        theirs = logits_of(self.teacher.head, take(self.teacher.hidden, at), self.other)
        self.theirs = theirs[None, :, : self.vocab]
        labels = None if c.labels is None else take(c.labels, at)
        whole = torch.ones_like(self.logits[:, 0], dtype=torch.bool)
        losses, log_probs, self.statistics, entropy = divergence(
            self.logits[None], self.theirs, labels, whole, *self.options, c.entropy, False,
            c.backend,
        )  # fmt: skip
        c.keep(self.results, at, log_probs, entropy, losses)
        return log_probs

    def gradient(self, weights: Tensor) -> Tensor:
        z, cap = self.logits, self.common.head.softcap
        for part in slices(z) if cap else [slice(0, len(z))]:
            kept = z[part].to(weights.dtype, copy=True) if cap else None
            whole = torch.ones_like(weights[part], dtype=torch.bool)
            divergence_grad_(
                z[None, part], self.theirs[:, part], self.statistics[:, part].contiguous(), whole,
                weights[part], *self.options, self.common.backend,
            )  # fmt: skip
            if kept is not None:
                uncap(z[part], kept, cap)
        return z
