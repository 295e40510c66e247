"""`select` on Triton kernels beside plain PyTorch's, on a GPU or checked on the CPU."""

from __future__ import annotations

import pytest
import torch
from drift_gate.kernels import select as module
from drift_gate.kernels.select import select
from support.problems import peaked_logits
from torch import Tensor

from drift_gate import top_k_log_probs
from drift_gate.passes import torch as plain

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = [
    ("peaked", BF16), ("peaked", FP32), ("rounded", FP16), ("rising", BF16), ("some -inf", FP32),
]  # fmt: skip
BLOCK = 64  # words of a tile here, so that few words make several of them


def draw(kind: str, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = peaked_logits(*shape, generator=generator)
    if kind == "rounded":
        return logits.round()
    if kind == "zeros of both signs":
        return torch.where(logits > 0, 0.0, -0.0)
    if kind == "rising":
        return logits.sort(-1).values
    if kind == "some -inf":
        kept = torch.rand(shape, generator=generator) < 0.05
        kept[..., -1] = True
        return logits.where(kept, -torch.inf)
    return logits


def check(logits: Tensor, k: int, valid: Tensor | None = None) -> None:
    """The very lists of plain PyTorch, on the device of the logits."""
    mask = None if valid is None else valid.to(logits.device)
    ids, values, log_sum = (x.cpu() for x in select(logits, k, mask, 0.7))
    wanted = plain.select(logits.cpu(), k, valid, 0.7)
    assert torch.equal(ids, wanted[0]) and torch.equal(values, wanted[1])
    torch.testing.assert_close(log_sum, wanted[2])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "COLUMNS", BLOCK)
    monkeypatch.setattr(module, "WORDS", BLOCK)
    monkeypatch.setattr(module, "CAPACITY", 32)  # which rows of equal logits need more than


@pytest.mark.parametrize(("kind", "dtype"), KINDS, ids=str)
def test_lists(kernels_on_cpu, small_tiles, kind, dtype):
    """Three tiles and a part, one word, a list of a quarter of the columns, one beyond the row."""
    for vocab, k in ((200, 16), (9, 12), (1, 1)):
        check(draw(kind, 1, 2, vocab).to(dtype).to(kernels_on_cpu), k)


def test_more_equal_logits_than_are_kept(kernels_on_cpu, small_tiles):
    """Of both zeros the first ones, behind a larger logit that comes last."""
    logits = draw("zeros of both signs", 1, 2, 100)
    logits[0, 1, -1] = 1
    check(logits.to(kernels_on_cpu), 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts_and_masks(kernels_on_cpu, small_tiles, dtype):
    """Rows that begin anywhere, NaN around them; what is not valid holds NaN, too."""
    around = torch.full((3, 3, 141), torch.nan).to(dtype)
    logits = around[:, 1:, 3:133]
    logits.copy_(draw("rounded", 3, 2, 130))
    valid = torch.tensor([True, False, True, True, False, True])
    logits[~valid.view(3, 2)] = torch.nan
    moved = around.to(kernels_on_cpu)[:, 1:, 3:133]
    check(moved, 7, valid)
    check(moved.transpose(0, 1), 7, valid.view(3, 2).T.flatten())


def test_rows_a_few_at_a_time(kernels_on_cpu, small_tiles, monkeypatch):
    monkeypatch.setattr(module, "SCRATCH", 96)  # words: of three rows
    check(draw("peaked", 2, 4, 130).to(kernels_on_cpu), 5)


def test_as_shipped(kernels_on_cpu):
    """Two tiles and a part."""
    check(draw("peaked", 1, 2, 9000).bfloat16().to(kernels_on_cpu), 64)


def test_rows_without_a_softmax(kernels_on_cpu, small_tiles):
    logits = draw("peaked", 4, 130)
    logits[0, 100], logits[1, 3], logits[2] = torch.nan, torch.inf, -torch.inf
    found = top_k_log_probs(logits.to(kernels_on_cpu), 6, backend="triton")
    wanted = top_k_log_probs(logits, 6, backend="reference")
    assert torch.equal(found.ids.cpu(), wanted.ids)
    torch.testing.assert_close(found.log_probs.cpu(), wanted.log_probs, equal_nan=True)
    assert found.log_probs[:3].isnan().all()
    log_sum = select(logits[None].to(kernels_on_cpu), 6, None, 1.0)[2]
    assert log_sum[2] == -torch.inf  # which a shard of the words has no say with


def test_long_lists_go_another_way(kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 4)
    logits = draw("rounded", 2, 130).to(kernels_on_cpu)
    mask = torch.tensor([True, False])
    for k in (4, 5):
        found = top_k_log_probs(logits, k, response_mask=mask.to(logits.device), backend="triton")
        wanted = top_k_log_probs(logits.cpu(), k, response_mask=mask, backend="reference")
        assert torch.equal(found.ids.cpu(), wanted.ids)
        torch.testing.assert_close(found.log_probs.cpu(), wanted.log_probs)
