"""The teacher's lists: their checks, which entries count, and the divergence over them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choices import DIRECTIONS, SUPPORTS
from ..parallel.agreement import Meeting
from ..passes.backends import passes_of
from ..passes.rules import limit_of
from . import arguments
from .rows import Call, Student
from .weighing import valid_rows


class Kind(NamedTuple):
    """Which divergence: see `topk_loss`."""

    direction: str
    support: str
    beta: float
    floor: float
    """Log-probs of the listed words are at least this; -inf: no floor."""
    teacher_temperature: float
    """Divides the teacher's log-probs."""
    outside: bool
    """The teacher rules out the words that it does not list: see `_add_outside`."""

    @property
    def share(self) -> float:
        """Of the reverse KL in the loss."""
        return {"reverse": 1.0, "mixed": 1 - self.beta}.get(self.direction, 0.0)


class Lists(NamedTuple):
    """The teacher's K words of every row."""

    ids: Tensor  # [N, K] int32 or int64
    teacher: Tensor  # [N, K] log-probs in the accumulation dtype
    check_duplicates: bool
    ignore_unknown: bool


class Listed(NamedTuple):
    """Which entries count."""

    words: Tensor  # [N, K]; 0 where missing
    present: Tensor  # [N, K] bool
    valid: Tensor  # [N] rows that are valid and list anything
    counts: Tensor  # [2], or [2, ...] to be summed: valid rows that list nothing, and words again


@arguments.remembered
def kind_of(
    direction: str,
    support: str,
    beta: float,
    log_prob_floor: float | None = None,
    teacher_temperature: float | None = None,
    zero_outside_topk: bool = False,
) -> Kind:
    """Check the options of the divergence."""
    arguments.option("direction", direction, DIRECTIONS)
    arguments.option("support", support, SUPPORTS)
    check_beta(beta)
    floor = -math.inf
    if log_prob_floor is not None:
        arguments.number("log_prob_floor", log_prob_floor, -math.inf)
        if support == "renormalized":
            raise ValueError(
                "log_prob_floor goes with the supports truncated and tail; got 'renormalized'"
            )
        floor = float(log_prob_floor)
    temperature = 1.0
    if teacher_temperature is not None:
        arguments.number("teacher_temperature", teacher_temperature, 0)
        if support != "renormalized":
            raise ValueError(
                "teacher_temperature needs support 'renormalized', or the teacher's whole "
                f"distribution (full_loss); got {support!r}"
            )
        temperature = float(teacher_temperature)
    if zero_outside_topk:
        if support != "truncated" or direction not in ("reverse", "mixed"):
            raise ValueError(
                "zero_outside_topk needs support 'truncated' and direction 'reverse' or 'mixed'; "
                f"got {support!r} and {direction!r}"
            )
        if log_prob_floor is not None:
            raise ValueError("zero_outside_topk takes no log_prob_floor; got both")
    limit = limit_of(direction, beta, DIRECTIONS)
    return Kind(limit, support, float(beta), floor, temperature, bool(zero_outside_topk))


def check_beta(beta: float) -> None:
    """Raise unless 0 <= beta <= 1."""
    arguments.number("beta", beta, 0, inclusive=True)
    if beta > 1:
        raise ValueError(f"beta must be at most 1; got {beta}")


def take_lists(
    student: Student,
    ids: Tensor,
    teacher: Tensor,
    support: str,
    *,
    ignore_unknown_ids: bool,
    validate: bool,
) -> Lists:
    """Check and flatten the lists."""
    arguments.integer("teacher_topk_ids", ids)
    arguments.floating("teacher_topk_log_probs", teacher)
    device, dtype = student.device, student.dtype
    k = ids.shape[-1] if ids.dim() else 0
    of = "logits with K for V" if student.name == "logits" else "hidden_states with K for H"
    arguments.like("teacher_topk_ids", ids, (*student.shape, k), device, of)
    arguments.like("teacher_topk_log_probs", teacher, ids.shape, device, "teacher_topk_ids")
    if k == 0:
        raise ValueError("teacher_topk_ids must list at least one word a row; got K = 0")
    if support == "renormalized" and (k == 1 or student.vocab == 1):
        raise ValueError(
            "teacher_topk_ids must list at least 2 words with support 'renormalized', whose loss "
            f"over one word is 0; got K = {k} and V = {student.vocab}"
        )
    flat = teacher.detach().reshape(-1, k).to(dtype).contiguous()
    return Lists(ids.reshape(-1, k).contiguous(), flat, validate, ignore_unknown_ids)


