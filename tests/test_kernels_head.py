"""Kernels between the products of a fused head, on a GPU or checked on the CPU."""

from __future__ import annotations

import pytest
import torch
from drift_gate.kernels import head as kernels
from torch import Tensor

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
TILE = kernels.TILE


# Sums times a factor.


@DTYPES
@pytest.mark.parametrize("n", [1, TILE, 3 * TILE + 7])  # programs with several tiles, and a part
def test_a_sum_is_rounded_once(kernels_on_cpu, monkeypatch, dtype, n):
    monkeypatch.setattr(kernels, "programs_wanted", lambda device: 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    total = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(kernels_on_cpu)
    factor = torch.tensor(0.3, device=kernels_on_cpu)
    result = kernels.finish_sum(total, factor, dtype)
    assert torch.equal(result, (total * factor).to(dtype))


@DTYPES
def test_a_factor_of_one_touches_nothing(kernels_on_cpu, dtype):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    tensors = [t.clone().to(kernels_on_cpu) for t in (x, x[:0], x.float())]
    for value in (1.0, 1.3):
        factor = torch.tensor(value, device=kernels_on_cpu)
        kernels.scale_unless_one(tensors, factor)
        assert torch.equal(tensors[0].cpu(), (x.float() * torch.tensor(value)).to(dtype))
        assert torch.equal(tensors[2].cpu(), x.float() * torch.tensor(value))


def test_rows_left_out_stay_0_where_the_factor_is_nan(kernels_on_cpu):
    x = torch.ones(4, 30, device=kernels_on_cpu)
    x[2] = 0
    factor = torch.tensor(float("nan"), device=kernels_on_cpu)
    finished = kernels.finish_sum(x, factor, torch.bfloat16)
    kernels.scale_unless_one([x], factor)
    for result in (x, finished):
        assert (result[2] == 0).all() and result[[0, 1, 3]].isnan().all()


# One pass over a chunk.


def draw(rows: int, vocab: int, dtype: torch.dtype, drift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and offsets that miss the logsumexp by a drift of this deviation."""
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, (rows, 1), generator=generator)
    noise = drift * torch.randn(rows, generator=generator)
    return logits, labels, (logits.double() * 0.7).logsumexp(-1).float() - noise


def check(logits: Tensor, ids: Tensor | None, offset: Tensor, device: torch.device, out=None):
    """E within half a unit of its dtype and what float32 arithmetic adds, the sums within that."""
    x, again = logits.clone().to(device), logits.clone().to(device)
    moved = None if ids is None else ids.to(device)
    sums, far = kernels.exp_rows(x, moved, offset.to(device), 0.7, out=out)
    repeated, _ = kernels.exp_rows(again, moved, offset.to(device), 0.7, out=out)
    assert torch.equal(sums, repeated)
    e = (x if out is None else out).cpu()
    assert out is not None or torch.equal(x, again)
    truth = torch.exp(logits.double() * 0.7 - offset.double()[:, None])
    torch.testing.assert_close(sums.cpu().double(), truth.sum(-1), rtol=3e-6, atol=0)
    known = truth if ids is None else truth.scatter(1, ids.long(), 0.0)
    info = torch.finfo(e.dtype)
    assert ((e.double() - known).abs() <= (info.eps / 2 + 4e-6) * known + info.tiny).all()
    return far.cpu()


@DTYPES
@pytest.mark.parametrize(
    "vocab",
    [
        1,
        127,
        2053,  # rows that start anywhere; a first and a last tile with masks (bf16)
        4096,  # whole tiles alone
        5000,
    ],
)
def test_exp_rows(kernels_on_cpu, dtype, vocab):
    logits, labels, offset = draw(3, vocab, dtype, 0.5)
    assert not check(logits, labels, offset, kernels_on_cpu).any()


def test_exp_rows_of_float32_logits_to_bfloat16(kernels_on_cpu):
    for vocab in (2056, 2053):
        logits, labels, offset = draw(3, vocab, torch.float32, 0.5)
        out = torch.empty(3, vocab, dtype=torch.bfloat16, device=kernels_on_cpu)
        check(logits, labels, offset, kernels_on_cpu, out)


@pytest.mark.parametrize("programs", [1, 3, 16])
def test_rows_shared_by_programs(kernels_on_cpu, monkeypatch, programs):
    """Of 5 tiles some programs get one and some none."""
    monkeypatch.setattr(kernels, "programs_wanted", lambda device: programs)
    logits, labels, offset = draw(2, 9001, torch.bfloat16, 0.5)
    check(logits, labels, offset, kernels_on_cpu)


def test_several_listed_words_and_none(kernels_on_cpu):
    logits, _, offset = draw(3, 300, torch.float32, 0.5)
    ids = logits.topk(37).indices.int()
    check(logits, ids, offset, kernels_on_cpu)
    check(logits, None, offset, kernels_on_cpu)


@pytest.mark.parametrize("k", [1, 2])
def test_ids_outside_the_vocabulary_write_nothing(kernels_on_cpu, k):
    logits, _, offset = draw(3, 133, torch.bfloat16, 0.0)
    ids = torch.tensor([[133, -1], [-1, 2**40], [2**40, 140]])[:, :k].contiguous()
    data = [x.to(kernels_on_cpu) for x in (logits, ids, offset)]
    kernels.exp_rows(*data, 0.7)
    assert (data[0] > 0).all()


def test_rows_that_are_not_valid_are_not_read(kernels_on_cpu):
    logits, labels, offset = draw(4, 1000, torch.bfloat16, 0.0)
    valid = torch.tensor([True, False, True, False])
    logits[~valid] = torch.nan
    offset[~valid] = torch.nan
    data = [x.to(kernels_on_cpu) for x in (logits, labels, offset)]
    sums, far = kernels.exp_rows(*data, 0.7, valid.to(kernels_on_cpu))
    assert (sums.cpu()[~valid] == 1).all() and not far.any()
    assert (data[0].cpu()[~valid] == 0).all() and data[0].isfinite().all()


def test_rows_whose_exponentials_are_of_no_use(kernels_on_cpu):
    """Drift of ten nats and more either way, an overflow, NaN, +inf, no mass."""
    logits, labels, offset = draw(9, 200, torch.bfloat16, 0.0)
    offset += torch.tensor([0.0, 9.9, -9.9, 10.1, -10.1, -200.0, 0.0, 0.0, 0.0])
    logits[6, 7], logits[7, 7], logits[8] = torch.nan, torch.inf, -torch.inf
    data = [x.to(kernels_on_cpu) for x in (logits, labels, offset)]
    _, far = kernels.exp_rows(*data, 0.7)
    assert far.tolist() == [False] * 3 + [True] * 6


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("drift", [0.0, 0.3, 3.0])
def test_products_with_e_are_nearer_the_truth_than_eager(kernels_on_cpu, drift):
    """grad_hidden and grad_weight: factors of a row stay out of the rounding, the label is exact.

    About 0.75 times the error of softmax gradients that are rounded whole.
    """
    rows, vocab, width = 96, 4000, 64
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, width, generator=generator) / width**0.5).bfloat16()
    lifted = 16 * torch.rand(rows, 1, generator=generator) * weight[:rows].float()
    hidden = (2 * torch.randn(rows, width, generator=generator) + lifted).bfloat16()
    z = (hidden.float() @ weight.float().T).bfloat16()
    p = z.double().softmax(-1)
    y = torch.multinomial(p.float(), 1, generator=generator)
    alpha = torch.randn(rows, 1, generator=generator).double() / rows
    gradient = (alpha * p).scatter_add(1, y, -alpha)
    truth = gradient @ weight.double(), gradient.T @ hidden.double()
    rounded = gradient.bfloat16().float()
    eager = (rounded @ weight.float()).bfloat16(), (rounded.T @ hidden.float()).bfloat16()

    noise = (drift * torch.randn(rows, generator=generator)).clamp(-9, 9)
    offset = (z.double().logsumexp(-1) - noise).float()
    e = z.clone().to(kernels_on_cpu)
    sums, far = kernels.exp_rows(e, y.to(kernels_on_cpu), offset.to(kernels_on_cpu), 1.0)
    assert not far.any()
    e, c = e.cpu().float(), alpha.float() / sums.cpu()[:, None]
    log_p = z.gather(1, y).float() - offset[:, None] - sums.cpu().log()[:, None]
    at_label = alpha.float() * log_p.expm1()
    of_hidden = c * (e @ weight.float()) + at_label * weight[y[:, 0]].float()
    of_weight = e.T @ (c * hidden.float()).bfloat16().float()
    of_weight.index_add_(0, y[:, 0], at_label * hidden.float())
    for got, wanted, exact in zip((of_hidden, of_weight), eager, truth, strict=True):
        assert relative(got.bfloat16(), exact) <= 0.85 * relative(wanted, exact)
