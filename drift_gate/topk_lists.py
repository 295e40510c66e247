"""The teacher's lists: their checks, and what every top-K loss does with the student's scores."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .arguments import check_floating, check_integer, check_like, check_number, check_option
from .batch import Batch, finish
from .outputs import LossOutput
from .topk_rows import topk_rows, topk_support

Direction = Literal["reverse", "forward", "jsd"]
Support = Literal["renormalized", "truncated", "tail"]


class Kind(NamedTuple):
    """Which divergence: see `topk_loss`."""

    direction: str
    support: str
    beta: float


class Lists(NamedTuple):
    """The teacher's K words of every row."""

    words: Tensor  # [N, K] int32 or int64; 0 where missing
    teacher: Tensor  # [N, K] log-probs in the accumulation dtype
    present: Tensor  # [N, K] bool
    without: Tensor  # []: rows that were valid, but list nothing


def check_divergence(direction: str, support: str, beta: float) -> None:
    """Raise unless the options fit."""
    check_option("direction", direction, get_args(Direction))
    check_option("support", support, get_args(Support))
    check_beta(beta)


def check_beta(beta: float) -> None:
    """Raise unless 0 < beta < 1."""
    check_number("beta", beta, above=0)
    if not beta < 1:
        raise ValueError(f"beta must be less than 1; got {beta}")


def take_lists(
    batch: Batch, ids: Tensor, teacher: Tensor, support: str, *, validate: bool
) -> tuple[Batch, Lists]:
    """Check and flatten the lists; rows that list nothing leave the batch's valid rows."""
    check_integer("teacher_topk_ids", ids)
    check_floating("teacher_topk_log_probs", teacher)
    student = batch.student
    k, vocab = ids.shape[-1] if ids.dim() else 0, student.vocab
    of = "logits with K for V" if student.name == "logits" else "hidden_states with K for H"
    check_like("teacher_topk_ids", ids, (*batch.layout.shape, k), student.device, of)
    check_like("teacher_topk_log_probs", teacher, ids.shape, student.device, "teacher_topk_ids")
    if not 1 <= k <= vocab:
        raise ValueError(
            f"teacher_topk_ids must list between 1 and V = {vocab} words a row; got K = {k}"
        )
    if k == 1 and support == "renormalized":
        raise ValueError(
            "teacher_topk_ids must list at least 2 words with support 'renormalized', whose loss "
            "over one word is 0; got K = 1"
        )
    flat_ids = ids.reshape(-1, k).contiguous()
    flat_teacher = teacher.detach().reshape(-1, k).to(student.dtype).contiguous()
    check = validate or student.device.type == "cpu"
    present, supported = topk_support(flat_ids, flat_teacher, batch.valid, vocab, check, validate)
    without = (batch.valid & ~supported).sum()
    words = torch.where(present, flat_ids, 0)  # missing words are read at 0; no gradient
    return batch._replace(valid=supported), Lists(words, flat_teacher, present, without)


def with_label(batch: Batch, lists: Lists) -> Tensor:
    """[N, 1 + K]: each row's label (without labels, any word) and its list."""
    labels = lists.words[:, :1] if batch.ids is None else batch.ids[:, None]
    return torch.cat([labels, lists.words], 1)


def finish_lists(
    batch: Batch,
    lists: Lists,
    kind: Kind,
    scores: Tensor,
    log_probs: Tensor | None,
    now: Tensor,
    entropy: Tensor | None,
) -> LossOutput:
    """Divergence, gate and reduction.

    scores [N, K] of the listed words: logits where the support is renormalised, else log-probs.
    log_probs [N, K] where a logsumexp is known; now [N], the labels' detached log-probs.
    """
    known = None if log_probs is None else log_probs.detach().contiguous()
    stacked, _ = topk_rows(
        scores.contiguous(), known, lists.teacher, lists.present, batch.valid, *kind, batch.backend
    )
    result = finish(batch, now, entropy, stacked[0], "given")
    tokens = batch.valid.sum().clamp(min=1)
    student_mass, teacher_mass, overlap = (stacked[1:].detach().sum(-1) / tokens).unbind()
    if known is not None:
        result.metrics["student_mass"] = student_mass
    result.metrics["teacher_mass"] = teacher_mass
    result.metrics["overlap"] = overlap
    result.metrics["without_support"] = lists.without
    return result
