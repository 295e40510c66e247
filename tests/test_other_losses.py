"""Other losses beside those of a `GateNormalizer`: what it multiplies is its own, or refused."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
from support.parts import FORMS, Whole, draw_whole, run_part
from test_docs import blocks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import drift_gate as dg

GATE = dg.DriftGate(block_size=4)
EACH_FORM = pytest.mark.parametrize("form, linear", [*itertools.product(FORMS, (False, True))])
SUMMED = "number 0, of shape .* has one that another loss of the same backward reaches: run the"
APART = "number 0, of shape .* has one to which another backward has added: run the backward of"


def cut(whole: Whole, parts: int) -> list[Whole]:
    return [whole.take(lambda x, i=i: x.tensor_split(parts)[i]) for i in range(parts)]


def undivided(whole: Whole, form: str = "opd", linear: bool = False, gate: Any = GATE) -> Tensor:
    """The gradient of the head."""
    weight = whole.weight.clone().requires_grad_()
    run_part(whole, form, linear, weight, gate)[0].loss.backward()
    assert weight.grad is not None
    return weight.grad


def penalty(x: Tensor) -> Tensor:
    """Of a micro-batch of two."""
    return 0.01 * x.square().mean() / 2


def assert_same(found: Tensor | None, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def beside(parts: list[Whole], other: Tensor, after: bool = False) -> tuple[Tensor, Tensor]:
    """P in two micro-batches, and R in a penalty beside them: before scale_gradients or after."""
    weight, normalizer = parts[0].weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    for part in parts:
        loss = run_part(part, "opd", False, weight, normalizer)[0].loss
        (loss if after else loss + penalty(other)).backward()
    try:
        normalizer.scale_gradients([weight] if after else [weight, other])
    finally:
        if not after:
            normalizer.scale_gradients([weight])
    for _ in parts if after else ():
        penalty(other).backward()
    assert weight.grad is not None and other.grad is not None
    return weight.grad, other.grad


def test_a_parameter_that_no_distillation_loss_reaches_is_refused():
    """Its gradient would get a factor that belongs to the gates."""
    whole = draw_whole(11)
    parts = cut(whole, 2)
    other = torch.linspace(1, 2, 3, dtype=torch.float64).requires_grad_()
    with pytest.raises(
        ValueError, match=r"number 1, of shape \[3\], .* none of them reaches: leave"
    ):
        beside(parts, other)
    for got in (other.grad, beside(parts, other.detach().clone().requires_grad_(), True)[1]):
        torch.testing.assert_close(got, 2 * 0.01 * other.detach() / 3)
    grad = beside(parts, other.detach().clone().requires_grad_(), True)[0]
    torch.testing.assert_close(grad, undivided(whole))


def test_a_parameter_without_gradient_may_be_among_them():
    weight, normalizer = draw_whole().weight.requires_grad_(), dg.GateNormalizer()
    run_part(draw_whole(), "opd", False, weight, normalizer)[0].loss.backward()
    normalizer.scale_gradients([weight, torch.ones(3, requires_grad=True)])


# A parameter that both reach: the gradient is a sum, of which one part alone is to be multiplied.


def added(loss: Tensor, weight: Tensor) -> None:
    (loss + penalty(weight)).backward()


def added_before(loss: Tensor, weight: Tensor) -> None:
    total = penalty(weight)
    total += loss / 2
    (total * 2).backward()


def stacked(loss: Tensor, weight: Tensor) -> None:
    ours, theirs = torch.stack([loss, penalty(weight)]).unbind()
    (ours + 2 * theirs).backward()


def apart(loss: Tensor, weight: Tensor) -> None:
    loss.backward()
    penalty(weight).backward()


def first(loss: Tensor, weight: Tensor) -> None:
    penalty(weight).backward()
    loss.backward()


MIXED = {added: SUMMED, added_before: SUMMED, stacked: SUMMED, apart: APART, first: APART}


@EACH_FORM
@pytest.mark.parametrize("way", MIXED)
def test_a_gradient_that_is_a_sum_is_refused(form: str, linear: bool, way: Any):
    whole = draw_whole(12)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    for part in cut(whole, 2):
        way(run_part(part, form, linear, weight, normalizer)[0].loss, weight)
    with pytest.raises(ValueError, match=MIXED[way]):
        normalizer.scale_gradients(weight)


def test_a_loss_of_the_same_logits_is_refused():
    """As a router's, or a KL to another policy: it comes in where the model's graph is shared."""
    whole = draw_whole(12)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    for part in cut(whole, 2):
        logits = part.hidden @ weight.T
        result = dg.opd_loss(
            logits, part.labels, part.old, part.teacher, gate=normalizer, response_mask=part.mask
        )
        (result.loss + 0.1 * logits.logsumexp(-1).square().mean()).backward()
    with pytest.raises(ValueError, match=SUMMED):
        normalizer.scale_gradients(weight)


def test_gradients_that_were_there_before_are_refused():
    """Of a step that was not forgotten, or of the losses of another normaliser."""
    whole = draw_whole(12)
    weight = whole.weight.clone().requires_grad_()
    for normalizer in (dg.GateNormalizer(GATE), dg.GateNormalizer(dg.DriftGate(tau=2.0))):
        for part in cut(whole, 2):
            run_part(part, "opd", True, weight, normalizer)[0].loss.backward()
        if normalizer.gate is GATE:
            normalizer.scale_gradients(weight)
    with pytest.raises(ValueError, match=APART):
        normalizer.scale_gradients(weight)


def test_losses_of_two_normalisers_in_one_backward_are_refused():
    whole = draw_whole(12)
    weight = whole.weight.clone().requires_grad_()
    both = dg.GateNormalizer(GATE), dg.GateNormalizer(None)
    for part in cut(whole, 2):
        sum(run_part(part, "opd", False, weight, each)[0].loss for each in both).backward()
    for each in both:
        with pytest.raises(ValueError, match=SUMMED):
            each.scale_gradients(weight)


def test_what_is_not_multiplied_may_be_a_sum():
    """Of one micro-batch, or where neither a mean gate nor a count is wanted, the factor is 1."""
    whole = draw_whole(13)
    raw = dg.DriftGate(block_size=4, normalize="none")
    given = {"reduction": dg.Reduction(batch_num_tokens=170)}
    for parts, gate, options in ((1, GATE, {}), (2, raw, given), (2, None, given)):
        weight = whole.weight.clone().requires_grad_()
        normalizer = dg.GateNormalizer(gate)
        for part in cut(whole, parts):
            result, _ = run_part(part, "opd", False, weight, normalizer, **options)
            (result.loss + penalty(weight)).backward()
        normalizer.scale_gradients(weight)
        alone = whole.weight.clone().requires_grad_()
        run_part(whole, "opd", False, alone, gate, **options)[0].loss.backward()
        assert_same(weight.grad, alone.grad + parts * 0.01 * weight.detach() / weight.numel())


@EACH_FORM
def test_weights_are_exact_beside_any_loss(form: str, linear: bool):
    """Known beforehand, they need no factor: the one way where both reach a parameter."""
    whole = draw_whole(14)
    with torch.no_grad():
        rows = [
            {
                "log_probs": dg.linear_token_log_probs(part.hidden, part.weight, part.labels)[0],
                "old_log_probs": part.old,
                "response_mask": part.mask,
            }
            for part in cut(whole, 2)
        ]
    weight = whole.weight.clone().requires_grad_()
    reduction = dg.Reduction(batch_num_tokens=whole.mask.sum())
    for part, gate in zip(cut(whole, 2), dg.GateNormalizer(GATE).weights(rows), strict=True):
        result, _ = run_part(part, form, linear, weight, gate, reduction=reduction)
        (result.loss + penalty(weight)).backward()
    wanted = undivided(whole, form, linear) + 2 * 0.01 * weight.detach() / weight.numel()
    assert_same(weight.grad, wanted)


def test_the_page_is_exact():
    """docs/beyond_one_call.md, its loss beside one of the same logits."""
    (code,) = [x for x in blocks("beyond_one_call.md", "python") if "auxiliary(part)" in x]
    whole, weight = draw_whole(14), draw_whole(14).weight.requires_grad_()

    def logits(part: Whole) -> Tensor:
        return part.hidden @ weight.T

    def auxiliary(part: Whole) -> Tensor:
        return 0.01 * logits(part).logsumexp(-1).square().sum()

    def log_probs(part: Whole) -> Tensor:
        return dg.token_log_probs(logits(part), part.labels)[0]

    space = {**vars(dg), "torch": torch, "logits": logits, "log_probs": log_probs}
    exec(code, space | {"auxiliary": auxiliary, "micro_batches": cut(whole, 3)})
    found = weight.grad
    (other,) = torch.autograd.grad(auxiliary(whole), weight)
    assert_same(found, undivided(whole) + other)


# What is no other loss.


def scaled(loss: Tensor) -> None:
    loss /= 4
    (3 * loss.float()).backward(torch.tensor(4 / 3))


def twice(loss: Tensor) -> None:
    half = loss / 2
    half.backward(retain_graph=True)
    half.backward()


def listed(loss: Tensor) -> None:
    torch.stack([loss / 4, loss / 2, loss / 4]).sum().backward()


def functional(loss: Tensor) -> None:
    torch.autograd.backward([loss])


@EACH_FORM
@pytest.mark.parametrize("way", [scaled, listed, functional])
def test_multiples_and_sums_of_the_losses_are_theirs(form: str, linear: bool, way: Any):
    whole = draw_whole(15)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    for part in cut(whole, 2):
        way(run_part(part, form, linear, weight, normalizer)[0].loss)
    normalizer.scale_gradients(weight)
    torch.testing.assert_close(weight.grad, undivided(whole, form, linear), rtol=1e-5, atol=1e-7)


def test_two_losses_of_one_normaliser_are_its_own():
    whole = draw_whole(15)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    both = [run_part(part, "opd", False, weight, normalizer)[0].loss for part in cut(whole, 2)]
    twice(both[0] + both[1])
    normalizer.scale_gradients(weight)
    assert_same(weight.grad, undivided(whole))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_the_model(reentrant: bool):
    """A reentrant one runs a backward inside the backward, and hides what it reaches."""
    whole = draw_whole(16)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    for part in cut(whole, 2):
        hidden = part.hidden.clone().requires_grad_()
        logits = checkpoint(lambda h: h @ weight.T, hidden, use_reentrant=reentrant)
        dg.opd_loss(
            logits, part.labels, part.old, part.teacher, gate=normalizer, response_mask=part.mask
        ).loss.backward()
    normalizer.scale_gradients(weight)
    assert_same(weight.grad, undivided(whole))


def test_a_collected_loss_is_a_tensor_as_any():
    whole = draw_whole(17)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    loss = run_part(whole, "opd", False, weight, normalizer)[0].loss
    alone = run_part(whole, "opd", False, weight, GATE)[0].loss
    assert f"{loss:.3f}" == f"{alone:.3f}" and repr(loss).startswith("tensor(")
    assert loss.item() == alone.item() and torch.equal(loss, alone)
    for plain in (loss.detach(), loss.detach() + 1, loss.data, loss.isnan(), 2 * loss.detach()):
        assert type(plain) is Tensor


def test_no_hook_is_left_behind():
    whole = draw_whole(17)
    weight = whole.weight.clone().requires_grad_()

    def hooks() -> int:
        return len(weight._post_accumulate_grad_hooks or ())

    normalizer = dg.GateNormalizer(GATE)
    for part in cut(whole, 2):
        run_part(part, "opd", False, weight, normalizer)[0].loss.backward()
        assert hooks() == 1
    normalizer.scale_gradients(weight)
    assert hooks() == 0
    run_part(whole, "opd", False, weight, normalizer)
    assert hooks() == 1
    del normalizer  # a step that was given up
    gc.collect()
    assert hooks() == 0
