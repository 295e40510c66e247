"""The passes in plain PyTorch, against their formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.problems import peaked_logits
from torch import Tensor

from drift_gate.budget import assert_as_good_as
from drift_gate.passes import torch as passes
from drift_gate.passes.torch import vocabulary

INF, NAN = torch.inf, torch.nan
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
DIRECTIONS = pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
SHAPE = 2, 9, 33  # with 4 rows at a time: full chunks, partial ones, and rows between masked ones
SCALE, TEACHER_SCALE, BETA = 0.7, 1.3, 0.3


@pytest.fixture(autouse=True)
def four_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "words_at_once", lambda x: 4 * x.shape[-1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] in rows that lie apart, NaN between and in invalid ones; and valid [N]."""
    b, t, v = SHAPE
    x = torch.full((b, t + 1, v + 3), NAN, dtype=dtype)[:, 1:, 2 : v + 2]
    x.copy_(peaked_logits(b, t, v, generator=generator(seed)))
    valid = torch.rand(b * t, generator=generator(9)) > 0.3
    x[~valid.view(b, t)] = NAN
    return x, valid


def clean(x: Tensor, valid: Tensor) -> Tensor:
    """[N, V] in float64, 0 in invalid rows: what the formulas take."""
    rows = x.double().flatten(0, 1)
    return torch.where(valid[:, None], rows, 0)


def judge(got: Tensor, eager: Tensor, truth: Tensor, name: str) -> None:
    if got.dtype == torch.float64:  # no wider truth: the formula has roundings of its own
        torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-14, msg=name)
        return
    assert_as_good_as(got, eager.to(got.dtype), truth.to(torch.float64), name=name)


def eager_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# One vocabulary.


def scan_formulas(z: Tensor, ids: Tensor) -> list[Tensor]:
    top, log_p = z.amax(-1), z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return [z.gather(1, ids), log_p.gather(1, ids), top, z.logsumexp(-1) - top, entropy]


@DTYPES
def test_scan(dtype: torch.dtype) -> None:
    x, valid = draw(dtype)
    ids = torch.randint(0, SHAPE[2], (len(valid), 3), generator=generator())
    ids[~valid] = 10**9  # not read
    got = passes.scan(x, ids, valid, SCALE, True)
    known = ids.masked_fill(~valid[:, None], 0)
    z = clean(x, valid) * SCALE
    truth = scan_formulas(z, known)
    eager = scan_formulas(z.to(eager_dtype(dtype)), known)
    for name, result, base, true in zip("gplse", got, eager, truth, strict=True):
        assert result[~valid].eq(0).all(), name
        judge(result[valid], base[valid], true[valid], name)
    assert len(passes.scan(x, ids, valid, SCALE, False)[4]) == 0


def test_rows_that_lie_anywhere_give_the_same_bits() -> None:
    x, _ = draw(torch.float32)
    x = peaked_logits(*SHAPE, generator=generator())
    n, ids = SHAPE[0] * SHAPE[1], torch.zeros(SHAPE[0] * SHAPE[1], 1, dtype=torch.int32)
    expected = passes.scan(x, ids, None, 1.0, True)
    for other in (x.transpose(0, 1).contiguous().transpose(0, 1), x.view(1, n, -1)):
        for a, b in zip(passes.scan(other, ids, None, 1.0, True), expected, strict=True):
            assert torch.equal(a, b)
    masked = torch.ones(n, dtype=torch.bool)
    masked[::2] = False
    for a, b in zip(passes.scan(x, ids, masked, 1.0, True), expected, strict=True):
        assert torch.equal(a[masked], b[masked])