def listed(run: Any, lists: Lists, valid: Tensor, vocab: int, check: bool) -> Listed:
    """Which entries of the lists count, and in which rows."""
    ids = lists.ids
    if lists.ignore_unknown:
        ids = torch.where(ids < vocab, ids, -1)
    return Listed(
        *run.topk_support(ids, lists.teacher, valid, vocab, check, lists.check_duplicates)
    )


def check_lists(ranks: Meeting, call: Call, lists: Lists) -> None:
    """Raise for values that are wrong while the other ranks can hear of it."""
    if ranks.reads:
        run = passes_of(call.rows.backend)
        valid = valid_rows(run, call.rows, call.labels, lists.teacher)
        listed(run, lists, valid, call.rows.vocab, True)


def divergence(
    run: Any,
    kind: Kind,
    scores: Tensor,
    log_probs: Tensor | None,
    teacher: Tensor,
    present: Tensor,
    valid: Tensor,
    row_weights: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows [4, N]: loss, student mass, teacher mass, overlap; the slope [N, K] in the scores.

    scores [N, K] of the listed words: logits where the support is renormalised, else log-probs.
    log_probs [N, K] where a logsumexp is known, entropy [N] where the kind is `outside`. A row of
    weight 0 may hold anything, and has slope 0.
    """
    low, raised = None, teacher
    if kind.teacher_temperature != 1:
        raised = teacher / kind.teacher_temperature
    if kind.floor != -math.inf:
        low = scores < kind.floor
        scores = scores.clamp(min=kind.floor)
        raised = torch.where(present, teacher.clamp(min=kind.floor), teacher)
    if kind.outside:
        raised = teacher.masked_fill(~present, -math.inf).log_softmax(-1)
    rows, slope = run.topk_rows(
        scores, log_probs, raised, present, valid, kind.direction, kind.support, kind.beta
    )
    if raised is not teacher:  # its mass is the list's own
        rows[2] = torch.where(present & valid[:, None], teacher.exp(), 0).sum(-1)
    if kind.outside:
        assert entropy is not None
        _add_outside(kind, rows, slope, scores, present & valid[:, None], entropy)
    if low is not None:
        slope = slope.masked_fill_(low, 0)
    if row_weights is not None:
        slope = slope.masked_fill_(row_weights[:, None] == 0, 0)
    return rows, slope


OUTSIDE = 100.0  # minus log q of a word that the teacher rules out, as in NeMo-RL


def _add_outside(
    kind: Kind, rows: Tensor, slope: Tensor, log_p: Tensor, here: Tensor, entropy: Tensor
) -> None:
    """Add what the words outside the lists have in the reverse KL to the losses and slopes.

    The sum of p (log p + OUTSIDE) over them is -H - sum_k p log p + OUTSIDE (1 - sum_k p): the
    entropy H, whose slope `expand` writes, less the listed words.
    """
    least = -1e4  # log-probs whose p is 0
    p = torch.where(here, log_p.exp(), 0)
    p_log_p = torch.where(here, log_p.clamp(min=least), 0) * p
    outside = OUTSIDE * (1 - p.sum(-1)) - entropy - p_log_p.sum(-1)
    rows[0] += torch.where(here.any(-1), kind.share * outside, 0)
    slope -= kind.share * (p_log_p + (OUTSIDE + 1) * p)


def of_entropy(kind: Kind, upstream: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """gamma [N] of `expand`, and what it adds to alpha: the row's gradient sums to 0."""
    gamma = kind.share * upstream
    return gamma, torch.where(gamma == 0, 0, gamma * entropy)


MASSES = "student_mass", "teacher_mass", "overlap", "without_support", "duplicate_words"


def masses(
    run: Any, rows: Tensor, tokens: Tensor, counts: Tensor, read: Tensor | None, entropy: Tensor
) -> Tensor:
    """The metrics MASSES of a loss over lists, [5]; tokens []: the valid rows.

    read [N] bool: the valid rows of which more is known than their list, where these are not all:
    then [6], the last the mean of their entropy [N] (or [0]).
    """
    found: Tensor = run.masses(rows, tokens, counts)
    if read is None:
        return found
    over = read.sum().clamp(min=1)
    found[0] = torch.where(read, rows[1], 0).sum() / over
    total = torch.where(read, entropy, 0).sum() if len(entropy) else torch.zeros_like(found[0])
    return torch.cat([found, (total / over)[None]])
