"""`GateNormalizer`: any split into micro-batches has the gradients of the undivided batch."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from support.parts import FORMS, Whole, draw_whole, run_part
from torch import Tensor

import drift_gate as dg

GATES = {
    "blocks": dg.DriftGate(block_size=4),
    "spans, rms": dg.DriftGate("span", aggregate="rms", tau=3.0),
    "mean by sequence": dg.DriftGate("token", normalize="sequence"),
    "raw": dg.DriftGate("sequence", normalize="none"),
    "sampled": dg.DriftGate(block_size=5, sample_every=2),
    "none": None,
}
MODES = (
    {},
    {"reduction": dg.Reduction(batch_num_tokens=170)},
    {"reduction": "token-sum"},
    {"reduction": "seq-mean-token-sum"},
    {"reduction": "seq-mean-token-mean"},
    {"reduction": dg.Reduction("seq-mean-token-sum-norm", loss_scale_factor=7.0)},
    {"reduction": dg.Reduction("seq-mean-token-mean", global_batch_size=torch.tensor(40.0))},
)


def cut(whole: Whole, parts: int) -> list[Whole]:
    return [whole.take(lambda x, i=i: x.tensor_split(parts)[i]) for i in range(parts)]


def undivided(
    whole: Whole, form: str, linear: bool, gate: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    weight = whole.weight.clone().requires_grad_()
    output, _ = run_part(whole, form, linear, weight, gate, **options)
    output.loss.backward()
    assert weight.grad is not None
    return output.loss.detach(), weight.grad


def divided(
    parts: list[Whole], form: str, linear: bool, gate: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    weight = whole_weight(parts)
    normalizer = dg.GateNormalizer(gate)
    for part in parts:
        output, _ = run_part(part, form, linear, weight, normalizer, **options)
        output.loss.backward()
    loss = normalizer.scale_gradients([weight])
    assert weight.grad is not None
    return loss, weight.grad


def whole_weight(parts: list[Whole]) -> Tensor:
    return parts[0].weight.clone().requires_grad_()


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("form, linear", [*itertools.product(FORMS, (False, True))])
def test_losses_and_gates(form: str, linear: bool, gate: Any):
    whole = draw_whole()
    for count in (1, 2, 5, 7):
        assert_same(
            divided(cut(whole, count), form, linear, gate), undivided(whole, form, linear, gate)
        )


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_reductions(mode: dict[str, Any]):
    whole = draw_whole(1)
    for gate in (GATES["blocks"], None):
        assert_same(
            divided(cut(whole, 5), "opd", False, gate, **mode),
            undivided(whole, "opd", False, gate, **mode),
        )


def test_per_token_losses_are_reduced_by_the_caller():
    whole, gate = draw_whole(2), GATES["blocks"]
    options = {"reduction": "none"}
    weight = whole.weight.clone().requires_grad_()
    run_part(whole, "topk", True, weight, gate, **options)[0].loss.sum().backward()
    again = whole.weight.clone().requires_grad_()
    normalizer = dg.GateNormalizer(gate)
    for part in cut(whole, 5):
        run_part(part, "topk", True, again, normalizer, **options)[0].loss.sum().backward()
    normalizer.scale_gradients(again)
    torch.testing.assert_close(again.grad, weight.grad, rtol=1e-10, atol=1e-13)


def test_the_reference_takes_no_parts():
    whole, gate = draw_whole(3), GATES["blocks"]
    with pytest.raises(ValueError, match="a GateNormalizer"):
        divided(cut(whole, 2), "opd", False, gate, backend="reference")


def test_the_first_micro_batch_is_weighed_as_if_alone():
    """So the gradients that are summed have the size that they had without the normaliser."""
    first = cut(draw_whole(4), 2)[1]
    alone = undivided(first, "opd", False, GATES["blocks"])[0]
    output, _ = run_part(first, "opd", False, first.weight, dg.GateNormalizer(GATES["blocks"]))
    torch.testing.assert_close(output.loss, alone, rtol=1e-13, atol=0)


def test_a_batch_without_rows_before_and_after():
    whole, gate = draw_whole(5), GATES["blocks"]
    empty = whole.take(lambda x: x[:1])  # the first sequence has no valid row
    assert not empty.mask.any()
    rest = whole.take(lambda x: x[1:])
    wanted = undivided(rest, "opd", True, gate)
    assert_same(divided([empty, rest], "opd", True, gate), wanted)
    assert_same(divided([rest, empty], "opd", True, gate), wanted)
    loss, grad = divided([empty, empty], "opd", True, gate)
    assert loss == 0 and (grad == 0).all()


def test_drifts_beyond_what_an_exponential_holds():
    """exp(-2000) is 0 in float64: only the quotient of two gates is finite."""
    whole, gate = draw_whole(6), GATES["blocks"]
    whole.old = whole.old + 2000
    options = {"estimator": "k3"}  # exp of the drift overflows in the others
    assert_same(
        divided(cut(whole, 2), "opd", False, gate, **options),
        undivided(whole, "opd", False, gate, **options),
    )


def test_it_begins_anew_after_each_step():
    whole, gate = draw_whole(7), GATES["blocks"]
    normalizer = dg.GateNormalizer(gate)
    wanted = undivided(whole, "opd", False, gate)
    for _ in range(2):
        weight = whole.weight.clone().requires_grad_()
        for part in cut(whole, 2):
            run_part(part, "opd", False, weight, normalizer)[0].loss.backward()
        assert_same((normalizer.scale_gradients([weight]), weight.grad), wanted)


def test_weights_beforehand():
    whole, gate = draw_whole(8), GATES["blocks"]
    parts = cut(whole, 5)
    now = (
        (whole.hidden @ whole.weight.T).log_softmax(-1).gather(-1, whole.labels[..., None])[..., 0]
    )
    whole_weights = dg.gate_weights(now, whole.old, gate, response_mask=whole.mask).weights
    found = dg.GateNormalizer(gate).weights(
        [
            dict(log_probs=x, old_log_probs=p.old, response_mask=p.mask)
            for x, p in zip(now.tensor_split(5), parts, strict=True)
        ]
    )
    torch.testing.assert_close(torch.cat(found), whole_weights, rtol=1e-12, atol=0)
    reduction = dg.Reduction(batch_num_tokens=int(whole.mask.sum()))
    for form, linear in itertools.product(FORMS, (False, True)):
        wanted = undivided(whole, form, linear, gate)
        weight = whole.weight.clone().requires_grad_()
        total = torch.zeros(())
        for part, w in zip(parts, found, strict=True):
            output, _ = run_part(part, form, linear, weight, w, reduction=reduction)
            torch.testing.assert_close(output.gate, torch.where(part.mask, w, 0))
            output.loss.backward()
            total = total + output.loss.detach()
        assert_same((total, weight.grad), wanted)


def test_mixed_precision_scaler():
    """The gradients may bear a scaler's factor: multiplication commutes."""
    whole, gate = draw_whole(9), GATES["blocks"]
    wanted = undivided(whole, "opd", False, gate)[1]
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(gate)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for part in cut(whole, 2):
        scaler.scale(run_part(part, "opd", False, weight, normalizer)[0].loss).backward()
    normalizer.scale_gradients([weight])
    scaler.unscale_(optimizer)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("way", ["no_grad", "inference_mode", "tensors without gradient"])
