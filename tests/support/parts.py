"""Problems that can be cut into micro-batches, over ranks, along sequences and along the words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import drift_gate as dg

from .problems import log_probs_of

B, T, H, K, VOCAB = 40, 12, 6, 4, 37  # 40 sequences: 1, 2 or 4 ranks of 1, 2 or 5 micro-batches
FORMS = ("opd", "topk", "full")


@dataclasses.dataclass
class Whole:
    """An undivided batch in float64, and a head."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [B, T], as what follows
    old: Tensor
    teacher: Tensor
    mask: Tensor
    spans: Tensor
    ids: Tensor  # [B, T, K]
    log_q: Tensor  # [B, T, K]
    their_hidden: Tensor  # [B, T, H]
    their_weight: Tensor  # [V, H]

    def rows(self) -> dict[str, Tensor]:
        """What is cut with the rows."""
        named = vars(self)
        return {x: named[x] for x in named if x not in ("weight", "their_weight")}

    def take(self, cut: Callable[[Tensor], Tensor]) -> Whole:
        """The part of the rows that `cut` gives of a [B, T, ...] tensor."""
        return dataclasses.replace(self, **{name: cut(x) for name, x in self.rows().items()})


def draw_whole(seed: int = 0, batch: int = B, length: int = T) -> Whole:
    """Responses begin and end anywhere; the first sequence has none."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    hidden, weight = normal(batch, length, H), normal(VOCAB, H)
    logits = hidden @ weight.T
    labels = logits.softmax(-1).view(-1, VOCAB).multinomial(1, generator=generator)
    labels = labels.view(batch, length)
    begin = torch.randint(0, length // 2, (batch, 1), generator=generator)
    end = torch.randint(length // 2, length + 1, (batch, 1), generator=generator)
    place = torch.arange(length)
    mask = (place >= begin) & (place < end) & (torch.rand(batch, length, generator=generator) < 0.9)
    mask[0] = False
    theirs, their_weight = hidden + normal(batch, length, H) / 2, weight + normal(VOCAB, H) / 4
    teacher = theirs @ their_weight.T
    log_q, ids = teacher.log_softmax(-1).topk(K)
    return Whole(
        hidden, weight, labels, log_probs_of(logits + normal(batch, length, VOCAB), labels),
        log_probs_of(teacher, labels), mask, place.expand(batch, length) // 3, ids, log_q,
        theirs, their_weight,
    )  # fmt: skip


def run_part(
    whole: Whole, form: str, linear: bool, weight: Tensor, gate: Any, **options: Any
) -> tuple[dg.LossOutput, Tensor]:
    """A loss of (part of) a batch, differentiable in weight [V, H] and in the hidden states."""
    hidden = whole.hidden.detach().requires_grad_()
    student = (hidden, weight) if linear else (hidden @ weight.T,)
    their_head = whole.their_hidden, whole.their_weight
    teacher = {
        "opd": (whole.teacher,),
        "topk": (whole.ids, whole.log_q),
        "full": their_head if linear else (whole.their_hidden @ whole.their_weight.T,),
    }[form]
    rule = gate.gate if isinstance(gate, dg.GateNormalizer) else gate
    if isinstance(rule, dg.DriftGate) and rule.granularity == "span":
        options["span_ids"] = whole.spans
    function = getattr(dg, f"{'linear_' * linear}{form}_loss")
    options = {"response_mask": whole.mask, **options}
    return function(*student, whole.labels, whole.old, *teacher, gate=gate, **options), hidden
