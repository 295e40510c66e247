"""`drift-gate distill`: the task, the command, and the training behind it."""

from __future__ import annotations

import math

import pytest
import torch
from drift_gate.bench.distill import run, task, train
from drift_gate.bench.distill.model import respond
from typer.testing import CliRunner

from drift_gate import DriftGate, cli

CPU = torch.device("cpu")


def pairs(count: int, *, held_out: bool = True) -> list[tuple[int, int]]:
    return task.draw_pairs(count, torch.Generator().manual_seed(0), held_out=held_out)


def test_worked_solutions_are_right_and_their_answers_checked() -> None:
    assert task.solution(4785, 1236) == "5+6=11,8+3+1=12,7+2+1=10,4+1+1=6,6021"
    assert task.solution(4785, 1236, [True] * 4) == "5+6=11,8+3=11,7+2=9,4+1=5,5911"
    some = [*pairs(100), (0, 0), (9999, 9999)]  # the shortest and the longest response
    right = task.solutions(some, 0.0, torch.Generator())
    assert task.accuracy(some, right) == 1
    digit = task.response_mask(right).sum(-1) - 2  # the last of each answer; then the end
    right[torch.arange(len(some)), digit] = right[torch.arange(len(some)), digit] % 10 + 1
    assert task.accuracy(some, right) == 0


def test_held_out_problems_are_not_trained_on() -> None:
    assert not set(pairs(2000)) & set(pairs(2000, held_out=False))


def test_cached_sampling_is_the_model_itself() -> None:
    teacher, some = run.load("teacher", CPU), pairs(20)
    prompts = task.prompts(some)
    responses = respond(teacher, prompts, None)
    with torch.no_grad():
        again = teacher(torch.cat([prompts, responses], 1), task.PROMPT - 1)[:, :-1].argmax(-1)
    mask = task.response_mask(responses)
    assert torch.equal(responses[mask], again[mask])


def test_the_quick_command_ends_with_a_table() -> None:
    done = CliRunner().invoke(cli.app, ["distill", "--quick"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for name in ("student before", "teacher", *run.VARIANTS):
        assert name in done.output


def test_variants_start_alike_and_the_student_is_worse_than_the_teacher() -> None:
    before, teacher, plain, gated = run.compare(steps=1, seed=0, device=CPU, quick=True)
    assert before.accuracy < teacher.accuracy - 0.2
    for row in (plain, gated):
        assert all(math.isfinite(x) for step in row.curve for x in step)
    assert plain.curve[0].gate == 1 > gated.curve[0].gate > 0


@pytest.mark.parametrize("gate", [None, DriftGate(block_size=8)])
def test_the_reference_trains_the_same_curve(
    gate: DriftGate | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "ROLLOUT", 16)  # the reference loops over blocks
    monkeypatch.setattr(train, "MINIBATCH", 8)
    curves = []
    for backend in ("torch", "reference"):
        student, teacher = run.load("student", CPU), run.load("teacher", CPU)
        options = dict(gate=gate, steps=3, seed=0, backend=backend)
        curves.append(torch.tensor(list(train.distill(student, teacher, **options))))
    # Rounding passes through twelve steps of Adam, whose first has the size of the learning rate
    # however small the gradient.
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-5)
