"""The teacher's lists in C beside PyTorch in float64: supports, divergences, what raises."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.numerics import assert_as_good_as
from test_native import instruction_set  # noqa: F401

from drift_gate.passes import native
from drift_gate.passes import torch as plain

pytestmark = pytest.mark.skipif(
    native.instruction_set() is None, reason="there is no compiled library"
)
inf, nan = math.inf, math.nan
DIRECTIONS = ("reverse", "forward", "jsd")
SUPPORTS = ("renormalized", "truncated", "tail")
KINDS = list(itertools.product(DIRECTIONS, SUPPORTS))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(seed: int, n: int, k: int, support: str, near: float = 1.0):
    """scores, log_probs, teacher, present, valid; models that differ by `near` in their logits."""
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, 2 * k, generator=generator)
    y = z + near * torch.randn(n, 2 * k, generator=generator)
    log_p, log_q = z.log_softmax(-1)[:, :k], y.log_softmax(-1)[:, :k]
    scores = z[:, :k] if support == "renormalized" else log_p
    present = torch.rand(n, k, generator=generator) < 0.9
    valid = torch.rand(n, generator=generator) < 0.8
    present[n // 2] = False  # nothing is listed
    garbage = ~(present & valid[:, None])
    scores, log_p, log_q = (
        x.masked_fill(garbage, nan).contiguous() for x in (scores, log_p, log_q)
    )
    return scores, log_p, log_q, present, valid


def eager(scores, log_probs, teacher, present, valid, direction, support, beta):
    """The formulas of `passes.torch.topk` in the dtype given, by autograd: loss and slope."""
    here = present & valid[:, None] & present.any(-1, keepdim=True)
    leaf = torch.where(here, scores, 0).requires_grad_()
    x, y = leaf.masked_fill(~here, -inf), torch.where(here, teacher, -inf)
    some = here.any(-1)
    if support == "renormalized":
        x, y = x[some].log_softmax(-1), y[some].log_softmax(-1)
    else:
        x, y = x[some], y[some]
    if support == "tail":
        eps = torch.finfo(torch.float32).eps
        rest = [(1 - z.exp().sum(-1, keepdim=True)).clamp(min=eps).log() for z in (x, y)]
        x, y = torch.cat([x, rest[0]], -1), torch.cat([y, rest[1]], -1)
    loss = torch.zeros(len(scores), dtype=scores.dtype).masked_scatter(
        some, kl_mix(x, y, direction, beta)
    )
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


def kl(log_a, log_b):
    absent = log_a == -inf
    a, b = log_a.masked_fill(absent, 0), log_b.masked_fill(absent, 0)
    return (torch.where(absent, 0, a.exp()) * (a - b)).sum(-1)


def kl_mix(x, y, direction, beta):
    if direction == "reverse":
        return kl(x, y)
    if direction == "forward":
        return kl(y, x)
    if direction == "mixed":
        return beta * kl(y, x) + (1 - beta) * kl(x, y)
    neither = (x == -inf) & (y == -inf)
    p, q = x.masked_fill(neither, 0), y.masked_fill(neither, 0)
    m = torch.logaddexp(p + math.log1p(-beta), q + math.log(beta)).masked_fill(neither, 0)
    return beta * kl(y, m) + (1 - beta) * kl(x, m)


@pytest.mark.parametrize("direction,support", [*KINDS, *(("mixed", s) for s in SUPPORTS)])
@pytest.mark.parametrize("k", [1, 7, 64, 65, 2500])  # padded lanes, whole ones, two tiles
def test_within_the_budget_of_eager(instruction_set, direction, support, k):  # noqa: F811
    for seed, near in enumerate((1.0, 1e-3)):
        data = drawn(seed, 24, k, support, near)
        got, slope = native.topk_rows(*data, direction, support, 0.3)
        wide = [x.double() if x.is_floating_point() else x for x in data]
        truth, expected = (
            eager(*wide, direction, support, 0.3),
            eager(*data, direction, support, 0.3),
        )
        assert_as_good_as(got[0], expected[0], truth[0], name="loss")
        assert_as_good_as(slope, expected[1], truth[1], name="slope")


@pytest.mark.parametrize("direction,support", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_as_in_torch(direction, support, seed):
    k = (1, 2, 5, 64, 130, 700)[seed % 6]
    scores, log_probs, *others = drawn(seed, 13, k, support, 0.5)
    known = None if seed % 4 == 0 else scores if seed % 4 == 1 else log_probs
    options = direction, support, (0.1, 0.5, 0.9, 1e-9, 1 - 1e-9)[seed % 5]
    got, slope = native.topk_rows(scores, known, *others, *options)
    expected, wanted = plain.topk_rows(scores, known, *others, *options)
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(slope, wanted, rtol=3e-6, atol=1e-6)
    present, valid = others[1:]
    assert (slope[~(present & valid[:, None])] == 0).all() and (got[:, ~valid] == 0).all()


@pytest.mark.parametrize("support", SUPPORTS)
def test_ends_and_middle_of_beta(support):
    data = drawn(3, 9, 20, support)

    def run(direction: str, beta: float) -> list[torch.Tensor]:
        rows, slope = native.topk_rows(*data, direction, support, beta)
        return [rows, slope]

    def same(one, other):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    same(run("jsd", 0.0), run("forward", 0.5))
    same(run("jsd", 1.0), run("reverse", 0.5))
    same(run("mixed", 0.0), run("reverse", 0.5))
    same(run("mixed", 1.0), run("forward", 0.5))
    for mixed, forward, reverse in zip(
        run("mixed", 0.25), run("forward", 0.5), run("reverse", 0.5), strict=True
    ):
        torch.testing.assert_close(mixed, 0.25 * forward + 0.75 * reverse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction,support", KINDS)
def test_masses_of_0_as_in_torch(direction, support):
    """A word that the student cannot say, in several rows; one of a mass too small for float32."""
    scores, _, teacher, present, valid = drawn(5, 8, 6, support)
    present[:], valid[:] = True, True
    scores, teacher = scores.nan_to_num(-1.0), teacher.nan_to_num(-1.0)
    scores[0, 2] = scores[3, :5] = -inf
    scores[1, 1] = teacher[2, 3] = -150.0
    options = direction, support, 0.4
    got, slope = native.topk_rows(scores, None, teacher, present, valid, *options)
    expected, wanted = plain.topk_rows(scores, None, teacher, present, valid, *options)
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(slope, wanted, rtol=3e-6, atol=1e-6, equal_nan=True)
    assert got[0, 0].isinf() == got[0, 3].isinf() == (direction == "forward")


@pytest.mark.parametrize("direction,support", KINDS)
@pytest.mark.parametrize("value", [nan, inf])
def test_special_values_stay_in_their_row(direction, support, value):
    scores, _, teacher, present, valid = drawn(6, 6, 70, support)
    present[:], valid[:] = True, True
    scores, teacher = scores.nan_to_num(-1.0), teacher.nan_to_num(-1.0)
    scores[1, 3] = teacher[4, 69] = value
    rows, slope = native.topk_rows(scores, None, teacher, present, valid, direction, support, 0.5)
    finite = torch.tensor([True, False, True, True, False, True])
    assert torch.equal(rows[0].isfinite(), finite)
    assert slope[finite].isfinite().all()
    if value is nan:
        assert rows[0, ~finite].isnan().all()
    if support == "renormalized":
        assert not slope[1].isfinite().any()


def test_tails_that_are_next_to_nothing():
    """1 - sum(p) of lists that hold nearly all: float32 exponentials alone would lose it."""
    n, k = 16, 2000
    z = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    rest = torch.logspace(-6.5, -2, n).double()[:, None]
    log_p = ((1 - rest) * z.double().softmax(-1)).log().float()
    log_q = ((1 - 2 * rest) * z.double().softmax(-1)).log().float()
    on = torch.ones(n, dtype=torch.bool)
    present = torch.ones(n, k, dtype=torch.bool)
    for direction in DIRECTIONS:
        got, slope = native.topk_rows(log_p, None, log_q, present, on, direction, "tail", 0.5)
        wide = log_p.double(), None, log_q.double(), present, on, direction, "tail", 0.5
        loss, wanted = eager(*wide)
        torch.testing.assert_close(got[0].double(), loss, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(slope.double(), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("support", ["renormalized", "truncated"])
def test_the_jsd_of_models_that_nearly_agree_keeps_its_digits(support):
    """A loss of 1e-9 of terms of 1e-4, whose logarithms float32 rounds by 1e-7."""
    data = drawn(8, 24, 500, support, 1e-4)
    got, slope = native.topk_rows(*data, "jsd", support, 0.3)
    wide = [x.double() if x.is_floating_point() else x for x in data]
    loss, wanted = eager(*wide, "jsd", support, 0.3)
    if support == "truncated":  # of masses that do not sum to the same: loss and slope are larger
        torch.testing.assert_close(got[0].double(), loss, rtol=1e-4, atol=1e-9)
    else:
        torch.testing.assert_close(got[0].double(), loss, rtol=1e-2, atol=0)
    torch.testing.assert_close(slope.double(), wanted, rtol=5e-3, atol=2e-9)


def test_masses_of_large_logits():
    """Up to the largest float: exp(88.7)."""
    x = torch.tensor([[85.0, -80.0], [88.4, 0.0], [88.7, 80.0], [-87.0, -88.0], [89.0, 0.0]])
    on = torch.ones(5, dtype=torch.bool)
    masses = native.topk_rows(x, x.clone(), x, x < inf, on, "reverse", "truncated", 0.5)[0][1:3]
    expected = x.double().exp().sum(-1).float().expand(2, 5)
    torch.testing.assert_close(masses, expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_tail_that_is_held_has_no_slope(direction):
    """The student's listed words have all its mass, and then some; the teacher's have half."""
    z = torch.randn(5, 30, generator=torch.Generator().manual_seed(2))
    log_p, on = z.log_softmax(-1) + 1e-6, torch.ones(5, dtype=torch.bool)
    log_q = z.flip(0).log_softmax(-1) - math.log(2)
    data = log_p, None, log_q, torch.ones(5, 30, dtype=torch.bool), on, direction, "tail", 0.5
    expected, wanted = plain.topk_rows(*data)
    got, slope = native.topk_rows(*data)
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(slope, wanted, rtol=3e-6, atol=1e-6)


def test_teachers_raw_logits_do_where_renormalized():
    scores, _, teacher, present, valid = drawn(7, 10, 40, "renormalized")
    kind = present, valid, "reverse", "renormalized", 0.5
    got, slope = native.topk_rows(scores, None, teacher, *kind)
    moved, moved_slope = native.topk_rows(scores + 200, None, teacher + 30, *kind)
    torch.testing.assert_close(moved[0], got[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved_slope, slope, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved[2], got[2] * math.exp(30), rtol=1e-4, atol=0)


def test_large_lists_by_any_number_of_threads_give_the_same_bits(threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        data = drawn(0, 300, 400, "tail")
        ids = torch.randint(2000, (300, 400), generator=torch.Generator().manual_seed(1))
        support = native.topk_support(ids, data[2], data[4], 2000, True, False)
        results.append([*support, *native.topk_rows(*data, "jsd", "tail", 0.4)])
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


def test_unknown_options_raise():
    data = drawn(0, 4, 5, "tail")
    for direction, support, beta, message in (
        ("backward", "tail", 0.5, "direction must be one of reverse, forward, jsd, mixed"),
        ("jsd", "whole", 0.5, "support must be one of renormalized, truncated, tail"),
        ("jsd", "tail", 1.5, r"beta must lie in \[0, 1\]"),
        ("mixed", "tail", nan, r"beta must lie in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            native.topk_rows(*data, direction, support, beta)


def by_hand(ids, teacher, valid):
    """Words, present, supported and counts, word by word."""
    present = torch.zeros_like(ids, dtype=torch.bool)
    again = 0
    for row in range(len(ids)):
        seen = set()
        for k in range(ids.shape[1]):
            word = int(ids[row, k])
            if not valid[row] or word == -1 or teacher[row, k] == -inf:
                continue
            again += word in seen
            present[row, k] = word not in seen
            seen.add(word)
    supported = present.any(-1)
    counts = torch.tensor([float((valid & ~supported).sum()), float(again)])
    return ids.where(present, 0), present, supported, counts


@pytest.mark.parametrize("seed", range(40))
def test_supports_word_by_word(seed):
    generator = torch.Generator().manual_seed(seed)
    n, k = 7, (1, 2, 3, 8, 33, 200)[seed % 6]
    vocab = (2, 9, 100_000)[seed % 3]
    ids = torch.randint(-1, vocab, (n, k), generator=generator)
    teacher = torch.randn(n, k, generator=generator)
    teacher[torch.rand(n, k, generator=generator) < 0.2] = -inf
    teacher[0, 0] = nan  # counts
    valid = torch.rand(n, generator=generator) < 0.8
    ids[~valid] = vocab + 5
    ids = ids.to([torch.int32, torch.int64][seed % 2])
    got = native.topk_support(ids, teacher, valid, vocab, True, False)
    for one, other in zip(got, by_hand(ids, teacher, valid), strict=True):
        assert torch.equal(one, other)


def test_supports_of_distinct_words_as_in_torch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(5000, generator=generator) for _ in range(6)])[:, :4096]
    teacher, valid = torch.randn(6, 4096), torch.tensor([True, False, True, True, True, False])
    ids[2, :9], teacher[3] = -1, -inf
    _, present, supported, counts = native.topk_support(ids, teacher, valid, 5000, True, True)
    _, expected, also, counted = plain.topk_support(ids, teacher, valid, 5000, True, True)
    assert torch.equal(present, expected & valid[:, None]) and torch.equal(supported, also)
    assert counts.tolist() == counted.tolist() == [1, 0]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_words_outside_and_twice_raise_as_in_torch(kind):
    ids = torch.tensor([[1, 2, 3, 3], [9, 4, 9, 4], [5, 5, 1, -1], [7, 7, -1, -1]]).to(kind)
    teacher = torch.zeros(4, 4)
    teacher[3, 1] = -inf
    for rows, change in (([0, 1, 2, 3], {}), ([1, 2, 3], {}), ([0, 3], {(3, 2): -4})):
        valid = torch.zeros(4, dtype=torch.bool)
        valid[rows] = True
        changed = ids.clone()
        for place, word in change.items():
            changed[place] = word
        arguments = changed, teacher, valid, 10, True, True
        with pytest.raises(ValueError, match="teacher_topk_ids must") as expected:
            plain.topk_support(*arguments)
        with pytest.raises(ValueError, match="teacher_topk_ids must") as got:
            native.topk_support(*arguments)
        assert str(got.value) == str(expected.value)
    valid[:3] = False
    native.topk_support(ids, teacher, valid, 10, True, True)  # 7 counts once
    native.topk_support(ids * 10, teacher, valid, 10, False, False)  # not asked to check


def test_no_rows_and_no_words():
    for n, k in ((0, 4), (3, 0)):
        ids, scores = torch.zeros(n, k, dtype=torch.int64), torch.zeros(n, k)
        on = torch.ones(n, dtype=torch.bool)
        _, present, supported, counts = native.topk_support(ids, scores, on, 9, True, True)
        assert present.shape == (n, k) and not supported.any() and counts.tolist() == [n, 0]
        for direction, support in KINDS:
            rows, slope = native.topk_rows(
                scores, None, scores, present, on, direction, support, 0.5
            )
            assert (rows[:3] == 0).all() and slope.shape == (n, k)