@pytest.mark.parametrize("form, linear", [*itertools.product(FORMS, (False, True))])
def test_calls_that_do_not_train_are_not_collected(form: str, linear: bool, way: str):
    """Evaluation between two micro-batches, of drifts and sizes that would change the step."""
    whole, gate = draw_whole(12), GATES["blocks"]
    wanted = undivided(whole, form, linear, gate)
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(gate)
    others = dataclasses.replace(draw_whole(13), old=whole.old + 3)
    for part in cut(whole, 2):
        evaluate(others, form, linear, normalizer, way)
        run_part(part, form, linear, weight, normalizer)[0].loss.backward()
        evaluate(others, form, linear, normalizer, way)
    assert_same((normalizer.scale_gradients([weight]), weight.grad), wanted)


def evaluate(whole: Whole, form: str, linear: bool, gate: Any, way: str) -> None:
    """The values are those of the gate alone, as of a whole batch."""
    expected = run_part(whole, form, linear, whole.weight, gate.gate)[0].loss.detach()
    if way == "tensors without gradient":
        hidden, weight = whole.hidden, whole.weight
        student = (hidden, weight) if linear else (hidden @ weight.T,)
        theirs = (whole.their_hidden, whole.their_weight)
        teacher = {
            "opd": (whole.teacher,),
            "topk": (whole.ids, whole.log_q),
            "full": theirs if linear else (theirs[0] @ theirs[1].T,),
        }[form]
        function = getattr(dg, f"{'linear_' * linear}{form}_loss")
        got = function(
            *student, whole.labels, whole.old, *teacher, gate=gate, response_mask=whole.mask
        )
    else:
        with torch.no_grad() if way == "no_grad" else torch.inference_mode():
            got, _ = run_part(whole, form, linear, whole.weight, gate)
    torch.testing.assert_close(got.loss.clone(), expected, rtol=1e-12, atol=0)


