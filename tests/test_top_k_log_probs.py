"""`top_k_log_probs` and `linear_top_k_log_probs`: which words, in which order, and their values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from support.heads import draw_head
from support.judge import EACH_BACKEND, EACH_FUSED, FUSED
from support.numerics import assert_as_good_as
from support.problems import peaked_logits
from torch import Tensor

import drift_gate as dg
from drift_gate.measure import peak_bytes
from drift_gate.passes import native
from drift_gate.passes import torch as plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below a vector of 64, at its borders, and one word beyond a tile of 2048: more words than the
# candidates that are kept while a row is read, and fewer.
VOCABS = (1, 5, 64, 65, 2049, 5000)
KINDS = ("peaked", "rounded", "zeros of both signs", "rising", "falling", "some -inf")


def draw(kind: str, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = peaked_logits(*shape, generator=generator)
    if kind == "rounded":
        return logits.round()
    if kind == "zeros of both signs":
        return torch.where(logits > 0, 0.0, -0.0)
    if kind in ("rising", "falling"):
        return logits.sort(-1, descending=kind == "falling").values
    if kind == "some -inf":
        kept = torch.rand(shape, generator=generator) < 0.01
        kept[..., 0] = True
        return logits.where(kept, -torch.inf)
    return logits


def by_hand(row: list[float], k: int) -> list[int]:
    """Sorted by logit, then by id."""
    words = sorted((-z, word) for word, z in enumerate(row) if z > -math.inf)
    return ([word for _, word in words] + [-1] * k)[:k]


@EACH_BACKEND
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_words_and_their_order(backend, kind, dtype):
    for vocab in VOCABS:
        logits = draw(kind, 3, vocab, seed=vocab).to(dtype)
        for k in (1, 7, 64, 300):
            ids = dg.top_k_log_probs(logits, k, temperature=0.7, backend=backend).ids
            assert ids.tolist() == [by_hand(row, k) for row in logits.tolist()], (vocab, k)


@EACH_FUSED
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_error_budget(backend, temperature, dtype):
    backend = "torch" if dtype == torch.float64 else backend
    logits = draw("peaked", 4, 50, 3000).to(dtype)
    options = {"k": 40, "temperature": temperature}
    got = dg.top_k_log_probs(logits, **options, backend=backend)
    eager = dg.top_k_log_probs(logits, **options, backend="reference")
    truth = dg.top_k_log_probs(logits.double(), **options, backend="reference")
    assert got.ids.dtype == torch.int64
    assert torch.equal(got.ids, truth.ids) and torch.equal(eager.ids, truth.ids)
    assert_as_good_as(got.log_probs, eager.log_probs, truth.log_probs)
    by_sorting = (logits.double() / temperature).log_softmax(-1).topk(40).values
    torch.testing.assert_close(truth.log_probs, by_sorting)


@EACH_BACKEND
def test_large_offsets_cost_no_digits(backend):
    logits = draw("peaked", 50, 300).bfloat16().float() + 4096
    got = dg.top_k_log_probs(logits, 9, backend=backend)
    truth = dg.top_k_log_probs(logits.double(), 9, backend="reference")
    torch.testing.assert_close(got.log_probs.double(), truth.log_probs, rtol=1e-6, atol=1e-6)


def case(backend: str) -> tuple[Tensor, Tensor, Tensor, dg.TopKOutput]:
    """Student's and teacher's logits and a mask, and the teacher's lists: some words have no mass,
    and some rows are not wanted."""
    teacher, student = draw("some -inf", 4, 9, 700), draw("peaked", 4, 9, 700, seed=1)
    mask = torch.arange(36).view(4, 9) % 5 > 0
    teacher[~mask] = torch.nan
    return student, mask, teacher, dg.top_k_log_probs(
        teacher, 12, response_mask=mask, backend=backend
    )  # fmt: skip


@EACH_BACKEND
def test_entries_without_a_word(backend):
    _, mask, teacher, found = case(backend)
    assert (found.ids[~mask] == -1).all() and (found.log_probs[~mask] == -torch.inf).all()
    assert torch.equal(found.ids == -1, found.log_probs == -torch.inf)
    finite = (teacher > -torch.inf).sum(-1)[mask]
    assert torch.equal((found.ids >= 0).sum(-1)[mask], finite.clamp(max=12))
    assert (finite < 12).any()
    more = dg.top_k_log_probs(draw("peaked", 2, 5), 8, backend=backend)
    assert (more.ids[:, 5:] == -1).all() and (more.log_probs[:, 5:] == -torch.inf).all()
    assert torch.equal(more.ids[:, :5].sort(-1).values, torch.arange(5).expand(2, 5))
    torch.testing.assert_close(more.log_probs.exp().sum(-1), torch.ones(2))


@EACH_BACKEND
def test_the_lists_go_into_topk_loss(backend):
    """As those of a teacher whose every word is listed, its logits -inf where they are not."""
    student, mask, teacher, found = case(backend)
    options = {"gate": None, "response_mask": mask, "support": "truncated", "validate": True}
    loss = dg.topk_loss(student, None, None, *found, direction="forward", **options).loss
    log_q, log_p = teacher.log_softmax(-1), student.log_softmax(-1)
    kept = log_q >= found.log_probs.where(found.ids >= 0, torch.inf).amin(-1, keepdim=True)
    terms = torch.where(kept & (log_q > -torch.inf), log_q.exp() * (log_q - log_p), 0)
    torch.testing.assert_close(loss, terms.sum(-1)[mask].mean())


@EACH_BACKEND
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_without_a_softmax_is_nan(backend, bad):
    logits = draw("peaked", 2, 70)
    logits[0, slice(None) if bad < 0 else 69] = bad
    found = dg.top_k_log_probs(logits, 4, backend=backend)
    assert found.ids[0].tolist() == [0, 1, 2, 3] and found.log_probs[0].isnan().all()
    assert torch.equal(found.ids[1], dg.top_k_log_probs(logits[1:], 4).ids[0])
    loss = dg.topk_loss(logits[[1, 1]], None, None, *found, gate=None, backend=backend).loss
    assert loss.isnan()
    more = dg.top_k_log_probs(logits[:1, -3:] * bad, 5, backend=backend)
    assert more.ids.tolist() == [[0, 1, 2, -1, -1]]
    assert more.log_probs[0, :3].isnan().all() and (more.log_probs[0, 3:] == -torch.inf).all()


@EACH_FUSED
def test_layouts_shapes_and_masks(backend):
    logits = draw("rounded", 3, 4, 5, 130).bfloat16()
    whole = dg.top_k_log_probs(logits, 6, backend=backend)
    assert whole.ids.shape == whole.log_probs.shape == (3, 4, 5, 6)
    for view in (logits[1, 2, 3], logits[:, 1:3, ::2], logits.transpose(0, 1)[1, :, :4]):
        found = dg.top_k_log_probs(view, 6, backend=backend)
        wanted = dg.top_k_log_probs(view.contiguous(), 6, backend="reference")
        assert torch.equal(found.ids, wanted.ids)
        torch.testing.assert_close(found.log_probs, wanted.log_probs)
    none = dg.top_k_log_probs(logits[:0], 6, backend=backend)
    assert none.ids.shape == none.log_probs.shape == (0, 4, 5, 6)
    mask = torch.ones(3, 4, 5)
    mask[1] = 0
    for dtype in (torch.bool, torch.int32, torch.float32):
        found = dg.top_k_log_probs(logits, 6, response_mask=mask.to(dtype), backend=backend)
        assert torch.equal(found.ids, torch.where(mask[..., None] > 0, whole.ids, -1))


@EACH_BACKEND
def test_nothing_gets_a_gradient_and_nothing_changes(backend):
    logits = draw("peaked", 3, 70).requires_grad_()
    before = logits.detach().clone()
    found = dg.top_k_log_probs(logits, 4, backend=backend)
    problem = draw_head("opd", 2, 9)
    hidden, weight = problem.hidden.requires_grad_(), problem.weight.requires_grad_()
    through = dg.linear_top_k_log_probs(hidden, weight, 4, backend=backend)
    assert type(found) is type(through) is dg.TopKOutput
    assert not any(x.requires_grad for x in (*found, *through))
    assert torch.equal(logits, before) and logits._version == 0


HEADS: list[dict[str, Any]] = [{}, {"softcap": 3.0, "logit_scale": 0.3}, {"chunk_size": 7}]


@EACH_FUSED
@pytest.mark.parametrize("options", HEADS, ids=str)
def test_through_a_head(backend, options):
    """As of the logits that the head makes; what is not wanted is in no product."""
    problem = draw_head("opd", 2, 30, **options).to(torch.float64)
    head = problem.head
    mask = torch.arange(60).view(2, 30) % 4 > 0
    z = problem.hidden @ head.weight.T + head.bias
    if head.softcap:
        z = head.softcap * torch.tanh(z / head.softcap)
    wanted = dg.top_k_log_probs(
        z * head.logit_scale, 5, temperature=1.3, response_mask=mask, backend="reference"
    )
    hidden = torch.where(mask[..., None], problem.hidden, torch.nan)
    asked = {"temperature": 1.3, "response_mask": mask}
    found = dg.linear_top_k_log_probs(hidden, head, 5, **asked, backend="torch")
    reference = dg.linear_top_k_log_probs(hidden, head, 5, **asked, backend="reference")
    for each in (found, reference):
        assert torch.equal(each.ids, wanted.ids)
        torch.testing.assert_close(each.log_probs, wanted.log_probs)
    short = problem.to(torch.bfloat16)
    rows = short.hidden, short.head, 5
    found = dg.linear_top_k_log_probs(*rows, backend=backend)
    of_ids = reference_log_probs(*rows[:2], found.ids)
    torch.testing.assert_close(found.log_probs, of_ids, rtol=0.02, atol=0.02)


def reference_log_probs(hidden: Tensor, head: dg.Head, ids: Tensor) -> Tensor:
    z, lse = dg.linear_gather_lse(hidden, head, ids, backend="reference")
    return (z - lse[..., None]).detach()


@EACH_FUSED
def test_float32_logits_of_a_short_head(backend):
    """Words that bfloat16 logits cannot tell apart are in the order of the product's sums."""
    short = draw_head("opd", 2, 30).to(torch.bfloat16)
    head = dataclasses.replace(short.head, logits_dtype=torch.float32)
    wide = dataclasses.replace(short.head, weight=head.weight.double(), bias=head.bias.double())
    got = dg.linear_top_k_log_probs(short.hidden, head, 20, backend=backend)
    truth = dg.linear_top_k_log_probs(short.hidden.double(), wide, 20, backend="reference")
    rounded = dg.linear_top_k_log_probs(short.hidden, short.head, 20, backend=backend)
    assert torch.equal(got.ids, truth.ids) and not torch.equal(rounded.ids, truth.ids)
    torch.testing.assert_close(got.log_probs.double(), truth.log_probs, rtol=1e-5, atol=1e-5)


