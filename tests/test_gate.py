"""Properties of the drift gate that hold whatever the implementation."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import draw

from drift_gate import DriftGate, gate_weights, opd_loss

GRANULARITIES = ["token", "block", "span", "sequence"]
AGGREGATES = ["mean", "mean_abs", "rms", "max_abs"]


def log_probs(*shape: int, seed: int = 0, drift: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new = -3 * torch.rand(*shape, generator=generator)
    return new, new + drift * torch.randn(*shape, generator=generator)


def spans_for(gate: DriftGate, *shape: int) -> dict[str, torch.Tensor]:
    """Span ids where the gate wants them: lines of three to nine positions."""
    if gate.granularity != "span":
        return {}
    lengths = torch.randint(3, 10, (shape[-1],), generator=torch.Generator().manual_seed(5))
    ids = torch.arange(shape[-1]).repeat_interleave(lengths)[: shape[-1]]
    return {"span_ids": ids.expand(shape).contiguous()}


def test_the_formula_by_hand():
    """Blocks of 2 with signed means 0.5, -1 and 0 (opposite drifts cancel)."""
    new = torch.zeros(6)
    old = torch.tensor([0.25, 0.75, -1.5, -0.5, 2.0, -2.0])
    result = gate_weights(new, old, DriftGate(block_size=2))
    g = torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0, 0.0]).neg().exp()
    torch.testing.assert_close(result.weights, g / g.mean())
    assert result.block_ids.tolist() == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(result.metrics["gate_mean_raw"], g.mean())
    torch.testing.assert_close(result.metrics["gate_ess"], g.sum() ** 2 / g.square().sum() / 6)
    torch.testing.assert_close(result.metrics["drift_signed"], old.mean())
    torch.testing.assert_close(result.metrics["drift_abs"], old.abs().mean())


@pytest.mark.parametrize(
    ("aggregate", "a"),
    [("mean", 1 / 3), ("mean_abs", 5 / 3), ("rms", math.sqrt(11 / 3)), ("max_abs", 3.0)],
)
def test_aggregates_by_hand(aggregate, a):
    """One block with drifts 3, -1, -1, and a second one with none."""
    drift = torch.tensor([3.0, -1.0, -1.0, 0.0, 0.0, 0.0])
    gate = DriftGate(block_size=3, tau=0.5, aggregate=aggregate, normalize="none")
    result = gate_weights(torch.zeros(6), drift, gate)
    expected = torch.tensor([math.exp(-0.5 * a)] * 3 + [1.0] * 3)
    torch.testing.assert_close(result.weights, expected)


def test_masked_positions_keep_their_place_but_enter_no_mean():
    """The count starts at the first valid position; the masked one inside block 0 is skipped."""
    mask = torch.tensor([0, 0, 1, 0, 1, 1, 1]).bool()
    drift = torch.tensor([9.0, 9.0, 1.0, 9.0, 2.0, 4.0, 6.0])
    gate = DriftGate(block_size=3, normalize="none")
    result = gate_weights(torch.zeros(7), drift, gate, response_mask=mask)
    assert result.block_ids.tolist() == [-1, -1, 0, -1, 0, 1, 1]
    expected = torch.tensor([0, 0, 1.5, 0, 1.5, 5, 5]).neg().exp() * mask
    torch.testing.assert_close(result.weights, expected)
    assert result.drift.tolist() == [0, 0, 1, 0, 2, 4, 6]


@pytest.mark.parametrize("normalize", ["batch", "sequence"])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_uniform_while_current_is_old_and_unit_mean_after(granularity, aggregate, normalize):
    gate = DriftGate(granularity, 5, 1.0, aggregate, normalize)
    spans = spans_for(gate, 3, 50)
    new, old = log_probs(3, 50)
    mask = torch.rand(3, 50, generator=torch.Generator().manual_seed(2)) > 0.3
    same = gate_weights(new, new, gate, response_mask=mask, **spans)
    assert torch.equal(same.weights, mask.float())
    moved = gate_weights(new, old, gate, response_mask=mask, **spans).weights
    assert (moved[~mask] == 0).all()
    groups = [(moved, mask)] if normalize == "batch" else zip(moved, mask, strict=True)
    for weights, valid in groups:
        torch.testing.assert_close(weights.sum(), valid.sum().float())
    if granularity != normalize:  # one block a sequence, each with unit mean: all are 1
        assert moved[mask].std() > 0.01


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_permuting_sequences_permutes_the_weights(granularity):
    gate = DriftGate(granularity, 7)
    new, old = log_probs(4, 40)
    spans = spans_for(gate, 4, 40)
    order = torch.tensor([2, 0, 3, 1])
    weights = gate_weights(new, old, gate, **spans).weights
    permuted = gate_weights(new[order], old[order], gate, **spans).weights
    torch.testing.assert_close(permuted, weights[order])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_packed_batch_is_the_padded_one_without_its_padding(granularity):
    gate = DriftGate(granularity, 7)
    new, old = log_probs(3, 40)
    spans = spans_for(gate, 3, 40)
    lengths = [40, 11, 23]
    mask = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
    padded = gate_weights(new, old, gate, response_mask=mask, **spans)
    borders = torch.tensor([0, 40, 51, 74], dtype=torch.int32)
    flat_spans = {name: ids[mask] for name, ids in spans.items()}
    packed = gate_weights(new[mask], old[mask], gate, cu_seqlens=borders, **flat_spans)
    torch.testing.assert_close(packed.weights, padded.weights[mask])
    assert torch.equal(packed.block_ids, padded.block_ids[mask])


def test_splitting_a_batch_by_hand_and_rejoining_gives_the_same():
    """Raw gates do not see the rest of the batch; the mean gate is their one shared number."""
    new, old = log_probs(6, 90)
    raw = DriftGate(normalize="none")
    parts = [gate_weights(new[i : i + 2], old[i : i + 2], raw).weights for i in (0, 2, 4)]
    rejoined = torch.cat(parts)
    whole = gate_weights(new, old).weights
    torch.testing.assert_close(rejoined / rejoined.mean(), whole)


def test_invariant_to_a_constant_added_to_a_row_of_logits():
    problem = draw(2, 70, 40).to(torch.float64)
    base = opd_loss(*problem.arguments())
    shifted = problem.logits + 50 * torch.randn(2, 70, 1, dtype=torch.float64)
    moved = opd_loss(shifted, *problem.arguments()[1:])
    torch.testing.assert_close(moved.gate, base.gate)
    torch.testing.assert_close(moved.loss, base.loss)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_no_drift_however_large_makes_the_weights_0_over_0(aggregate, scale):
    """exp(-|a|) underflows for every block; relative to the smallest it does not."""
    new = torch.zeros(256)
    old = scale * torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(64)
    weights = gate_weights(new, old, DriftGate(aggregate=aggregate)).weights
    torch.testing.assert_close(weights, torch.tensor([4.0, 0, 0, 0]).repeat_interleave(64))


@pytest.mark.parametrize("tau", [0, 0.0, 1e6])
def test_tau_at_its_ends(tau):
    new, old = log_probs(2, 200)
    weights = gate_weights(new, old, DriftGate(tau=tau)).weights
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert (weights == 1).all() if tau == 0 else (weights > 0).sum() == 64


@pytest.mark.parametrize("size", [np.int64(64), np.int32(64), np.uint8(64)], ids=repr)
@pytest.mark.parametrize("tau", [np.float32(0.5), np.float16(0.5), np.int64(1), Fraction(1, 2)])
def test_numbers_of_numpy_are_numbers(size, tau):
    gate = DriftGate(block_size=size, tau=tau)
    assert gate == DriftGate(block_size=64, tau=float(tau))
    assert type(gate.block_size) is int and type(gate.tau) is float


@pytest.mark.parametrize("value", [True, np.True_, np.float64(64), "64", None, 64.0], ids=repr)
def test_a_block_size_that_is_no_integer(value):
    with pytest.raises(TypeError, match="block_size must be an int; got"):
        DriftGate(block_size=value)


@pytest.mark.parametrize("value", [False, np.False_, "1", None, 1j, torch.ones(())], ids=repr)
def test_a_tau_that_is_no_number(value):
    with pytest.raises(TypeError, match="tau must be a number; got"):
        DriftGate(tau=value)


@pytest.mark.parametrize("value", [-1, np.float32("nan"), np.float64("inf"), math.nan], ids=repr)
def test_a_tau_out_of_range(value):
    with pytest.raises(ValueError, match="tau must be finite and at least 0; got"):
        DriftGate(tau=value)


def test_nan_drift_is_not_hidden():
    new, old = log_probs(2, 100)
    old[1, 3] = float("nan")
    for aggregate in AGGREGATES:
        assert gate_weights(new, old, DriftGate(aggregate=aggregate)).weights.isnan().any()


def test_the_result_is_detached_and_float32():
    new, old = log_probs(2, 100)
    result = gate_weights(new.bfloat16().requires_grad_(), old.requires_grad_())
    assert not result.weights.requires_grad
    assert result.weights.dtype == result.drift.dtype == torch.float32
    assert result.block_ids.dtype == torch.int64


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_blocks_number_the_same_pairs_of_sequence_and_id(data):
    """Spans with any ids, packed in any way: rows share a block where sequence and id agree."""
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    n = sum(lengths)
    ids = data.draw(st.lists(st.integers(-2, 3), min_size=n, max_size=n))
    valid = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    new, old = log_probs(n)
    result = gate_weights(
        new,
        old,
        DriftGate("span"),
        span_ids=torch.tensor(ids, dtype=torch.int64),
        response_mask=torch.tensor(valid, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
    )
    sequence = [s for s, length in enumerate(lengths) for _ in range(length)]
    numbers: dict[tuple[int, int], int] = {}
    expected = [
        numbers.setdefault((s, i), len(numbers)) if v else -1
        for s, i, v in zip(sequence, ids, valid, strict=True)
    ]
    assert result.block_ids.tolist() == expected