def test_scan_of_special_rows() -> None:
    z = torch.zeros(1, 5, 30)
    z[0, 0] = -INF
    z[0, 1, 25] = NAN
    z[0, 2, 7] = INF
    z[0, 3, 1:] = -INF
    z[0, 4, 10:] = -1e38
    _, log_probs, maximum, log_sum, entropy = passes.scan(
        z, torch.zeros(5, 1, dtype=torch.int64), None, 1.0, True
    )
    assert maximum[0] == log_sum[0] == -INF
    assert log_probs[:3].isnan().all() and entropy[:3].isnan().all()
    assert (maximum[3], log_sum[3], entropy[3], log_probs[3]) == (0, 0, 0, 0)
    torch.testing.assert_close(log_sum[4].exp(), torch.tensor(10.0))


@DTYPES
@pytest.mark.parametrize("inplace", [False, True])
def test_expand(dtype: torch.dtype, inplace: bool) -> None:
    x, valid = draw(dtype)
    n, v = len(valid), SHAPE[2]
    ids = torch.randint(0, v, (n, 3), generator=generator())
    ids[:, 2] = ids[:, 1]  # both betas
    ids[3, 0] = v + 5  # writes nothing
    acc = eager_dtype(dtype)
    alpha = torch.randn(n, generator=generator(1)).to(acc)
    beta = torch.randn(n, 3, generator=generator(2)).to(acc)
    alpha[valid.nonzero()[1]] = 0
    inside = ids.clamp(max=v - 1)
    found = passes.scan(x, inside, valid, SCALE, False)
    truth, eager = (
        SCALE * (alpha.to(d)[:, None] * (clean(x, valid).to(d) * SCALE).softmax(-1)).scatter_add(
            1, inside, beta.masked_fill(ids == v + 5, 0).to(d)
        )
        for d in (torch.float64, acc)
    )  # fmt: skip
    out = x if inplace else torch.full_like(x, NAN)
    passes.expand(x, ids, found[2], found[3], found[0], valid, alpha, beta, SCALE, out)
    flat = out.flatten(0, 1)
    assert flat[~valid].eq(0).all()
    judge(flat[valid], eager[valid], truth[valid], "gradient")


def test_the_gradient_of_a_word_with_all_the_mass_keeps_its_digits() -> None:
    z = torch.tensor([[[0.0, 14.0]]])
    ids = torch.tensor([[1]])
    gathered, log_probs, maximum, log_sum, _ = passes.scan(z, ids, None, 1.0, False)
    one, out = torch.ones(1), torch.empty_like(z)
    passes.expand(z, ids, maximum, log_sum, gathered, None, -one, one[:, None], 1.0, out)
    torch.testing.assert_close(out[0, 0, 1].double(), -torch.expm1(log_probs.double())[0, 0])
    assert out[0, 0, 1] > 0


def test_ids_outside_the_vocabulary_are_refused() -> None:
    x, valid = draw(torch.float32)
    ids = torch.zeros(len(valid), 2, dtype=torch.int64)
    ids[valid.nonzero()[2], 1] = SHAPE[2]
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 33\); got 33 at row"):
        passes.scan(x, ids, valid, 1.0, False)


# Two vocabularies.


def divergence_formula(z: Tensor, t: Tensor, direction: str, beta: float) -> Tensor:
    """[N] of z, t [N, V]."""
    a, b = z.log_softmax(-1), t.log_softmax(-1)
    if direction == "mixed":
        forward, reverse = (divergence_formula(z, t, d, beta) for d in ("forward", "reverse"))
        return beta * forward + (1 - beta) * reverse
    if direction == "reverse":
        return (a.exp() * (a - b)).sum(-1)
    if direction == "forward":
        return (b.exp() * (b - a)).sum(-1)
    log_m = torch.logaddexp(a + math.log(1 - beta), b + math.log(beta))
    return (beta * b.exp() * (b - log_m) + (1 - beta) * a.exp() * (a - log_m)).sum(-1)


