"""Passes over lists that save others work: a label beside its row's list, a gradient without alpha.

Every backend, on the device where it runs; all bits are those of the longer way.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drift_gate.passes.backends import passes_of

BACKENDS = pytest.mark.parametrize("backend", ["torch", "native", "triton"])
# Rows are aligned, or not; of a batch that is cut out of a longer one. The last has more words than
# C keeps the owners of.
SHAPES = pytest.mark.parametrize(("vocab", "k"), [(64, 3), (99, 32), (2053, 1), (4099, 40)])


@pytest.fixture
def on(backend, request):
    """Puts tensors where the backend runs."""
    if backend != "triton":
        return lambda x: x
    device = request.getfixturevalue("kernels_on_cpu")
    return lambda x: x.to(device)


def draw(vocab: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [2, 7, V] of a longer batch, labels [14], ids [14, K] and valid [14]."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, 8, vocab, generator=generator).to(dtype)[:, 1:]
    labels = torch.randint(vocab, (14,), generator=generator)
    ids = torch.randint(vocab, (14, k), generator=generator, dtype=torch.int32)
    valid = torch.rand(14, generator=generator) < 0.7
    return logits, labels, ids, valid


@BACKENDS
@SHAPES
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_label_beside_the_list(backend, on, vocab, k, entropy, dtype):
    logits, labels, ids, valid = draw(vocab, k, dtype)
    labels[~valid] = -100  # of invalid rows, and not read
    run, (logits, labels, ids, valid) = passes_of(backend), map(on, (logits, labels, ids, valid))
    *got, now = run.scan_lists(logits, labels, ids, valid, 0.7, entropy)
    both = torch.cat([labels.masked_fill(~valid, 0)[:, None].to(ids.dtype), ids], 1)
    gathered, log_probs, *others = run.scan(logits, both, valid, 0.7, entropy)
    expected = gathered[:, 1:], log_probs[:, 1:], *others, log_probs[:, 0]
    for one, other in zip((*got, now), expected, strict=True):
        assert torch.equal(one, other) and one.is_contiguous()


@BACKENDS
def test_a_label_outside_the_vocabulary(backend, on):
    logits, labels, ids, _ = map(on, draw(64, 3, torch.float32))
    labels[9] = 64
    run = passes_of(backend)
    if backend == "triton":
        now = run.scan_lists(logits, labels, ids, None, 1.0, False)[-1]
        assert now.isnan().nonzero().flatten().tolist() == [9]
        return
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 64\); got 64 at row 9, entry 0"):
        run.scan_lists(logits, labels, ids, None, 1.0, False)


@BACKENDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alike", [False, True])
def test_a_gradient_of_labels(backend, on, masked, alike):
    """alpha is minus beta; the slopes of a sum are one number, expanded."""
    logits, labels, _, valid = draw(99, 1, torch.bfloat16)
    labels[~valid] = -100
    slope = torch.randn(14, generator=torch.Generator().manual_seed(1))
    slope = slope[:1].expand(14) if alike else slope
    run, logits, labels, slope = passes_of(backend), on(logits), on(labels), on(slope)
    rows, places = on(valid) if masked else None, labels[:, None]
    gathered, _, maximum, log_sum, _ = run.scan(logits, places.clamp(min=0), None, 0.7, False)
    statistics = maximum, log_sum, gathered, rows
    got, expected = (torch.full_like(logits, torch.nan) for _ in range(2))
    run.expand_labels(logits, labels, *statistics, slope, 0.7, got)
    beta = slope[:, None].contiguous()
    run.expand(logits, places, *statistics, -slope.contiguous(), beta, 0.7, expected)
    assert torch.equal(got, expected)


@BACKENDS
@SHAPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_without_alpha(backend, on, vocab, k, masked, dtype):
    """None for alpha is alpha 0: nothing but the listed words, and no statistics are read."""
    logits, _, ids, valid = draw(vocab, k, dtype)
    ids[3] = ids[3, 0]  # one word, listed again and again
    ids[5, 0] = -1  # no word
    ids[6, k // 2 :] = ids[6, : k - k // 2].clone()  # all of them twice
    beta = torch.randn(14, k, generator=torch.Generator().manual_seed(1))
    run, logits, ids, beta = passes_of(backend), on(logits), on(ids), on(beta)
    rows = on(valid) if masked else None
    zeros = torch.zeros(14, device=beta.device)
    statistics = zeros, zeros, torch.zeros_like(beta)
    got, expected = (torch.full_like(logits, torch.nan) for _ in range(2))
    run.expand(logits, ids, None, None, None, rows, None, beta, 0.7, got)
    run.expand(logits, ids, *statistics, rows, zeros, beta, 0.7, expected)
    assert torch.equal(got, expected)
    whole = torch.zeros(14, vocab, dtype=torch.float64)
    for row in range(14):
        for id_, b in zip(ids[row].tolist(), beta[row].tolist(), strict=True):
            if id_ >= 0 and (valid[row] or not masked):
                whole[row, id_] += 0.7 * b
    torch.testing.assert_close(got.flatten(0, 1).cpu(), whole.to(dtype))