def test_autocast_casts_the_head():
    problem = draw_head("opd", 2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = dg.linear_top_k_log_probs(problem.hidden, problem.weight, 3)
    short = problem.hidden.bfloat16(), problem.weight.bfloat16()
    assert torch.equal(found.log_probs, dg.linear_top_k_log_probs(*short, 3).log_probs)


@EACH_FUSED
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_extra_memory_does_not_grow_with_rows(backend, linear):
    """But for the lists and what orders them."""
    peaks, k, words = [], 4, 30_000
    weight = draw("peaked", words, 8).bfloat16()
    for rows in (64, 256):
        hidden = draw("peaked", rows, 8).bfloat16()
        with peak_bytes() as whole:
            logits = hidden @ weight.T
        if linear:
            head = dg.Head(weight, chunk_size=16)
            with peak_bytes() as memory:
                dg.linear_top_k_log_probs(hidden, head, k, backend=backend)
        else:
            with peak_bytes() as memory:
                dg.top_k_log_probs(logits, k, backend=backend)
        peaks.append(memory.peak)
    assert peaks[1] - peaks[0] <= 192 * (k + 1) * 60 < 0.02 * whole.peak


@EACH_FUSED
def test_any_number_of_threads_gives_the_same_bits(backend):
    logits = draw("rounded", 40, 9000).bfloat16()
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(dg.top_k_log_probs(logits, 30, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@pytest.mark.skipif("native" not in FUSED, reason="there is no compiled library")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 60, 63, 64, 65, 5000])
def test_the_pass_in_c_is_that_of_torch(dtype, k):
    """Its candidates are 256 up to 63 words, then four times as many, at most the row."""
    for kind in KINDS:
        logits = draw(kind, 2, 3, 5000, seed=k).to(dtype)
        valid = torch.arange(6) % 3 > 0
        (ids, values, log_sum), (*lists, other) = (
            run.select(logits, k, valid, 0.7) for run in (native, plain)
        )
        assert torch.equal(ids, lists[0]) and torch.equal(values, lists[1])
        torch.testing.assert_close(log_sum, other)


def test_bad_arguments():
    logits = draw("peaked", 2, 9, 30)
    for k, said in ((0, "at least 1; got 0"), (-3, "at least 1; got -3")):
        with pytest.raises(ValueError, match=f"^k must be {said}"):
            dg.top_k_log_probs(logits, k)
    for k in (2.0, True, "3"):
        with pytest.raises(TypeError, match="^k must be an int; got "):
            dg.top_k_log_probs(logits, k)
    with pytest.raises(ValueError, match="temperature must be finite and greater than 0"):
        dg.top_k_log_probs(logits, 3, temperature=0)
    with pytest.raises(ValueError, match="response_mask must have the shape of logits without V"):
        dg.top_k_log_probs(logits, 3, response_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match="response_mask must hold 0 and 1 alone|be 0 or 1"):
        dg.top_k_log_probs(logits, 3, response_mask=torch.full((2, 9), 0.5))
    with pytest.raises(TypeError, match="response_mask must be a torch.Tensor; got list"):
        dg.top_k_log_probs(logits, 3, response_mask=[1, 1])
    with pytest.raises(ValueError, match="logits must be contiguous in their last dimension"):
        dg.top_k_log_probs(logits.transpose(1, 2), 3)
    with pytest.raises(TypeError, match="logits must be a floating-point tensor"):
        dg.top_k_log_probs(logits.long(), 3)
    problem = draw_head("opd", 2, 9)
    with pytest.raises(ValueError, match="^k must be at least 1; got 0"):
        dg.linear_top_k_log_probs(problem.hidden, problem.head, 0)
    with pytest.raises(ValueError, match="must have the shape of hidden_states without H"):
        dg.linear_top_k_log_probs(problem.hidden, problem.head, 3, response_mask=torch.ones(9))
