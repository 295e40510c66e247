"""Inputs of the benchmarks, and the float64 statistics that their truth is made of.

Kinds (Case.kind):

    peaked  noise, and one word a row that takes anything from little to nearly all of the mass, as
            in a trained model; the old policy is 0.3 nats away, so that PPO clips a third of the
            rows: their gradient is 0, and a backward need not read them
    live    the same, with the old policy so near that no row is clipped
    zipf    the same as peaked, but the teacher lists words by a Zipf law: a few stand in nearly
            every row, as in text, where the likeliest words of noise are spread evenly
    normal  unit noise, where every word has about the same mass

Labels are sampled from the student, and the teacher is 1 nat away.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .cases import Case

CHUNK_WORDS = 1 << 24  # logits worked on at once, in float64
CHECKED = 32  # rows (and words of the head) whose gradient is compared with float64
SPREAD, LIFT = 2.0, 16.0
NEAR = 0.15  # nats of drift, at most, of the kind "live": within PPO's clip of 0.2


@dataclasses.dataclass
class Work:
    """Inputs of one case. What the case does not need is None."""

    case: Case
    device: torch.device
    labels: Tensor  # [N] int64
    old: Tensor  # [N] float32
    teacher: Tensor  # [N] float32
    checked: Tensor  # [CHECKED] rows
    now64: Tensor  # [N] float64: log-prob of the label
    lse64: Tensor  # [N] float64
    entropy64: Tensor  # [N] float64
    logits: Tensor | None = None  # [N, V]
    now: Tensor | None = None  # [N] float32, where a work starts from log-probs
    scores: Tensor | None = None  # [N, K] float32, where it starts from listed logits
    ids: Tensor | None = None  # [N, K] int64, the teacher's likeliest
    log_q: Tensor | None = None  # [N, K] float32
    listed64: Tensor | None = None  # [N, K] float64: the student's logits there
    teacher_logits: Tensor | None = None  # [N, V]
    hidden: Tensor | None = None  # [N, H]
    weight: Tensor | None = None  # [V, H]
    teacher_hidden: Tensor | None = None  # [N, H]
    teacher_weight: Tensor | None = None  # [V, H]

    def logits64(self, rows: Tensor | slice, *, teacher: bool = False) -> Tensor:
        """Rows of the (teacher's) logits in float64."""
        if self.logits is not None:
            logits = self.teacher_logits if teacher else self.logits
            return logits[rows].double()
        hidden = self.teacher_hidden if teacher else self.hidden
        weight = self.teacher_weight if teacher else self.weight
        return hidden[rows].double() @ weight.double().T

    def chunks(self) -> list[slice]:
        """Rows to hold in float64 at once."""
        step = max(1, CHUNK_WORDS // max(self.case.vocab, 1))
        return [slice(i, i + step) for i in range(0, self.case.rows, step)]


def draw(case: Case, device: torch.device, *, full_teacher: bool = False) -> Work:
    """Draw a case; from hidden states and a head where it has a width, else logits."""
    n = case.rows
    generator = torch.Generator(device).manual_seed(0)
    new = dict(device=device)
    work = Work(
        case, device,
        labels=torch.empty(n, dtype=torch.int64, **new),
        old=torch.empty(n, **new), teacher=torch.empty(n, **new),
        checked=torch.randperm(n, generator=generator, **new)[:CHECKED],
        now64=torch.empty(n, dtype=torch.float64, **new),
        lse64=torch.empty(n, dtype=torch.float64, **new),
        entropy64=torch.empty(n, dtype=torch.float64, **new),
    )  # fmt: skip
    if case.hidden:
        work.hidden, work.weight = _head(case, generator, device)
        if full_teacher:
            work.teacher_hidden, work.teacher_weight = _nearby(work, generator)
    else:
        work.logits = torch.empty(n, case.vocab, dtype=case.torch_dtype, **new)
        if full_teacher:
            work.teacher_logits = torch.empty_like(work.logits)
    if case.k:
        work.ids = torch.empty(n, case.k, dtype=torch.int64, **new)
        work.log_q = torch.empty(n, case.k, **new)
        work.listed64 = torch.empty(n, case.k, dtype=torch.float64, **new)
    head64 = None if work.weight is None else work.weight.double().T
    for rows in work.chunks():
        _draw_rows(work, rows, head64, generator)
    noise = torch.randn(2, n, generator=generator, **new)
    drift = 0.3 * noise[0]
    if case.kind == "live":
        drift = NEAR * torch.erf(noise[0])
    work.old = work.now64.float() + drift
    work.teacher = work.now64.float() + noise[1]
    return work


def draw_rows(case: Case, device: torch.device) -> Work:
    """Row data alone: log-probs of labels and of lists, no logits."""
    generator = torch.Generator(device).manual_seed(0)
    n, new = case.rows, dict(device=device)
    now = -4 * torch.rand(n, generator=generator, **new)
    noise = torch.randn(2, n, generator=generator, **new)
    labels = torch.zeros(n, dtype=torch.int64, **new)
    nothing = torch.empty(0, dtype=torch.float64, **new)
    work = Work(
        case, device, labels, now + 0.3 * noise[0], now + noise[1], labels[:0], now.double(),
        nothing, nothing, now=now,
    )  # fmt: skip
    if case.k:
        work.scores = SPREAD * torch.randn(n, case.k, generator=generator, **new)
        work.listed64 = work.scores.double()
        teacher = work.scores + torch.randn(n, case.k, generator=generator, **new)
        work.log_q = teacher.log_softmax(-1)
    return work


def _peak(case: Case, generator: torch.Generator, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise of the kind's spread; and how much each row's winner is lifted, [rows, 1]."""
    new = dict(generator=generator, device=generator.device)
    peaked = case.kind != "normal"
    noise = torch.randn(shape, **new) * (SPREAD if peaked else 1.0)
    return noise, LIFT * peaked * torch.rand(shape[0], 1, **new)


def _head(case: Case, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hidden states and head whose product has the kind's spread and peaks."""
    new = dict(generator=generator, device=device)
    dtype = case.torch_dtype
    weight = (torch.randn(case.vocab, case.hidden, **new) / case.hidden**0.5).to(dtype)
    hidden, lift = _peak(case, generator, (case.rows, case.hidden))
    winner = torch.randint(case.vocab, (case.rows,), **new)
    hidden += lift * weight[winner].float()  # a word's row has about unit length
    return hidden.to(dtype), weight


def _nearby(work: Work, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The teacher's hidden states and head: the student's with noise."""
    new = dict(generator=generator, device=work.device)
    hidden = work.hidden + torch.randn(work.hidden.shape, **new).to(work.hidden.dtype)
    noise = torch.randn(work.weight.shape, **new) / (4 * work.case.hidden**0.5)
    return hidden, work.weight + noise.to(work.weight.dtype)


def _draw_rows(work: Work, rows: slice, head64: Tensor | None, generator: torch.Generator) -> None:
    """Logits where the case starts from them, labels, the teacher's list, and statistics."""
    case, new = work.case, dict(generator=generator, device=work.device)
    if work.logits is None:
        z = work.hidden[rows].double() @ head64
    else:
        noise, lift = _peak(case, generator, (len(work.logits[rows]), case.vocab))
        winner = torch.randint(case.vocab, (len(noise), 1), **new)
        work.logits[rows] = noise.scatter_add_(-1, winner, lift)
        if work.teacher_logits is not None:
            noise += torch.randn(noise.shape, **new)
            work.teacher_logits[rows] = noise
        z = work.logits[rows].double()
    if work.ids is not None:
        teacher = z.float() + torch.randn(z.shape, **new)
        if case.kind == "zipf":
            work.ids[rows] = zipf_lists(len(teacher), case.vocab, case.k, generator)
        else:
            work.ids[rows] = teacher.topk(case.k).indices
        listed = teacher.gather(-1, work.ids[rows])
        work.log_q[rows] = listed - teacher.logsumexp(-1, keepdim=True)
        work.listed64[rows] = z.gather(-1, work.ids[rows])
        del teacher
    lse = z.logsumexp(-1)
    log_p = z.sub_(lse[:, None])
    p = log_p.exp()
    work.labels[rows] = _sampled(p, generator)
    work.now64[rows] = log_p.gather(-1, work.labels[rows, None])[:, 0]
    work.entropy64[rows] = -p.mul_(log_p).sum(-1)
    work.lse64[rows] = lse


def zipf_lists(rows: int, vocab: int, k: int, generator: torch.Generator) -> Tensor:
    """k different words a row, [rows, k] int64, word v drawn with weight 1 / (v + 1).

    Vocabularies of byte pairs are about sorted by frequency, so the frequent words stand side by
    side. Without repeats: the k first of waiting times whose rates are the weights (Efraimidis and
    Spirakis 2006).
    """
    new = dict(device=generator.device)
    waits = torch.empty(rows, vocab, **new).exponential_(generator=generator)
    rates = torch.arange(1, vocab + 1, dtype=torch.float32, **new)
    return waits.mul_(rates).topk(k, largest=False).indices


def _sampled(p: Tensor, generator: torch.Generator) -> Tensor:
    """A word of each row of p [N, V], [N]: a sixth of the time of `multinomial` on a CPU."""
    mass = p.cumsum(-1)
    new = dict(generator=generator, dtype=p.dtype, device=p.device)
    drawn = torch.rand(len(p), 1, **new) * mass[:, -1:]
    return torch.searchsorted(mass, drawn, right=True)[:, 0].clamp_(max=p.shape[1] - 1)