def test_wrong_use():
    whole = draw_whole(10)
    with pytest.raises(TypeError, match="gate must be a DriftGate or None; got float"):
        dg.GateNormalizer(0.5)
    normalizer = dg.GateNormalizer()
    with pytest.raises(ValueError, match="no loss was called"):
        normalizer.scale_gradients([])
    run_part(whole, "opd", False, whole.weight, normalizer)
    reduction = dg.Reduction(batch_num_tokens=3)
    with pytest.raises(ValueError, match="must agree"):
        run_part(whole, "opd", False, whole.weight, normalizer, reduction=reduction)
    with pytest.raises(ValueError, match="weights need a gate"):
        dg.GateNormalizer(None).weights([{}])
    zeros = torch.zeros(1, 1)
    with pytest.raises(TypeError, match="arguments of gate_weights; got \\['mask'\\]"):
        dg.GateNormalizer().weights([dict(log_probs=zeros, old_log_probs=zeros, mask=zeros)])
    with pytest.raises(ValueError, match="gate must have the shape of labels"):
        run_part(whole, "opd", False, whole.weight, torch.ones(3))
    with pytest.raises(TypeError, match="gate must be a floating-point tensor"):
        run_part(whole, "opd", False, whole.weight, whole.labels)


def test_a_mean_gate_far_above_the_first():
    """The first is the unit in which gradients are summed: what is far above would overflow."""
    whole, gate = draw_whole(6), dg.DriftGate("token", tau=500.0)
    first, second = cut(whole, 2)
    far = dataclasses.replace(first, old=first.old + 10)
    normalizer = dg.GateNormalizer(gate)
    run_part(far, "opd", False, whole.weight, normalizer)
    with pytest.raises(ValueError, match="GateNormalizer.weights"):
        run_part(second, "opd", False, whole.weight, normalizer)
    assert_same(
        divided([second, far], "opd", False, gate),
        undivided(joined(second, far), "opd", False, gate),
    )


@pytest.mark.parametrize("linear", [False, True])
def test_a_micro_batch_whose_every_drift_is_infinite(linear: bool):
    """It weighs nothing, and is no unit for the others, whichever comes first."""
    first, second = cut(draw_whole(7), 2)
    nothing = dataclasses.replace(first, old=torch.full_like(first.old, -torch.inf))
    for parts in ([nothing, second], [second, nothing]):
        for gate in (GATES["blocks"], GATES["spans, rms"]):
            assert_same(
                divided(parts, "topk", linear, gate),
                undivided(joined(*parts), "topk", linear, gate),
            )


def test_a_micro_batch_without_rows_is_far_from_none():
    """Its mean gate is none: it stands above no other, however small those are."""
    whole, gate = draw_whole(8), dg.DriftGate("token", tau=500.0)
    far = dataclasses.replace(whole, old=whole.old + 10)
    empty = dataclasses.replace(whole, mask=torch.zeros_like(whole.mask))
    for parts in ([far, empty], [empty, far]):
        assert_same(divided(parts, "opd", False, gate), undivided(far, "opd", False, gate))


def joined(first: Whole, second: Whole) -> Whole:
    rows = {k: torch.cat([x, second.rows()[k]]) for k, x in first.rows().items()}
    return dataclasses.replace(first, **rows)