@DTYPES
@DIRECTIONS
@pytest.mark.parametrize("inplace", [False, True])
def test_divergence(dtype: torch.dtype, direction: str, inplace: bool) -> None:
    x, valid = draw(dtype)
    words = SHAPE[2] - 4  # the student has more words than the teacher
    teacher = draw(dtype, 5)[0][..., :words]
    acc, n = eager_dtype(dtype), len(valid)
    labels = torch.randint(0, words, (n,), generator=generator())
    upstream = torch.randn(n, generator=generator(3)).to(acc)
    upstream[valid.nonzero()[1]] = 0
    values, slopes, log_probs, entropies = [], [], [], []
    for d in (torch.float64, acc):
        leaf = clean(x, valid).to(d).requires_grad_()
        z, t = leaf[:, :words] * SCALE, clean(teacher, valid).to(d) * TEACHER_SCALE
        loss = divergence_formula(z, t, direction, BETA)
        slopes += torch.autograd.grad((loss * upstream.to(d)).sum(), leaf)
        values.append(loss.detach())
        _, label, *_, entropy = scan_formulas(z.detach(), labels[:, None])
        log_probs.append(label[:, 0])
        entropies.append(entropy)
    options = SCALE, TEACHER_SCALE, direction, BETA
    got = passes.divergence(x, teacher, labels, valid, *options, True)
    out = x if inplace else torch.full_like(x, NAN)
    passes.divergence_grad(x, teacher, got[2], valid, upstream, *options, out)
    for name, result, (truth, eager) in (
        ("loss", got[0], values),
        ("log_probs", got[1], log_probs),
        ("entropy", got[3], entropies),
        ("gradient", out.flatten(0, 1), slopes),
    ):
        assert result[~valid].eq(0).all(), name
        judge(result[valid], eager[valid], truth[valid], name)
    assert got[2][:, ~valid].eq(0).all()


@pytest.mark.parametrize(("beta", "limit"), [(0.0, "forward"), (1.0, "reverse")])
def test_jsd_ends_in_the_kls(beta: float, limit: str) -> None:
    x, valid = draw(torch.float32)
    teacher = draw(torch.float32, 5)[0]
    results = []
    for direction in ("jsd", limit):
        options = 1.0, 1.0, direction, beta
        got = passes.divergence(x, teacher, None, valid, *options, False)
        out = torch.empty_like(x)
        passes.divergence_grad(x, teacher, got[2], valid, got[0], *options, out)
        results.append((*got, out))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DIRECTIONS
def test_divergence_of_special_rows(direction: str) -> None:
    z, t = (peaked_logits(1, 9, 12, generator=generator(i)) for i in range(2))
    z[0, 0], t[0, 1] = -INF, -INF
    z[0, 2, 3], t[0, 3, 3] = NAN, INF
    z[0, 4, ::2] = t[0, 4, ::2] = -INF  # words that neither has
    z[0, 5, ::2] = -INF  # the student alone has them not
    t[0, 6, ::2] = -INF
    z[0, 7, 3], t[0, 7, 3] = -1e4, -INF  # a probability that underflows, and is no -inf
    z[0, 8], t[0, 8] = -INF, -INF
    z[0, 8, 5] = t[0, 8, 5] = 1.0  # one word has all the mass of both
    valid, ones = torch.ones(9, dtype=torch.bool), torch.ones(9)
    options = 1.0, 1.0, direction, 0.5
    loss, _, statistics, entropy = passes.divergence(z, t, None, valid, *options, True)
    infinite = {"reverse": [6, 7], "forward": [5], "jsd": []}[direction]
    assert loss.isnan().nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert loss.isinf().nonzero()[:, 0].tolist() == infinite
    assert loss[8] == 0 and entropy[8] == 0
    out = torch.empty_like(z)
    passes.divergence_grad(z, t, statistics, valid, ones, *options, out)
    assert out[0, :4].isnan().any(-1).all()
    assert out[0, 8].eq(0).all() and out[0, 4].isfinite().all()
    live = [4, 5, 6, 7]
    x = z[0, live].double().requires_grad_()
    a, b = x.log_softmax(-1), t[0, live].double().log_softmax(-1)
    if direction == "jsd":
        log_m = torch.logaddexp(a, b) - math.log(2)
        terms = [torch.where(y == -INF, 0, y.exp() * (y - log_m)) for y in (a, b)]
        torch.testing.assert_close(loss[live].double(), (0.5 * sum(terms)).sum(-1).detach())
    finite = [i for i in live if i not in infinite]
    assert out[0, finite].isfinite().all()


