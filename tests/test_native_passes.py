"""The vocabulary passes in C beside those in PyTorch: entries, masks, what raises, threads."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.problems import peaked_logits

from drift_gate.passes import native
from drift_gate.passes import torch as plain
from drift_gate.passes.native import library

pytestmark = pytest.mark.skipif(
    native.instruction_set() is None, reason="there is no compiled library"
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(seed: int, words: int = 3, vocab: int = 300, dtype: torch.dtype = torch.float32):
    """Logits as a view with any strides, ids int32 or int64, a mask."""
    generator = seeded(seed)
    whole = torch.full((3, 9, vocab + 2), torch.nan).to(dtype)
    logits = whole[:, 1:8, 1 : vocab + 1]
    logits.copy_(peaked_logits(3, 7, vocab, generator=generator))
    kind = [torch.int32, torch.int64][seed % 2]
    ids = torch.randint(vocab, (21, words), generator=generator).to(kind)
    valid = torch.rand(21, generator=generator) < 0.7
    return logits, ids, valid if seed % 3 else None


def assert_close(got, expected, **tolerance):
    tolerance = tolerance or dict(rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_scan_and_gather_as_in_torch(dtype, seed):
    logits, ids, valid = drawn(seed, seed, dtype=dtype)
    got = native.scan(logits, ids, valid, 0.7, seed % 2 == 0)
    expected = plain.scan(logits, ids, valid, 0.7, seed % 2 == 0)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    gathered = native.gather(logits, ids, valid, 0.7)
    assert torch.equal(gathered, got[0])
    assert torch.equal(gathered, plain.gather(logits, ids, valid, 0.7))
    assert torch.equal(got[1], (got[0] - got[2][:, None]) - got[3][:, None])
    if valid is not None:
        assert all((x[~valid] == 0).all() for x in got if len(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [1, 2, 40, 3000])  # none can repeat, some do, more than there are
def test_expand_as_in_torch(dtype, words):
    for seed in range(6):
        logits, ids, valid = drawn(seed, words, dtype=dtype)
        generator = seeded(100 + seed)
        gathered, _, maximum, log_sum, _ = native.scan(logits, ids, valid, 1.3, False)
        alpha = torch.randn(21, generator=generator)
        beta = torch.randn(21, words, generator=generator)
        alpha[::4] = 0
        ids[3] = -1 - (seed % 2)
        ids[4] = 300 + seed  # beyond the words: nothing is written
        if valid is not None:
            alpha[~valid] = torch.nan
        row_data = ids, maximum, log_sum, gathered, valid, alpha, beta, 1.3
        got, expected = torch.full_like(logits, torch.nan), torch.full_like(logits, torch.nan)
        native.expand(logits, *row_data, got)
        plain.expand(logits, *row_data, expected)
        tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
        assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance * words**0.5)
        native.expand(logits, *row_data, logits)  # in place
        assert torch.equal(logits, got)


@pytest.mark.parametrize("vocab", [4096, 4097])  # owners are indexed, or hashed
def test_expand_sums_the_betas_of_a_word_in_any_vocabulary(vocab):
    generator = seeded(vocab)
    logits = torch.randn(1, 9, vocab, generator=generator)
    words = torch.randint(vocab, (9, 200), generator=generator)
    ids = words.gather(1, torch.randint(200, (9, 500), generator=generator))
    beta = torch.randn(9, 500, generator=generator)
    expected = torch.zeros(9, vocab).scatter_add_(1, ids, beta)
    none = None, None, None, None, None
    out = torch.full_like(logits, torch.nan)
    native.expand(logits, ids, *none, beta, 1.0, out)
    assert_close(out[0], expected, rtol=0, atol=2e-6)
    gathered, _, maximum, log_sum, _ = native.scan(logits, ids, None, 1.0, False)
    alpha = torch.randn(9, generator=generator)
    native.expand(logits, ids, maximum, log_sum, gathered, None, alpha, beta, 1.0, out)
    assert_close(out[0], expected + alpha[:, None] * logits[0].softmax(-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_shorter_gradient_is_the_float32_one_rounded(dtype):
    """As float32 logits of a head have it."""
    logits, ids, valid = drawn(1, 3)
    generator = seeded(100)
    gathered, _, maximum, log_sum, _ = native.scan(logits, ids, valid, 1.3, False)
    alpha, beta = torch.randn(21, generator=generator), torch.randn(21, 3, generator=generator)
    alpha[::4] = 0
    teacher = logits[..., :-2] + torch.randn(logits[..., :-2].shape, generator=generator)
    rows = torch.ones(21, dtype=torch.bool) if valid is None else valid
    for passes in (native, plain):
        outs = [torch.full_like(logits, torch.nan, dtype=x) for x in (torch.float32, dtype)]
        for out in outs:
            passes.expand(logits, ids, maximum, log_sum, gathered, valid, alpha, beta, 1.3, out)
        assert torch.equal(outs[0].to(dtype), outs[1])
        for direction in ("reverse", "forward", "jsd"):
            options = 1.0, 0.7, direction, 0.3
            *_, found, _ = passes.divergence(logits, teacher, None, rows, *options, False)
            for out in outs:
                out.fill_(torch.nan)
                passes.divergence_grad(logits, teacher, found, rows, alpha, *options, out)
            assert torch.equal(outs[0].to(dtype), outs[1])


def test_near_certainty_the_gradient_keeps_its_digits():
    logits = torch.tensor([[[15.0, 0.0, 1.0]]])
    ids, one = torch.tensor([[0]]), torch.ones(1)
    gathered, _, maximum, log_sum, _ = native.scan(logits, ids, None, 1.0, False)
    out = torch.empty_like(logits)
    row_data = maximum, log_sum, gathered, None, one, -one[:, None], 1.0
    native.expand(logits, ids, *row_data, out)
    truth = logits.double().softmax(-1)
    truth[..., 0] = -truth[..., 1:].sum()
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=0)


def test_nan_and_zero_alpha():
    logits, ids, _ = drawn(1, 2)
    logits[0, 0] = torch.nan  # alpha 0: not read
    gathered, _, maximum, log_sum, _ = native.scan(logits, ids, None, 1.0, False)
    alpha, beta = torch.zeros(21), torch.ones(21, 2)
    alpha[1] = torch.nan
    out = torch.empty_like(logits)
    native.expand(logits, ids, maximum, log_sum, gathered, None, alpha, beta, 2.0, out)
    rows = out.flatten(0, 1)
    assert rows[1].isnan().all() and rows[0].isfinite().all() and rows[2:].isfinite().all()
    assert rows[0].sum() == rows[0, ids[0]].sum() == 4


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_an_id_outside_the_words_raises(kind):
    logits, ids, _ = drawn(1, 4)
    ids = ids.to(kind)
    valid = torch.ones(21, dtype=torch.bool)
    ids[5, 1], ids[5, 2], ids[9, 0] = 300, -1, -7
    for function in ("scan", "gather"):
        flags = (False,) * (function == "scan")
        arguments = logits, ids, valid, 1.0, *flags
        with pytest.raises(ValueError, match="ids must") as expected:
            getattr(plain, function)(*arguments)
        with pytest.raises(ValueError, match="ids must") as got:
            getattr(native, function)(*arguments)
        assert str(got.value) == str(expected.value)
        assert "got 300 at row 5, entry 1" in str(got.value)
    valid[[5, 9]] = False
    native.scan(logits, ids, valid, 1.0, True)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divergences_as_in_torch(dtype, direction):
    for seed in range(4):
        logits, ids, valid = drawn(seed, 1, dtype=dtype)
        valid = torch.ones(21, dtype=torch.bool) if valid is None else valid
        labels = (ids[:, 0] % 200) if seed else None
        if labels is not None:
            labels[~valid] = -100
        teacher = peaked_logits(3, 7, 200, generator=seeded(50 + seed)).to(DTYPES[seed % 3])
        options = 0.8, 1.2, direction, 0.3
        arguments = logits, teacher, labels, valid, *options, seed % 2 == 0
        got = native.divergence(*arguments)
        for one, other in zip(got, plain.divergence(*arguments), strict=True):
            assert_close(one, other, rtol=2e-6, atol=4e-6)
            assert not one.numel() or (one[..., ~valid] == 0).all()
        upstream = torch.randn(21, generator=seeded(seed))
        upstream[::5] = 0
        row_data = teacher, got[2], valid, upstream, *options
        out, expected = torch.full_like(logits, torch.nan), torch.full_like(logits, torch.nan)
        native.divergence_grad(logits, *row_data, out)
        plain.divergence_grad(logits, *row_data, expected)
        tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}[dtype]
        assert_close(out.float(), expected.float(), rtol=tolerance, atol=4e-6)
        native.divergence_grad(logits, *row_data, logits)
        assert torch.equal(logits, out)


def test_jsd_at_the_ends_of_beta_is_the_limit_of_its_quotient():
    x, y = (torch.randn(1, 6, 90, generator=seeded(seed)) for seed in (0, 1))
    on = torch.ones(6, dtype=torch.bool)

    def loss(direction: str, beta: float) -> torch.Tensor:
        return native.divergence(x, y, None, on, 1.0, 1.0, direction, beta, False)[0]

    for beta, near, kl in ((0.0, 1e-4, "forward"), (1.0, 1 - 1e-4, "reverse")):
        assert torch.equal(loss("jsd", beta), loss(kl, 0.5))
        quotient = loss("jsd", near) / min(near, 1 - near)
        torch.testing.assert_close(quotient, loss(kl, 0.5), rtol=0.01, atol=0)


def test_a_label_beyond_the_teacher_and_unknown_directions_raise():
    x, on = torch.zeros(1, 2, 8), torch.ones(2, dtype=torch.bool)
    options = on, 1.0, 1.0
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 6\); got 6 at row 1, entry 0"):
        native.divergence(x, x[..., :6], torch.tensor([5, 6]), *options, "reverse", 0.5, False)
    with pytest.raises(ValueError, match="direction must be one of reverse, forward, jsd"):
        native.divergence(x, x, None, *options, "backward", 0.5, False)
    with pytest.raises(ValueError, match="direction 'mixed'"):
        native.divergence(x, x, None, *options, "mixed", 0.5, False)


# 600 words have a row; 2,100 numbers of one are a tile and a part.
@pytest.mark.parametrize(("width", "vocab"), [(5, 17), (2100, 40), (64, 600)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_sums_of_words(kind, dtype, width, vocab, threads):
    """Of entries in the order that a stable sort gives; -1 and V are no words."""
    n, k = 13, 7
    hidden = torch.randn(n, width, generator=seeded(0)).to(dtype)
    slope = torch.randn(n, k, generator=seeded(1))
    ids = torch.randint(-1, vocab + 1, (n, k), generator=seeded(2)).to(kind)
    entries = native.by_word(ids, vocab)
    for got, expected in zip(entries, plain.by_word(ids, vocab), strict=True):
        assert torch.equal(got, expected)
    found = native.sum_words(hidden, slope, *entries)
    threads(2)
    with mock.patch.object(library, "FEW_WORDS", 1):
        assert torch.equal(native.sum_words(hidden, slope, *entries), found)
    truth = plain.sum_words(hidden.double(), slope.double(), *entries)
    assert found.dtype == dtype and (found[entries[0].diff() == 0] == 0).all()
    assert_close(found, truth.to(dtype), rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


def test_any_number_of_threads_gives_the_same_bits(threads):
    logits = peaked_logits(3, 41, 9001, generator=seeded(0)).bfloat16()
    teacher = peaked_logits(3, 41, 9001, generator=seeded(1))
    ids = torch.randint(9001, (123, 5), generator=seeded(2))
    valid = torch.rand(123, generator=seeded(3)) < 0.8
    alpha, beta = torch.randn(123), torch.randn(123, 5)
    results = []
    for count in (1, 2, 3):
        threads(count)
        found = native.scan(logits, ids, valid, 0.5, True)
        gathered, _, maximum, log_sum, _ = found
        out, slopes = torch.empty_like(logits), torch.empty_like(logits)
        native.expand(logits, ids, maximum, log_sum, gathered, valid, alpha, beta, 0.5, out)
        pair = native.divergence(logits, teacher, ids[:, 0], valid, 1.0, 1.0, "jsd", 0.4, True)
        native.divergence_grad(logits, teacher, pair[2], valid, alpha, 1.0, 1.0, "jsd", 0.4, slopes)
        results.append([*found, out, *pair, slopes])
    for others in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True))


def test_an_error_is_the_first_whichever_thread_finds_it(threads):
    threads(2)
    ids = torch.zeros(400, 2, dtype=torch.int64)
    ids[77:, 1] = -5
    with pytest.raises(ValueError, match="at row 77, entry 1"):
        native.scan(torch.zeros(1, 400, 2000), ids, None, 1.0, False)


def test_tensors_that_do_not_fit_are_refused():
    x, ids = torch.zeros(1, 2, 8), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        native.scan(x, ids.short(), None, 1.0, False)
    with pytest.raises(TypeError, match="masks must be bool of 2 elements"):
        native.scan(x, ids, torch.ones(3, dtype=torch.bool), 1.0, False)
    with pytest.raises(TypeError, match="2 rows that are contiguous"):
        native.scan(x.mT.contiguous().mT, ids, None, 1.0, False)
    zero = torch.zeros(2)
    with pytest.raises(TypeError, match="row data must be float32 of 2 elements"):
        native.expand(x, ids, zero, zero, ids, None, zero.double(), ids, 1.0, x)


def test_no_rows():
    x, ids = torch.zeros(2, 0, 8), torch.zeros(0, 3, dtype=torch.int64)
    none, on = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
    found = native.scan(x, ids, None, 1.0, True)
    assert [len(part) for part in found] == [0] * 5
    native.expand(x, ids, none, none, found[0], None, none, found[0], 1.0, x)
    loss, *_ = native.divergence(x, x, None, on, 1.0, 1.0, "jsd", 0.5, True)
    assert len(loss) == 0
