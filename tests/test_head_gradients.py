"""Sums over chunks: as exact as float32 where they are kept in less, and constant memory."""

from __future__ import annotations

import pytest
import torch
from drift_gate.bench.measure import peak_bytes
from support.heads import draw_head
from torch._subclasses.fake_tensor import FakeTensorMode

from drift_gate import DriftGate, Head, linear_opd_loss, linear_topk_loss, opd_loss
from drift_gate.head import sums as head_sums
from drift_gate.head.check import HeadInputs, HeadRule, chunk_sizes
from drift_gate.head.chunks import TILE, all_rows, chunks, regular_ends
from drift_gate.head.sums import Needs, Sums, finish_sums, plan
from drift_gate.parallel.words import Shard

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)


def head_of(hidden: torch.Tensor, weight: torch.Tensor, chunk_size: int) -> HeadInputs:
    """Without bias and softcap."""
    rule = HeadRule(0.0, 1.0, chunk_size, chunk_size)
    return HeadInputs(hidden, weight, None, rule, Shard(len(weight)))


def finished(sums: Sums, factor: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Gradients of hidden states, weight and bias."""
    number = torch.tensor(factor, dtype=torch.promote_types(dtype, torch.float32))
    return finish_sums(sums.finish(), number, [dtype] * 3, "torch")


@DTYPES
def test_many_chunks_cost_no_digits(dtype):
    """200 chunks, the sums moved on the way; a float64 sum of the same rounded products."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 40, generator=generator).to(dtype)
    hidden = torch.randn(200, 8, 40, generator=generator).to(dtype)
    head = head_of(hidden.view(-1, 40), weight, 8)
    sums = Sums(head, Needs(False, True, True), True, "torch")
    truth = torch.zeros(300, 40, dtype=torch.float64)
    total = torch.zeros(300, dtype=torch.float64)
    for i, h in enumerate(hidden):
        gradient = torch.randn(8, 300, generator=generator).to(dtype)
        if i in (50, 120):
            sums.multiply(torch.tensor(0.3, dtype=torch.float64))
            truth, total = 0.3 * truth, 0.3 * total
        sums.add(slice(8 * i, 8 * i + 8), h, gradient)
        truth += gradient.T.double() @ h.double()
        total += gradient.double().sum(0)
    _, of_weight, of_bias = finished(sums, 0.7, dtype)
    for got, exact in ((of_weight, 0.7 * truth), (of_bias, 0.7 * total)):
        assert got.dtype == dtype
        error = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        # Short dtypes: a product and the result are rounded once each. A running sum in bfloat16
        # would have ten times that; in float32 and float64 each of the 200 additions rounds.
        short = torch.finfo(dtype).bits == 16
        assert error < (0.8 if short else 4) * torch.finfo(dtype).eps


@pytest.mark.parametrize("chunk_size", [64, 4], ids=["one chunk", "several"])
@pytest.mark.parametrize("kept", ["every row", "some", "none"])
def test_what_memory_held_is_in_no_gradient(kept, chunk_size, monkeypatch):
    """Memory for the sums is not cleared where it will be written whole."""
    monkeypatch.setattr(
        head_sums, "empty", lambda shape, dtype, device: torch.full(shape, 1, dtype=dtype) * 77
    )
    hidden, weight, bias = torch.randn(3, 7, 5), torch.randn(11, 5), torch.randn(11)
    labels, old, teacher = torch.randint(11, (3, 7)), torch.randn(3, 7), torch.randn(3, 7)
    mask = {"every row": torch.ones(3, 7), "some": (torch.arange(21) % 3 > 0).view(3, 7) * 1.0}
    rest = {"response_mask": mask.get(kept, torch.zeros(3, 7)), "gate": DriftGate(block_size=2)}
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    head = Head(weight, bias, chunk_size=chunk_size)
    fused = linear_opd_loss(hidden, head, labels, old, teacher, **rest).loss
    whole = opd_loss(hidden @ weight.T + bias, labels, old, teacher, **rest).loss
    got, expected = (torch.autograd.grad(loss, leaves) for loss in (fused, whole))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_summed_in_24_bits():
    """2^16 + 200 times 100, less than half of bfloat16's step there, which would stay at 2^16."""
    hidden = torch.ones(400, 2).bfloat16()
    head = head_of(hidden, torch.zeros(3, 2).bfloat16(), 2)
    sums = Sums(head, Needs(False, True, False), True, "torch")
    assert [x.dtype for x in sums.tensors[1:3]] == [torch.bfloat16, torch.uint8]
    sums.add(slice(0, 1), hidden[:1], torch.full((1, 3), 2.0**16).bfloat16())
    for i in range(200):
        sums.add(slice(i, i + 1), hidden[:1], torch.full((1, 3), 100.0).bfloat16())
    _, grad, _ = finished(sums, 2.0**-8, torch.bfloat16)
    assert (grad == torch.tensor((2.0**16 + 20_000) / 2**8).bfloat16()).all()


def test_sums_in_24_bits_lean_to_neither_side():
    """64 additions that drop their lowest bits would take 2e-4 off the 4096 sums."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.eye(64).bfloat16()
    head = head_of(hidden, torch.zeros(64, 64).bfloat16(), 1)
    sums = Sums(head, Needs(False, True, False), True, "torch")
    exact = torch.zeros(64, 64, dtype=torch.float64)
    for _ in range(64):
        gradient = torch.exp2(-12 * torch.rand(64, 64, generator=generator)).bfloat16()
        exact += gradient.t().double()
        sums.add(slice(0, 64), hidden, gradient)
    _, grad, _ = finished(sums, 1.0, torch.bfloat16)
    errors = grad.double() / exact - 1
    deviation = 2.0**-8 / 12**0.5 / len(errors.flatten()) ** 0.5  # of a mean of roundings
    assert errors.mean().abs() < 4 * deviation


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38, 1e-40, -0.0])
def test_extreme_sums_survive(value):
    hidden = torch.tensor([[1.0, 0.0]]).bfloat16()
    head = head_of(hidden.expand(4, 2), torch.zeros(3, 2).bfloat16(), 1)
    sums = Sums(head, Needs(False, True, False), True, "torch")
    for gradient in (value, 0.0):
        sums.add(slice(0, 1), hidden, torch.full((1, 3), gradient).bfloat16())
    _, grad, _ = finished(sums, 1.0, torch.bfloat16)
    expected = torch.full((3,), value).bfloat16()
    torch.testing.assert_close(grad[:, 0], expected, equal_nan=True, rtol=0, atol=1e-40)


def test_chunks_hold_whole_blocks_of_valid_rows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        valid = torch.rand(90, generator=generator) < 0.8
        leaders = (torch.arange(90) // 7 * 7).where(valid, -1)
        for size in (7, 12, 30, 200):
            parts = chunks(valid, size, leaders)
            index = [x for part in parts for x in torch.arange(90)[part].tolist()]
            assert index == valid.nonzero()[:, 0].tolist()
            seen = [set(leaders[part].tolist()) for part in parts]
            assert all(len(part) for part in seen)
            assert sum(map(len, seen)) == len(set.union(set(), *seen))
            assert all(len(torch.arange(90)[part]) <= size for part in parts)
    assert chunks(torch.ones(90, dtype=torch.bool), 6, torch.arange(90) // 7 * 7) is None
    assert chunks(torch.zeros(9, dtype=torch.bool), 6, torch.full((9,), -1)) == []


def lengths(parts: list[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


def test_chunks_are_few_and_alike_and_whole_tiles():
    assert lengths(all_rows(8192, 2208)) == [2048] * 4
    assert lengths(all_rows(65_536, 8192)) == [8192] * 8
    assert lengths(all_rows(9000, 2208)) == [2048] * 4 + [808]
    assert lengths(all_rows(100, 40)) == [40, 40, 20]
    for n in (0, 1, 300, 4097):
        for size in (7, TILE, 1000):
            parts = all_rows(n, size)
            assert sum(lengths(parts)) == n and len(parts) == -(-n // size)
            assert all(0 < rows <= size for rows in lengths(parts))


def test_ends_of_regular_blocks_are_known_beforehand():
    """The same chunks as from the device's answer."""
    for n, length, block in ((90, 30, 7), (64, 64, 8), (60, 20, 20)):
        rows = torch.arange(n)
        leaders = rows // length * length + rows % length // block * block
        for size in (8, 20, 33):
            known = all_rows(n, size, regular_ends(n, length, block))
            assert known == chunks(torch.ones(n, dtype=torch.bool), size, leaders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["opd", "lsm", "tail", "full"])
def test_extra_memory_does_not_grow_with_the_rows(form, dtype):
    """Beyond hidden states, gradients and [N, K] data: 256 rows in 4 chunks, 1024 in 16."""
    extra = []
    for rows in (256, 1024):
        options = {"chunk_size": 64}
        if form in ("lsm", "tail"):
            options["support"] = "renormalized" if form == "lsm" else "tail"
        kind = form if form in ("opd", "full") else "topk"
        problem = draw_head(kind, rows, vocab=8000, softcap=None, dtype=dtype, **options)
        leaves = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
        with peak_bytes() as memory:
            head = problem.head_of(leaves[1])
            result = problem.function(leaves[0], head, *problem.rest, **problem.options)
            grads = torch.autograd.grad(result.loss, leaves)
        row_data = rows * (24 * 4 + 40 * 4 * 8)  # H and some tens of [N, K] float32
        extra.append(memory.peak - sum(x.nbytes for x in grads) - row_data)
    assert extra[1] <= extra[0] + 50_000
    chunk = 64 * 8000 * dtype.itemsize
    others = 2 * chunk if form == "full" else chunk  # the teacher's logits; or scratch
    assert extra[0] <= chunk + others + 8000 * 24 * 4 + 3_000_000


def test_nothing_of_the_size_of_the_words_where_log_probs_are_given():
    problem = draw_head("topk", 200, vocab=50_000, width=8, softcap=None)
    leaves = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    with peak_bytes() as memory:
        loss = linear_topk_loss(*leaves, *problem.rest, log_probs=problem.rest[1]).loss
        grads = torch.autograd.grad(loss, leaves)
    assert memory.peak - sum(x.nbytes for x in grads) < 200 * 50_000 * 4 / 20


def test_the_logits_are_never_whole():
    problem = draw_head("opd", 2048, vocab=5000, bias=False, softcap=None, chunk_size=64)
    leaves = [x.requires_grad_() for x in (problem.hidden, problem.weight)]
    with peak_bytes() as memory:
        result = linear_opd_loss(problem.hidden, problem.head, *problem.rest)
        torch.autograd.grad(result.loss, leaves)
    assert memory.peak < 2048 * 5000 * 4 / 5


def test_what_a_gpu_holds_at_the_size_of_the_targets():
    """By shapes alone: H = 4096, V = 151,936 in bfloat16, at the default chunks."""
    gib, needs = 2**30, Needs(True, True, False)
    with FakeTensorMode():
        short, hidden, weight = (
            torch.empty(n, 4096, dtype=torch.bfloat16, device="cuda")
            for n in (8192, 65_536, 151_936)
        )
        rows, read = chunk_sizes("head.chunk_size", None, weight, len(weight))
        logits, scanned = (n * len(weight) * weight.itemsize for n in (rows, read))
        lists = 8192 * 64 * 64  # a few tensors of ids and of log-probs
        assert scanned + lists < 0.7 * gib  # LSM: no dense gradient
        few = plan(head_of(short, weight, rows), needs, True).empty(hidden.device)
        assert [x.dtype for x in few[:2]] == [torch.bfloat16] * 2  # the gradients themselves
        assert logits < 2.5 * gib
        many = plan(head_of(hidden, weight, rows), needs, True).empty(hidden.device)
        of_hidden, of_weight, rest, bias = many
        assert of_weight.dtype == of_hidden.dtype == torch.float32
        assert not rest.numel() and not bias.numel()
        # Beyond what is returned: while chunks are summed.
        beyond = sum(x.nbytes for x in many) - hidden.nbytes - weight.nbytes
        assert logits + beyond < 4.7 * gib
