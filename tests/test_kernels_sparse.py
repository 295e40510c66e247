"""Sparse products of a head on Triton kernels, and the `linear_` losses through the kernels."""

from __future__ import annotations

import pytest
import torch
from drift_gate.kernels import sparse as kernels
from support.heads import FORMS, assert_same_budget, draw_head, run_head
from support.launches import record_launches

from drift_gate import DriftGate, torch_sparse

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
        got = kernels.gather(hidden, weight, some, ids, valid).cpu()
        wide = [None if x is None else x.double().cpu() for x in (hidden, weight, some)]
        expected = torch_sparse.gather(*wide, ids.cpu(), valid.cpu())
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
        assert (got[1] == 0).all()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_slopes(kernels_on_cpu, shape, dtype):
    """float32 sums, rounded once: within half a unit of the float64 result, and four of float32."""
    hidden, weight, _, ids, slope = draw(*shape, dtype, kernels_on_cpu)
    ids[0, -1] = shape[2]  # no word
    starts, order = torch_sparse.by_word(ids, shape[2])
    got = kernels.weigh_words(weight, ids, slope), kernels.sum_words(hidden, slope, starts, order)
    wide = [x.double().cpu() for x in (hidden, weight, slope)]
    expected = (
        torch_sparse.weigh_words(wide[1], ids.cpu(), wide[2]),
        torch_sparse.sum_words(wide[0], wide[2], starts.cpu(), order.cpu()),
    )
    for result, truth in zip(got, expected, strict=True):
        result = result.cpu()
        assert result.dtype == dtype
        room = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6 * truth.abs().max()
        assert ((result.double() - truth).abs() <= room).all()
    twice = kernels.sum_words(hidden, slope, starts, order)
    assert torch.equal(twice, got[1])


def test_ids_outside_the_vocabulary_read_nothing(kernels_on_cpu):
    hidden, weight, bias, ids, slope = draw(3, 4, 9, 24, torch.float32, kernels_on_cpu)
    ids[0, 1], ids[1, 2], ids[2, 0] = -1, 9, 2**40
    valid = torch.ones(3, dtype=torch.bool, device=kernels_on_cpu)
    z = kernels.gather(hidden, weight, bias, ids, valid).cpu()
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
            kernels.gather(hidden, w, bias, ids, valid),
            kernels.gather(hidden, weight, bias, ids, valid),
        )
        assert torch.equal(
            kernels.weigh_words(w, ids, slope), kernels.weigh_words(weight, ids, slope)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["token-mean", "none"])
def test_losses(kernels_on_cpu, form, mode):
    problem = draw_head(form, 2, 14, vocab=40, masked=0.2, loss_agg_mode=mode, logit_scale=0.7)
    options = {"chunk_size": 16, "gate": None} if mode == "none" else {"chunk_size": 16}
    options.setdefault("gate", DriftGate(block_size=8))
    assert_same_budget(problem, "triton", device=kernels_on_cpu, **options)


def test_lists_need_no_dense_product(kernels_on_cpu):
    """LSM: a scan for the drift, then K rows of the head; not even the scan with log-probs."""
    problem = draw_head("topk", 1, 12, vocab=40, bias=False).to(kernels_on_cpu)
    for known, expected in (
        (None, ["_scan"]),
        (problem.rest[1], ["_gather"]),
    ):
        leaves = [x.clone().requires_grad_() for x in (problem.hidden, problem.weight)]
        with record_launches() as forward:
            result = problem.function(
                *leaves, *problem.rest, **problem.options, log_probs=known, backend="triton"
            )
        assert [x.name for x in forward] == [
            *expected,
            "_topk_rows",
            "_row_blocks",
            "_sampled_token",
        ]
        with record_launches() as backward:
            result.loss.backward()
        assert [x.name for x in backward] == ["_weigh_words", "_sum_words"]
        _, truth = run_head(problem.to(torch.float64).to(torch.device("cpu")), "reference")
        for leaf, grad in zip(leaves, truth, strict=False):
            if known is None:
                torch.testing.assert_close(leaf.grad.cpu().double(), grad, rtol=1e-4, atol=1e-6)