def test_jsd_cancels_to_the_last_bit_where_one_word_has_all_the_mass() -> None:
    z = torch.full((1, 1, 500), -80.0)  # exp(-120) is 0 in float32
    z[0, 0, 7] = 40.0
    t = z * 1.1
    on = torch.ones(1, dtype=torch.bool)
    for beta in (0.1, 0.5, 0.9):
        options = 1.0, 1.0, "jsd", beta
        loss, _, statistics, _ = passes.divergence(z, t, None, on, *options, False)
        out = torch.empty_like(z)
        passes.divergence_grad(z, t, statistics, on, torch.ones(1), *options, out)
        assert abs(loss) < 1e-7 and out[0, 0, 7] == 0


# Listed words.


def listed(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [N, K] of student and teacher, of a part of their words; present, valid."""
    a, b = (
        peaked_logits(1, 8, 20, generator=generator(seed + i))[0].double().log_softmax(-1)[:, :6]
        for i in range(2)
    )
    present = torch.rand(8, 6, generator=generator(seed)) > 0.2
    present[:, :2] = True
    return a, b, present, torch.tensor([True] * 6 + [False, True])


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd", "mixed"])
@pytest.mark.parametrize("support", ["renormalized", "truncated", "tail"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_topk_rows(direction: str, support: str, beta: float) -> None:
    scores, teacher, present, valid = listed()
    for row in range(8):
        if not valid[row]:
            continue
        leaf = scores[row].clone().requires_grad_()
        p, q = leaf[present[row]], teacher[row][present[row]]
        if support == "tail":
            p, q = (torch.cat([x, (1 - x.exp().sum()).log()[None]]) for x in (p, q))
        if support == "renormalized":
            p, q = p.log_softmax(0), q.log_softmax(0)
        kls = (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()
        if direction == "jsd" and 0 < beta < 1:
            log_m = (beta * q.exp() + (1 - beta) * p.exp()).log()
            loss = (beta * q.exp() * (q - log_m) + (1 - beta) * p.exp() * (p - log_m)).sum()
        else:
            share = {"reverse": 0.0, "forward": 1.0, "jsd": 1 - beta}.get(direction, beta)
            loss = share * kls[0] + (1 - share) * kls[1]
        (slope,) = torch.autograd.grad(loss, leaf)
        got, got_slope = passes.topk_rows(
            scores, scores, teacher, present, valid, direction, support, beta
        )
        torch.testing.assert_close(got[0, row], loss.detach())
        torch.testing.assert_close(got_slope[row], slope)
        torch.testing.assert_close(got[1, row], scores[row][present[row]].exp().sum())
        torch.testing.assert_close(got[2, row], teacher[row][present[row]].exp().sum())
        torch.testing.assert_close(got[3, row], torch.minimum(p.exp(), q.exp()).sum().detach())
    assert got[:, ~valid].eq(0).all() and got_slope[~valid].eq(0).all()


def test_topk_rows_of_a_mass_that_one_side_has_not() -> None:
    """At the ends of beta the KL that has no part is not there, even where it is infinite."""
    scores, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -INF]])
    on = torch.ones(1, 2, dtype=torch.bool)
    arguments = scores, None, teacher, on, on[:, 0]
    for direction, reverse in (("jsd", 1.0), ("mixed", 0.0)):
        assert passes.topk_rows(*arguments, direction, "renormalized", reverse)[0][0] == INF
        forward = passes.topk_rows(*arguments, direction, "renormalized", 1 - reverse)[0][0]
        torch.testing.assert_close(forward, torch.tensor([math.log(2)]))


def test_topk_support() -> None:
    ids = torch.tensor([[4, 2, 4, -1], [7, 7, 7, 1], [-1, -1, 3, 3], [5, 5, 5, 5]])
    teacher = torch.zeros(4, 4)
    teacher[1, 0] = -INF  # the second 7 is the first that is there
    teacher[2, 2:] = -INF
    valid = torch.tensor([True, True, True, False])
    words, present, supported, counts = passes.topk_support(ids, teacher, valid, 8, True, False)
    assert words.tolist() == [[4, 2, 0, 0], [0, 7, 0, 1], [0] * 4, [5, 0, 0, 0]]
    assert present.tolist() == [
        [True, True, False, False],
        [False, True, False, True],
        [False] * 4,
        [True, False, False, False],
    ]
    assert supported.tolist() == [True, True, False, False]
    assert counts.tolist() == [1.0, 2.0] and counts.dtype == torch.float32
    with pytest.raises(ValueError, match="a word twice in a row; got 4 twice in row 0"):
        passes.topk_support(ids, teacher, valid, 8, True, True)
    with pytest.raises(ValueError, match=r"lie in \[0, 7\) or be -1 .* got 7 at row 1, entry 1"):
        passes.topk_support(ids, teacher, valid, 7, True, False)


# A head's listed words.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sparse_products(dtype: torch.dtype) -> None:
    n, k, width, vocab = 11, 3, 5, 17
    hidden, weight, slope = (
        torch.randn(*shape, generator=generator(i), dtype=dtype)
        for i, shape in enumerate([(n, width), (vocab, width), (n, k)])
    )
    bias = torch.randn(vocab, generator=generator(3), dtype=dtype)
    ids = torch.randint(0, vocab, (n, k), generator=generator(4))
    valid = torch.ones(n, dtype=torch.bool)
    valid[::4] = False
    hidden[~valid] = NAN
    z = passes.head_gather(hidden, weight, bias, ids.masked_fill(~valid[:, None], -9), valid)
    assert z[~valid].eq(0).all()
    truth = (weight[ids] * hidden[:, None]).sum(-1) + bias[ids]
    torch.testing.assert_close(z[valid], truth[valid])
    ids[~valid] = vocab  # no word
    dense = torch.zeros(n, vocab + 1, dtype=dtype).scatter_add_(1, ids, slope)[:, :vocab]
    torch.testing.assert_close(passes.weigh_words(weight, ids, slope), dense @ weight)
    got = passes.sum_words(hidden, slope, *passes.by_word(ids, vocab))
    torch.testing.assert_close(got, dense.T @ hidden.nan_to_num())
    assert len(got) == vocab


def test_unknown_choices_are_refused() -> None:
    x, valid = draw(torch.float32)
    out, statistics = torch.empty_like(x), torch.zeros(5, len(valid))
    for direction in ("both", "mixed", ""):
        options = 1.0, 1.0, direction, 0.5
        with pytest.raises(ValueError, match="direction must be one of reverse, forward, jsd; got"):
            passes.divergence(x, x, None, valid, *options, False)
        with pytest.raises(ValueError, match="direction must be one of"):
            passes.divergence_grad(x, x, statistics, valid, statistics[0], *options, out)
    scores, teacher, present, valid = listed()
    arguments = scores, None, teacher, present, valid
    with pytest.raises(ValueError, match="direction must be one of reverse, forward, jsd, mixed"):
        passes.topk_rows(*arguments, "both", "tail", 0.5)
    with pytest.raises(ValueError, match="support must be one of"):
        passes.topk_rows(*arguments, "jsd", "all", 0.5)
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\]"):
        passes.topk_rows(*arguments, "jsd", "tail", 1.5)
