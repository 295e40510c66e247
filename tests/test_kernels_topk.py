"""`topk_loss` on Triton kernels: every divergence, missing entries, launches."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from drift_gate.kernels import topk as kernel_module
from support.judge import assert_same_budget, loss_and_grad
from support.launches import record_launches
from support.problems import draw_topk

from drift_gate import topk_loss
from drift_gate.choices import DIRECTIONS, SUPPORTS
from drift_gate.passes.backends import passes_of

PAIRS = [*itertools.product(DIRECTIONS, SUPPORTS)]


@pytest.mark.parametrize(("direction", "support"), PAIRS)
def test_directions_and_supports(kernels_on_cpu, direction, support, monkeypatch):
    """K = 5 pads a tile of 8; 26 rows are two programs, the second with rows to spare."""
    monkeypatch.setattr(kernel_module, "ELEMENTS", 128)
    problem = draw_topk(2, 13, 40, k=5, masked=0.2, teacher_share=0.9)
    problem.ids[0, 1, 2] = -1
    problem.teacher[0, 2, :3] = -torch.inf
    problem.ids[1, 4] = -1  # a row without support
    options = {"direction": direction, "support": support, "beta": 0.3}
    assert_same_budget(topk_loss, problem, "triton", device=kernels_on_cpu, **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_tail_without_mass_is_held_at_its_floor(kernels_on_cpu, direction):
    """The student's listed word has all of its mass, the teacher's two thirds."""
    problem = draw_topk(1, 6, 40, k=1, teacher_share=0.66)
    problem.logits -= 200
    problem.logits.scatter_add_(2, problem.ids, torch.full(problem.ids.shape, 200.0))
    options = {"direction": direction, "support": "tail"}
    assert_same_budget(topk_loss, problem, "triton", device=kernels_on_cpu, **options)


def test_infinities_and_nan(kernels_on_cpu):
    """A listed word without mass costs nothing backwards and everything forwards; NaN stays."""
    for direction in ("reverse", "forward", "jsd"):
        results = []
        for backend, device in (("triton", kernels_on_cpu), ("reference", "cpu")):
            problem = draw_topk(1, 4, 30, k=3)
            problem.logits[0, 1, problem.ids[0, 1, 0]] = -torch.inf
            problem.logits[0, 2, problem.ids[0, 2, 1]] = torch.nan
            problem.teacher[0, 3, 1] = torch.nan
            moved = problem.to(torch.device(device))
            result = topk_loss(
                *moved.arguments(), direction=direction, gate=None, reduction="none",
                backend=backend,
            )  # fmt: skip
            results.append(result.loss.cpu())
        torch.testing.assert_close(results[0], results[1], equal_nan=True)
        assert results[0][0, 2:].isnan().all()
        assert results[0][0, 1].isinf() == (direction == "forward")


@pytest.mark.parametrize(
    ("backend", "lost", "smallest"),
    [
        ("triton", -120.0, -103.2),  # exp is 0, and the smallest float32 above
        ("torch", -800.0, -744.5),  # of float64, in which it sums
    ],
)
def test_masses_that_are_too_small(kernels_on_cpu, backend, lost, smallest):
    """Their logarithms tell what is infinite; a share of the smallest makes a mixture of 0."""
    student = torch.tensor([[0.0, -torch.inf], [0.0, smallest]], device=kernels_on_cpu)
    teacher = torch.tensor([[-0.01, lost], [-0.01, smallest]], device=kernels_on_cpu)
    teacher[1, 1] -= 2
    present = student == student
    topk_rows = passes_of(backend).topk_rows
    arguments = student, None, teacher, present, present[:, 0]
    for direction, expected in (
        ("forward", [torch.inf, -0.01 * math.exp(-0.01)]),
        ("reverse", [0.01, 0.01]),
    ):
        rows, _ = topk_rows(*arguments, direction, "truncated", 0.5)
        torch.testing.assert_close(rows[0].cpu(), torch.tensor(expected))
    rows, slope = topk_rows(*arguments, "jsd", "truncated", 0.99)
    assert rows[0].isfinite().all() and slope.isfinite().all()


def test_launches(kernels_on_cpu):
    """LSM: one read of the logits forward, one write of the gradient backward."""
    problem = draw_topk(1, 12, 40, k=4).to(kernels_on_cpu)
    problem.logits.requires_grad_()
    with record_launches() as forward:
        result = topk_loss(*problem.arguments(), backend="triton")
    names = [launch.name for launch in forward]
    support = [] if kernels_on_cpu.type == "cpu" else ["_topk_support"]  # a CPU checks the values
    finish = ["_row_blocks", "_sampled_token", "_masses"]
    assert names == [*support, "_scan", "_topk_rows", *finish]
    with record_launches() as backward:
        result.loss.backward()
    assert [launch.name for launch in backward] == ["_expand", "_entries"]
    problem.labels = problem.old_log_probs = None
    with record_launches() as gathered:
        topk_loss(*problem.arguments(), gate=None, backend="triton")
    assert [launch.name for launch in gathered] == [*support, "_topk_rows", *finish[1:]]


def test_ids_outside_the_vocabulary_poison_the_loss(kernels_on_cpu):
    problem = draw_topk(1, 6, 40, k=3).to(kernels_on_cpu)
    problem.ids[0, 3, 1] = 40
    if kernels_on_cpu.type == "cpu":
        with pytest.raises(ValueError, match="teacher_topk_ids must lie in"):
            topk_loss(*problem.arguments(), backend="triton")
    else:
        assert topk_loss(*problem.arguments()).loss.isnan()


def test_inplace_backward_gives_the_same_bits(kernels_on_cpu):
    problem = draw_topk(2, 10, 90, k=4, dtype=torch.bfloat16, masked=0.2).to(kernels_on_cpu)
    for support in ("renormalized", "truncated"):
        _, expected = loss_and_grad(problem, "triton", function=topk_loss, support=support)
        _, grad = loss_and_grad(
            problem, "triton", function=topk_loss, support=support, inplace_backward=True
        )
        assert torch.equal(grad, expected)


@pytest.mark.parametrize("direction", ["jsd", "mixed"])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_beta_are_those_of_every_backend(kernels_on_cpu, direction, beta):
    generator = torch.Generator().manual_seed(0)
    scores, teacher = (torch.randn(6, 5, generator=generator).log_softmax(-1) for _ in range(2))
    on = torch.ones(6, 5, dtype=torch.bool)
    options = direction, "truncated", beta
    arguments = [x.to(kernels_on_cpu) for x in (scores, scores, teacher, on, on[:, 0].contiguous())]
    got = passes_of("triton").topk_rows(*arguments, *options)
    expected = passes_of("torch").topk_rows(*arguments, *options)
    torch.testing.assert_close(got, expected)
