"""`opd_loss` and `gate_weights` on Triton kernels: every option of the row functions.

The vocabulary is small here; `test_kernels_vocabulary.py` has the wide rows.
"""

from __future__ import annotations

import pytest
import torch
from drift_gate.kernels import rows
from drift_gate.kernels.row_sums import METRICS as KERNEL_METRICS
from support.judge import assert_good, loss_and_grad
from support.launches import record_launches
from support.problems import draw

from drift_gate import Clip, DriftGate, Reduction, gate_weights, gather_lse, opd_loss
from drift_gate.choices import ESTIMATORS, REDUCTIONS
from drift_gate.passes.rules import METRICS

ROW_KERNELS = ("_row_blocks", "_sampled_token")
BY_SEQUENCE = ("_row_blocks", "_sequence_gates", "_sampled_token")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(kernels_on_cpu, estimator):
    problem = draw(2, 30, 21, drift=2.0, masked=0.2)  # ratios beyond every clip
    options = {"estimator": estimator, "clip": Clip(dual=1.5, advantage=1.5)}
    assert_good(problem, "triton", device=kernels_on_cpu, **options)


@pytest.mark.parametrize("mode", REDUCTIONS)
def test_reductions(kernels_on_cpu, mode):
    problem = draw(4, 9, 17, masked=0.3)
    problem.options["response_mask"][2] = False  # a sequence without a valid position
    assert_good(problem, "triton", device=kernels_on_cpu, reduction=mode, gate=None)
    sized = Reduction(mode, batch_num_tokens=500, global_batch_size=9, dp_size=4)
    assert_good(problem, "triton", device=kernels_on_cpu, reduction=sized)


GATES = [
    DriftGate("block", block_size=7, tau=2.5, aggregate="mean_abs"),
    DriftGate("block", block_size=64, aggregate="rms", normalize="sequence"),
    DriftGate("block", block_size=1000, aggregate="max_abs", normalize="none"),
    DriftGate("token", aggregate="mean", normalize="sequence"),
    DriftGate("sequence", aggregate="rms"),
    DriftGate("span", aggregate="mean"),
    DriftGate("span", aggregate="rms", normalize="sequence"),
    DriftGate("span", aggregate="max_abs"),
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_gates(kernels_on_cpu, gate, packed):
    """Sequences cross the kernel's tiles of 32 and 64 rows."""
    shape = (140, 11) if packed else (2, 70, 11)
    problem = draw(*shape, drift=1.5, masked=0.25)
    if packed:  # the second sequence is empty, the third begins within a tile
        problem.options["cu_seqlens"] = torch.tensor([0, 17, 17, 100, 140], dtype=torch.int32)
    if gate.granularity == "span":  # ids that recur after others
        generator = torch.Generator().manual_seed(1)
        problem.options["span_ids"] = torch.randint(-3, 3, shape[:-1], generator=generator)
    mode = "seq-mean-token-mean" if packed else "token-mean"
    assert_good(problem, "triton", device=kernels_on_cpu, gate=gate, reduction=mode)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_weights_of_the_caller(kernels_on_cpu, mode):
    problem = draw(2, 70, 11, masked=0.25)
    weights = torch.rand(2, 70, generator=torch.Generator().manual_seed(0))
    weights[~problem.options["response_mask"]] = torch.nan
    problem.options["gate"] = weights  # which goes where the problem goes
    assert_good(problem, "triton", device=kernels_on_cpu, reduction=mode)


def test_more_sequences_and_rows_than_a_tile(kernels_on_cpu, monkeypatch):
    """70 sequences exceed a tile of borders, 300 rows two of `sampled_token`."""
    monkeypatch.setattr(rows, "TILES", rows.TILES._replace(alone=128, rows=128))
    problem = draw(300, 3, drift=1.0, masked=0.1)
    problem.options["cu_seqlens"] = torch.linspace(0, 300, 71).long()
    assert_good(problem, "triton", device=kernels_on_cpu)
    problem.options["cu_seqlens"] = torch.tensor([0, 150, 300])
    gate = DriftGate(normalize="sequence")
    assert_good(problem, "triton", device=kernels_on_cpu, gate=gate)


def test_a_response_that_begins_late(kernels_on_cpu):
    """The first valid position lies several tiles into the sequence."""
    problem = draw(2, 150, 5, drift=1.0)
    starts = torch.tensor([[100], [149]])
    problem.options["response_mask"] = torch.arange(150).expand(2, 150) >= starts
    assert_good(problem, "triton", device=kernels_on_cpu)


@pytest.mark.parametrize("aggregate", ["mean", "mean_abs", "rms", "max_abs"])
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_no_drift_however_large_makes_the_weights_0_over_0(kernels_on_cpu, aggregate, scale):
    problem = draw(1, 256, 5).to(kernels_on_cpu)
    drift = scale * torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(64)
    problem.old_log_probs = drift.view(1, 256).to(kernels_on_cpu)
    result = opd_loss(
        *problem.arguments(), gate=DriftGate(aggregate=aggregate), estimator="k2", backend="triton"
    )
    expected = torch.tensor([4.0, 0, 0, 0]).repeat_interleave(64).view(1, 256)
    torch.testing.assert_close(result.gate.cpu(), expected)


@pytest.mark.parametrize(
    ("name", "estimator", "aggregate"),
    [
        *(("logits", e, "mean") for e in ESTIMATORS),
        *(("teacher_log_probs", e, "mean") for e in ("ppo", "k3")),
        *(("old_log_probs", "ppo", a) for a in ("mean", "mean_abs", "rms", "max_abs")),
        ("old_log_probs", "k1", "max_abs"),  # through the gate alone
    ],
)
def test_a_nan_input_makes_the_loss_nan(kernels_on_cpu, name, estimator, aggregate):
    """Minima and maxima drop NaN on a GPU: none may hide one."""
    problem = draw(1, 20, 9).to(kernels_on_cpu)
    getattr(problem, name)[0, 3] = float("nan")
    problem.logits.requires_grad_()
    gate = DriftGate(aggregate=aggregate)
    options = {"gate": gate, "estimator": estimator, "clip": Clip(advantage=2.0)}
    result = opd_loss(*problem.arguments(), **options, backend="triton")
    assert result.loss.isnan()
    (grad,) = torch.autograd.grad(result.loss, problem.logits)
    assert grad[0, 3].isnan().all()


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (2, 3, 7), (1, 1, 1)], ids=str)
def test_a_batch_without_valid_rows_has_loss_0(kernels_on_cpu, shape, mode):
    problem = draw(*shape, reduction=mode).to(kernels_on_cpu)
    problem.labels.fill_(-100)
    result, grad = loss_and_grad(problem, "triton")
    assert result.loss == 0
    assert (grad == 0).all()
    assert all(value == 0 for value in result.metrics.values())


