"""Sparse products of a head on Triton kernels, and the `linear_` losses through the kernels."""

from __future__ import annotations

import pytest
import torch
from drift_gate.kernels import gather as gathering
from drift_gate.kernels import sparse as kernels
from support.heads import FORMS, assert_same_budget, draw_head, run_head
from support.launches import record_launches
from torch import Tensor

from drift_gate import DriftGate
from drift_gate.passes import torch as plain

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# Whole and partial tiles, of 128 to 512; less than a tile; one word.
SHAPES = [(5, 3, 40, 523), (3, 17, 9, 24), (2, 9, 1, 1)]  # rows, K, V, H


def draw(rows, k, vocab, width, dtype, device):
    """Hidden states, head, ids of which one word is listed by most rows, slopes."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype)
    weight = torch.randn(vocab, width, generator=generator).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype)
    ids = torch.randint(vocab, (rows, k), generator=generator)
    ids[:, 0] = vocab // 2
    slope = torch.randn(rows, k, generator=generator)
    return [x.to(device) for x in (hidden, weight, bias, ids, slope)]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather(kernels_on_cpu, shape, dtype):
    hidden, weight, bias, ids, _ = draw(*shape, dtype, kernels_on_cpu)
    valid = torch.arange(len(hidden), device=kernels_on_cpu) != 1
    hidden[1] = torch.nan
    for some in (bias, None):
        got = gathering.gather(hidden, weight, some, ids, valid).cpu()
        wide = [None if x is None else x.double().cpu() for x in (hidden, weight, some)]
        expected = plain.head_gather(*wide, ids.cpu(), valid.cpu())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
        assert (got[1] == 0).all()


@DTYPES
@pytest.mark.parametrize("room", [1, 1000])
def test_gather_in_slices_of_columns(kernels_on_cpu, monkeypatch, dtype, room):
    """Whole and partial slices, lists and sums; all rows at a time and one."""
    for name, value in dict(CACHE=0, SLICE=32, SLICE_ENTRIES=4, SUM_TILE=16, SCRATCH=room).items():
        monkeypatch.setattr(gathering, name, value)
    hidden, weight, bias, ids, _ = draw(5, 7, 30, 83, dtype, kernels_on_cpu)
    ids[0, 1], ids[3, 6], ids[4, 0] = -1, 30, 2**40
    valid = torch.arange(5, device=kernels_on_cpu) != 1
    hidden[1] = torch.nan
    with record_launches() as launches:
        sliced = [gathering.gather(hidden, weight, some, ids, valid) for some in (bias, None)]
    times = 2 * (1 if room == 1000 else 5)
    assert [x.name for x in launches] == ["_gather_slice", "_sum_slices"] * times
    monkeypatch.setattr(gathering, "CACHE", 1 << 40)
    for some, got in zip((bias, None), sliced, strict=True):
        whole = gathering.gather(hidden, weight, some, ids, valid)
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-4, equal_nan=True)
        assert got.isnan().sum() == 3 and (got[1] == 0).all()


def assert_rounded_once(result: Tensor, truth: Tensor) -> None:
    """Float32 sums, rounded once: within half a unit of float64, and four of float32."""
    result = result.cpu()
    room = torch.finfo(result.dtype).eps / 2 * truth.abs() + 1e-6 * truth.abs().max()
    assert ((result.double() - truth).abs() <= room).all()


def sum_words_twice(hidden: Tensor, ids: Tensor, slope: Tensor, vocab: int) -> Tensor:
    entries = kernels.by_word(ids, vocab)
    result = kernels.sum_words(hidden, slope, *entries)
    assert torch.equal(kernels.sum_words(hidden, slope, *entries), result)
    truth = plain.sum_words(
        hidden.double().cpu(), slope.double().cpu(), *plain.by_word(ids.cpu(), vocab)
    )
    assert_rounded_once(result, truth)
    return result


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_slopes(kernels_on_cpu, shape, dtype):
    hidden, weight, _, ids, slope = draw(*shape, dtype, kernels_on_cpu)
    ids[0, -1] = shape[2]  # no word
    got = kernels.weigh_words(weight, ids, slope)
    wide = weight.double().cpu(), ids.cpu(), slope.double().cpu()
    assert_rounded_once(got, plain.weigh_words(*wide))
    assert got.dtype == sum_words_twice(hidden, ids, slope, shape[2]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_entries_by_word(kernels_on_cpu, dtype):
    """Stably sorted; ids that are no words, however large, come last."""
    ids = torch.randint(5, (50, 41), generator=torch.Generator().manual_seed(0)).to(dtype)
    ids[3, 3], ids[4, 4], ids[0, 0] = -1, 5, torch.iinfo(dtype).max
    *entries, words = kernels.by_word(ids.to(kernels_on_cpu), 5)
    for got, expected in zip(entries, plain.by_word(ids, 5), strict=True):
        assert torch.equal(got.cpu(), expected)
    known = torch.where((ids < 0) | (ids > 4), 5, ids).flatten()
    assert torch.equal(words.cpu().long(), known[entries[1].cpu()].long())


@pytest.mark.parametrize("length", [1, 4, 8])
def test_words_that_many_rows_list(kernels_on_cpu, monkeypatch, length):
    """Segments of one entry; parts of two such words in one; words that fill some exactly."""
    monkeypatch.setattr(kernels, "SEGMENT", length)
    counts = [0, 9, 1, 14, 0, 8, 4, 4, 0, 37, 3, 0, 12]
    listed = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert len(listed) == 92
    generator = torch.Generator().manual_seed(1)
    ids = listed[torch.randperm(92, generator=generator)].view(23, 4)
    ids[5, 2] = -1
    hidden = torch.randn(23, 40, generator=generator)
    slope = torch.randn(23, 4, generator=generator)
    data = [x.to(kernels_on_cpu) for x in (hidden, ids, slope)]
    result = sum_words_twice(*data, len(counts))
    unlisted = torch.tensor(counts, device=kernels_on_cpu) == 0
    assert (result[unlisted] == 0).all()


def test_scratch_is_bounded():
    for rows in (1, 1000, 8192, 1 << 20):
        for width in (1, 4096, 8192):
            length = kernels.segment_length(rows * 64, width)
            assert length >= kernels.SEGMENT and length & (length - 1) == 0
            assert 2 * (rows * 64 // length) * width <= kernels.SCRATCH


def test_ids_outside_the_vocabulary_read_nothing(kernels_on_cpu):
    hidden, weight, bias, ids, slope = draw(3, 4, 9, 24, torch.float32, kernels_on_cpu)
    ids[0, 1], ids[1, 2], ids[2, 0] = -1, 9, 2**40
    valid = torch.ones(3, dtype=torch.bool, device=kernels_on_cpu)
    z = gathering.gather(hidden, weight, bias, ids, valid).cpu()
    assert z.isnan().sum() == 3 and z[0, 1].isnan() and z[2, 0].isnan()
    out = kernels.weigh_words(weight, ids, slope)
    known = (ids >= 0) & (ids < 9)
    again = kernels.weigh_words(weight, ids.where(known, 0), slope.where(known, 0))
    assert torch.equal(out, again)


def test_strided_rows(kernels_on_cpu):
    hidden, weight, bias, ids, slope = draw(4, 3, 9, 24, torch.float32, kernels_on_cpu)
    valid = torch.ones(4, dtype=torch.bool, device=kernels_on_cpu)
    apart = torch.empty(2, 9, 40, device=kernels_on_cpu).unbind()[0][:, :24].copy_(weight)
    crosswise = weight.t().contiguous().t()
    for w in (apart, crosswise):
        assert torch.equal(
            gathering.gather(hidden, w, bias, ids, valid),
            gathering.gather(hidden, weight, bias, ids, valid),
        )
        assert torch.equal(
            kernels.weigh_words(w, ids, slope), kernels.weigh_words(weight, ids, slope)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["token-mean", "none"])
def test_losses(kernels_on_cpu, form, mode):
    problem = draw_head(form, 2, 14, vocab=40, masked=0.2, reduction=mode, logit_scale=0.7)
    options = {"chunk_size": 16, "gate": None} if mode == "none" else {"chunk_size": 16}
    options.setdefault("gate", DriftGate(block_size=8))
    assert_same_budget(problem, "triton", device=kernels_on_cpu, **options)


@pytest.mark.parametrize(
    ("form", "softcap"), [("opd", None), ("opd", 6.0), ("tail", None), ("full", None)]
)
def test_losses_of_float32_logits(kernels_on_cpu, form, softcap):
    """So many problems that a truncated gradient of the weight would show."""
    options = {"chunk_size": 16, "gate": DriftGate(block_size=8)}
    if form == "tail":
        form, options["support"] = "topk", "tail"
    problems = [
        draw_head(
            form, 2, 14, vocab=40, seed=seed, dtype=torch.bfloat16, softcap=softcap,
            logits_dtype=torch.float32,
        )
        for seed in range(4)
    ]  # fmt: skip
    words = problems[0].weight.shape[1]
    assert_same_budget(
        problems, "triton", device=kernels_on_cpu, metrics=False, of_words=words, **options
    )


def test_lists_need_no_dense_product(kernels_on_cpu):
    """LSM: a scan for the drift, then K rows of the head; not even the scan with log-probs."""
    problem = draw_head("topk", 1, 12, vocab=40, bias=False).to(kernels_on_cpu)
    support = [] if kernels_on_cpu.type == "cpu" else ["_topk_support"]  # a CPU checks the values
    for known, expected in (
        (None, ["_scan", *support]),
        (problem.rest[1], [*support, "_gather"]),
    ):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        with record_launches() as forward:
            head, options = problem.head_of(leaves[1]), {"log_probs": known, **problem.options}
            result = problem.function(leaves[0], head, *problem.rest, **options, backend="triton")
        assert [x.name for x in forward] == [
            *expected,
            "_topk_rows",
            "_row_blocks",
            "_sampled_token",
            "_masses",
        ]
        with record_launches() as backward:
            result.loss.backward()
        names = [x.name for x in backward]
        assert names == ["_weigh_words", "_keys", "_sum_segments", "_sum_words"]
        _, truth = run_head(problem.to(torch.float64).to(torch.device("cpu")), "reference")
        for leaf, grad in zip(leaves, truth, strict=False):
            if known is None:
                torch.testing.assert_close(leaf.grad.cpu().double(), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("support", ["renormalized", "truncated", "tail"])
@pytest.mark.parametrize("granularity", ["block", "token"])
def test_lists_without_support_where_no_row_is_masked(kernels_on_cpu, support, granularity):
    """Which rows these are the host does not know: they are worked on, and count as masked ones."""
    problem = draw_head("topk", 2, 14, vocab=40, softcap=6.0)
    without = torch.zeros(2, 14, dtype=torch.bool)
    without[0, :2] = without[1, 5] = True
    row_weights = torch.rand(2, 14, generator=torch.Generator().manual_seed(0))
    options = dict(support=support, gate=DriftGate(granularity, block_size=4), chunk_size=16)
    problem.rest[2][0, 3, -1] = problem.rest[2][0, 4, -1] = -1  # missing
    options |= dict(ignore_index=None, row_weights=row_weights if support == "tail" else None)
    wide = problem.to(torch.float64)
    expected, truth = run_head(wide, "reference", response_mask=~without, **options)
    problem.hidden[without] = torch.nan
    problem.rest[3][without] = -torch.inf
    if support == "tail":
        options["row_weights"] = row_weights.to(kernels_on_cpu)
    got, grads = run_head(problem.to(kernels_on_cpu), "triton", **options)
    for name in ("loss", "token_loss", "log_probs", "entropy", "gate"):
        torch.testing.assert_close(
            getattr(got, name).cpu().double(), getattr(expected, name), rtol=1e-4, atol=1e-5
        )
    for grad, right in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad.cpu().double(), right, rtol=1e-3, atol=1e-5)
