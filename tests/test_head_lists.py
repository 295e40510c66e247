"""Gradients of listed words of a head: sums in the order of the words, and dense products."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from support.heads import assert_same_budget, draw_head, run_head

import drift_gate as dg
from drift_gate.head import sparse
from drift_gate.passes import torch as plain

SHAPE = 4, 100
RULE = sparse.products_are_faster
BACKENDS = pytest.mark.parametrize("backend", ["torch", "native"])


@pytest.fixture(params=[True, False], ids=["products", "words"], autouse=True)
def products(request):
    """Whether the sums are dense products, whatever the shape."""
    with mock.patch.object(sparse, "products_are_faster", return_value=request.param):
        yield request.param


@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("chunk_size", [None, 128])  # three chunks: a third of 24 bits in bfloat16
@pytest.mark.parametrize("softcap", [None, 6.0])
@BACKENDS
def test_float32(backend, softcap, chunk_size, masked):
    problem = draw_head("topk", *SHAPE, masked=masked, softcap=softcap, temperature=1.3)
    problem.rest[2][0, 3, 1] = -1
    problem.rest[2][1, 5] = -1  # a row that lists nothing
    assert_same_budget(problem, backend, chunk_size=chunk_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BACKENDS
def test_short_dtypes(backend, dtype):
    problems = [draw_head("topk", *SHAPE, seed=seed, dtype=dtype) for seed in range(8)]
    assert_same_budget(problems, backend, metrics=False, chunk_size=128)


@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd", "mixed"])
@pytest.mark.parametrize("mode", ["token-mean", "none"])
def test_float64_is_exact(direction, mode):
    problem = draw_head("topk", *SHAPE, masked=0.2, direction=direction, reduction=mode, beta=0.3)
    problem = problem.to(torch.float64)
    upstream = torch.linspace(-1, 1, 400).double().view(SHAPE) if mode == "none" else None
    (_, got), (_, truth) = (
        run_head(problem, backend, upstream, chunk_size=128) for backend in ("torch", "reference")
    )
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-14)


@BACKENDS
def test_rows_that_do_not_count_may_hold_anything(backend):
    problem = draw_head("topk", *SHAPE, masked=0.3, softcap=None, gate=None)
    weights = torch.ones(SHAPE)
    weights[:, ::7] = 0
    _, expected = run_head(problem, backend, row_weights=weights)
    problem.hidden[~problem.options["response_mask"] | (weights == 0)] = torch.nan
    result, grads = run_head(problem, backend, row_weights=weights)
    assert result.loss.isfinite() and all(map(torch.equal, grads, expected))


@BACKENDS
def test_ids_listed_twice_add_up(backend):
    """Of `linear_gather_lse`, which has no other gradient here; some entries have none."""
    problem = draw_head("opd", 2, 70, logit_scale=0.7)
    ids = torch.randint(7, (2, 70, 5), generator=torch.Generator().manual_seed(0))
    upstream = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
    upstream[0, ::3], upstream[1, :, 2] = 0, 0

    def gradients(backend, dtype):
        parts = (problem.hidden, problem.weight, problem.bias)
        leaves = [x.to(dtype).requires_grad_() for x in parts]
        head = problem.head_of(*leaves[1:])
        z, _ = dg.linear_gather_lse(leaves[0], head, ids, backend=backend)
        return torch.autograd.grad(z, leaves, upstream.to(z.dtype))

    got, truth = gradients(backend, torch.float32), gradients("reference", torch.float64)
    for one, other in zip(got, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_which_way_is_taken(products):
    problem = draw_head("topk", *SHAPE)
    with mock.patch.object(plain, "by_word", wraps=plain.by_word) as sorted_words:
        run_head(problem, "torch")
    assert sorted_words.called != products


@pytest.mark.parametrize(
    ("vocab", "k", "expected"),
    [
        (99, 32, True),  # make distill
        (256, 32, True),
        (257, 32, False),
        (151_936, 64, False),
    ],
)
def test_what_decides(vocab, k, expected):
    assert RULE(vocab, k) == expected