def test_invalid_rows_may_hold_anything(kernels_on_cpu):
    problem = draw(2, 30, 30, masked=0.4).to(kernels_on_cpu)
    clean, clean_grad = loss_and_grad(problem, "triton")
    masked = ~problem.options["response_mask"]
    for x in (problem.logits, problem.old_log_probs, problem.teacher_log_probs):
        x[masked] = float("nan")
    problem.labels[masked] = 10**9
    got, grad = loss_and_grad(problem, "triton")
    assert torch.equal(got.loss, clean.loss)
    assert torch.equal(grad, clean_grad)
    for name in ("token_loss", "log_probs", "gate", "drift", "entropy"):
        assert (getattr(got, name)[masked] == 0).all(), name


def test_launches(kernels_on_cpu):
    """One scan and two or three row functions forward; one expand backward."""
    problem = draw(2, 20, 40, masked=0.2).to(kernels_on_cpu)
    problem.logits.requires_grad_()
    for gate, row_kernels in (
        (DriftGate(), ROW_KERNELS),
        (DriftGate(normalize="sequence"), BY_SEQUENCE),
        (None, ROW_KERNELS),  # whose first counts each sequence's tokens
    ):
        with record_launches() as forward:
            result = opd_loss(
                *problem.arguments(), **problem.options, gate=gate, backend="triton",
                reduction="seq-mean-token-mean", return_entropy=True,
            )  # fmt: skip
        assert [launch.name for launch in forward] == ["_scan", *row_kernels]
        with record_launches() as backward:
            result.loss.backward()
        assert [launch.name for launch in backward] == ["_expand"]
    with record_launches() as ungated:
        opd_loss(*problem.arguments(), gate=None, backend="triton")
    assert [launch.name for launch in ungated] == ["_scan", "_sampled_token"]


def test_same_inputs_same_bits(kernels_on_cpu):
    problem = draw(3, 70, 57, dtype=torch.bfloat16, masked=0.2).to(kernels_on_cpu)
    (a, grad_a), (b, grad_b) = (loss_and_grad(problem, "triton") for _ in range(2))
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(a.gate, b.gate)
    assert torch.equal(grad_a, grad_b)
    blocks = a.gate.view(3, -1)[:, :64]
    valid = problem.options["response_mask"][:, :64]
    for weights, live in zip(blocks, valid, strict=True):  # one block, one weight, to the bit
        assert weights[live].unique().numel() <= 2  # the block begins at the first valid position


def test_inplace_backward_gives_the_same_bits(kernels_on_cpu):
    problem = draw(2, 40, 300, dtype=torch.bfloat16, masked=0.2).to(kernels_on_cpu)
    _, expected = loss_and_grad(problem, "triton")
    leaf = problem.logits.clone().requires_grad_()
    logits = leaf * 1
    result = opd_loss(
        logits, *problem.arguments()[1:], **problem.options, backend="triton", inplace_backward=True
    )
    (grad,) = torch.autograd.grad(result.loss, logits)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("k", [1, 3])
def test_gather_lse(kernels_on_cpu, k):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, 120, generator=generator)
    ids = torch.randint(120, (2, 5, k), generator=generator)
    weights = torch.randn(2, 5, k + 1, generator=generator)
    grads = []
    for device, backend in ((kernels_on_cpu, "triton"), ("cpu", "reference")):
        z = logits.to(device).requires_grad_()
        picked, lse = gather_lse(z, ids.to(device), temperature=0.7, backend=backend)
        both = torch.cat([picked, lse[..., None]], -1)
        grads.append((both.cpu(), torch.autograd.grad(both, z, weights.to(device))[0].cpu()))
    torch.testing.assert_close(grads[0], grads[1])


def test_metric_names_agree():
    assert METRICS == KERNEL_METRICS


@pytest.mark.gpu
def test_gate_weights_runs_on_kernels_on_a_gpu():
    new = -torch.rand(3, 200)
    old = new + torch.randn(3, 200)
    gate = DriftGate("block", aggregate="rms", normalize="sequence")
    expected = gate_weights(new, old, gate)
    with record_launches() as launches:
        got = gate_weights(new.cuda(), old.cuda(), gate)
    assert [launch.name for launch in launches] == list(BY_SEQUENCE)
    torch.testing.assert_close(got.weights.cpu(), expected.weights)
    assert torch.equal(got.block_ids.cpu(), expected.block_ids)
