"""`topk_rows` and `topk_support` on Triton kernels, called as the passes call them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drift_gate.kernels import topk as kernels
from support.launches import record_launches, refused
from support.numerics import assert_as_good_as
from torch import Tensor

from drift_gate.passes import torch as plain

DIRECTIONS = [
    ("reverse", 0.5), ("forward", 0.5), ("jsd", 0.3), ("jsd", 0), ("jsd", 1.0),
    ("mixed", 0.5), ("mixed", 0.9), ("mixed", 0.0), ("mixed", 1),
]  # fmt: skip
SUPPORTS = ["renormalized", "truncated", "tail"]


def divergence(log_p: Tensor, log_q: Tensor, direction: str, beta: float) -> Tensor:
    """Of one row's words, all of them with mass."""
    p, q = log_p.exp(), log_q.exp()
    reverse, forward = (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum()
    if direction == "reverse" or (direction == "jsd" and beta == 1):
        return reverse
    if direction == "forward" or (direction == "jsd" and beta == 0):
        return forward
    if direction == "mixed":
        return beta * forward + (1 - beta) * reverse
    log_m = (beta * q + (1 - beta) * p).log()
    return beta * (q * (log_q - log_m)).sum() + (1 - beta) * (p * (log_p - log_m)).sum()


def with_tail(x: Tensor) -> Tensor:
    """Log-probs of the words and of all others together."""
    return torch.cat([x, (1 - x.exp().sum()).log()[None]])


def expected(
    scores: Tensor, teacher: Tensor, present: Tensor, valid: Tensor, kind: tuple, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss [N] and slope [N, K] by autograd, row by row."""
    direction, beta, support = kind
    loss, slope = torch.zeros(len(valid), dtype=dtype), torch.zeros(scores.shape, dtype=dtype)
    for row in valid.nonzero()[:, 0].tolist():
        here = present[row]
        x = scores[row, here].to(dtype).requires_grad_()
        log_p, log_q = x, teacher[row, here].to(dtype)
        if support == "renormalized":
            log_p, log_q = log_p.log_softmax(0), log_q.log_softmax(0)
        elif support == "tail":
            log_p, log_q = with_tail(log_p), with_tail(log_q)
        value = divergence(log_p, log_q, direction, beta)
        loss[row] = value.detach()
        (slope[row, here],) = torch.autograd.grad(value, x)
    return loss, slope


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize(("direction", "beta"), DIRECTIONS)
def test_divergences(kernels_on_cpu, direction, beta, support, monkeypatch):
    """K = 5 pads a tile of 8; 20 rows are two programs, the second with rows to spare."""
    monkeypatch.setattr(kernels, "ELEMENTS", 128)
    generator = torch.Generator().manual_seed(0)
    scores, teacher = torch.randn(2, 20, 9, generator=generator).log_softmax(-1)[..., :5]
    present = torch.rand(20, 5, generator=generator) < 0.8
    present[:, 0] = True
    valid = torch.rand(20, generator=generator) < 0.8
    scores, teacher = (x.contiguous().masked_fill(~present, torch.nan) for x in (scores, teacher))
    on = [x.to(kernels_on_cpu) for x in (scores, teacher, present, valid)]
    rows, slope = kernels.topk_rows(on[0], on[0], *on[1:], direction, support, beta)
    kind = direction, beta, support
    eager, truth = (
        expected(scores, teacher, present, valid, kind, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_good_as(rows[0].cpu(), eager[0], truth[0], name="loss")
    assert_as_good_as(slope.cpu(), eager[1], truth[1], name="slope")
    masses = [
        x.exp().masked_fill(~(present & valid[:, None]), 0).sum(-1) for x in (scores, teacher)
    ]
    torch.testing.assert_close(rows[1:3].cpu(), torch.stack(masses))


@pytest.mark.parametrize("direction", ["mixed", "jsd"])
@pytest.mark.parametrize("beta", [0, 1])
def test_ends_are_the_divergences(kernels_on_cpu, direction, beta):
    """To the bit, and where the other one is infinite."""
    scores = torch.tensor([[0.0, -torch.inf], [-1.0, -2.0]], device=kernels_on_cpu)
    teacher = torch.tensor([[-0.5, -1.0], [0.0, -torch.inf]], device=kernels_on_cpu)
    listed = scores == scores
    ends = [
        kernels.topk_rows(scores, None, teacher, listed, listed[:, 0], *kind)
        for kind in (
            (direction, "truncated", beta),
            (("forward", "reverse")[(direction == "jsd") == beta], "truncated", 0.5),
        )
    ]
    for x, y in zip(*ends, strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


def expected_support(ids: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, list]:
    present = torch.zeros(ids.shape, dtype=torch.bool)
    doubled = without = 0
    for row, (words, masses) in enumerate(zip(ids.tolist(), teacher.tolist(), strict=True)):
        seen: set[int] = set()
        for k, (word, mass) in enumerate(zip(words, masses, strict=True)):
            if word == -1 or mass == -math.inf:
                continue
            present[row, k] = word not in seen
            doubled += word in seen and bool(valid[row])
            seen.add(word)
        without += bool(valid[row]) and not seen
    return present, valid & present.any(-1), [float(without), float(doubled)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("pairs", [64, 2048])
def test_support(kernels_on_cpu, dtype, k, pairs, monkeypatch):
    """Missing entries, words listed twice (also where the first has no mass), empty rows."""
    monkeypatch.setattr(kernels, "PAIRS", pairs)
    generator = torch.Generator().manual_seed(k)
    ids = torch.randint(-1, 2 * k, (37, k), generator=generator, dtype=dtype)
    teacher = -torch.rand(37, k, generator=generator)
    teacher[torch.rand(37, k, generator=generator) < 0.2] = -torch.inf
    teacher[3, 0] = torch.nan  # listed
    ids[5] = -1
    teacher[6] = -torch.inf
    valid = torch.rand(37, generator=generator) < 0.8
    valid[5:7] = True
    if dtype == torch.int64 and k > 1:
        ids[8, 0], ids[8, 1] = 2**32, 0  # differ in the upper half alone
    got = kernels.topk_support(*(x.to(kernels_on_cpu) for x in (ids, teacher, valid)))
    present, supported, counts = expected_support(ids, teacher, valid)
    assert torch.equal(got[0].cpu(), ids.where(present, 0))
    assert torch.equal(got[1].cpu(), present)
    assert torch.equal(got[2].cpu(), supported)
    assert got[3].sum(1).tolist() == counts


def test_support_of_no_rows(kernels_on_cpu):
    ids = torch.zeros(0, 4, dtype=torch.int64, device=kernels_on_cpu)
    words, present, supported, counts = kernels.topk_support(ids, ids.float(), ids[:, 0] > 0)
    assert words.shape == present.shape == (0, 4) and supported.shape == (0,)
    rows, tokens = torch.zeros(4, 0), torch.zeros(())
    found = kernels.masses(rows.to(kernels_on_cpu), tokens.to(kernels_on_cpu), counts)
    assert found.tolist() == [0] * 5


# One tile and a part of it; several, whose last is a part; more counts than a tile has.
@pytest.mark.parametrize(("n", "programs"), [(1, 1), (200, 3), (2500, 1030)])
def test_masses(kernels_on_cpu, n, programs):
    generator = torch.Generator().manual_seed(n)
    rows = torch.rand(4, n, generator=generator)
    rows[0] = torch.nan  # the losses, which are no mass
    counts = torch.randint(5, (2, programs), generator=generator).float()
    for tokens in (0.0, float(n)):
        given = rows, torch.tensor(tokens), counts
        with record_launches() as launches:
            got = kernels.masses(*(x.to(kernels_on_cpu) for x in given))
        expected = plain.masses(rows.double(), given[1], counts.sum(1))
        torch.testing.assert_close(got.cpu(), expected.float(), rtol=1e-6, atol=0)
        assert len(launches) == 1
    rows[2, -1] = torch.nan
    assert kernels.masses(*(x.to(kernels_on_cpu) for x in given)).isnan().tolist() == [
        False, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kind", [("backward", "tail"), ("reverse", "whole"), *itertools.product(["KL"], SUPPORTS)]
)
def test_nothing_falls_through(kernels_on_cpu, kind):
    lists = torch.zeros(4, 3)
    with refused():
        kernels.topk_rows(lists, None, lists, lists == 0, lists[:, 0] == 0, *kind, 0.5)
