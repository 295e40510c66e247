"""`drift-gate fuzz`: what is planted is found, a short run passes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import drift_gate
from drift_gate import (
    Clip,
    GateNormalizer,
    Head,
    Parallel,
    Reduction,
    cli,
    opd_loss,
    spans,
)
from drift_gate.call import weighing
from drift_gate.fuzz import local_ranks, run, verdict
from drift_gate.fuzz.choices import Choices
from drift_gate.fuzz.cuts import LAYOUTS
from drift_gate.fuzz.evaluate import build
from drift_gate.fuzz.functions import FUNCTIONS, Function, opd
from drift_gate.fuzz.options import Student, draw_student
from drift_gate.fuzz.tensors import tensors
from drift_gate.fuzz.verdict import faults
from drift_gate.options import as_head, as_reduction
from drift_gate.parallel import ranks, scope, words
from drift_gate.passes import torch as plain
from drift_gate.passes.backends import backends_on

HERE = Path(__file__).parent
CPU = torch.device("cpu")
BACKENDS = backends_on(CPU)[::-1]


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["fuzz", *arguments], catch_exceptions=False)


@pytest.mark.slow
def test_a_short_run_passes() -> None:
    """Every function and most options, in some ten seconds."""
    tally = run.fuzz(BACKENDS, CPU, seed=1, cases=300)
    assert tally.failure is None, json.dumps(tally.failure, indent=2)
    assert tally.cases == 300 and set(tally.functions) == set(FUNCTIONS)
    assert list(tally.bias.faults()) == []
    taken, offered = tally.coverage()
    assert taken > 0.7 * offered
    assert all(tally.options["backend"].values()) and len(BACKENDS) > 1


OPTIONS = {"clip": Clip, "reduction": Reduction, "parallel": Parallel}
OPTIONS |= {"head": Head, "teacher_head": Head}
VOCABULARY = {"parallel.vocab_parallel_group"}  # of a head: tests/test_vocab_parallel.py
BATCH = {"parallel.group", "parallel.context_parallel_group"}
NOT_TAKEN = {
    **dict.fromkeys(("full_loss", "gate_weights"), VOCABULARY),
    "linear_full_loss": VOCABULARY | {"teacher_head.chunk_size"},
    **dict.fromkeys(("linear_opd_loss", "linear_topk_loss"), VOCABULARY),
    **dict.fromkeys(("token_log_probs", "gather_lse", "top_k_log_probs"), BATCH),
    **dict.fromkeys(
        ("linear_token_log_probs", "linear_gather_lse", "linear_top_k_log_probs"),
        BATCH | VOCABULARY,
    ),
}
"""Fields of objects that a function takes, but which mean nothing to it or are tested elsewhere."""


def fields_of(name: str, value: Any) -> dict[str, Any]:
    """An option's own fields by path, whatever short form it was given in."""
    if isinstance(value, str):
        value = as_reduction(value)
    elif isinstance(value, torch.Tensor):
        value = as_head(value)
    return {f"{name}.{k}": x for k, x in vars(OPTIONS[name]() if value is None else value).items()}


def options_of(function: Any) -> dict[str, Any]:
    """What a public function may be told, with the defaults; fields of its objects by path."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        found[name] = parameter.default
        if name in OPTIONS:
            found |= {f"{name}.{x.name}": x.default for x in dataclasses.fields(OPTIONS[name])}
    return found


def drawn_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a problem tells a function, in the names of `options_of`."""
    drawn = dict(arguments)
    parts = drawn.pop("parts", None)
    if parts is not None:
        drawn["parallel"] = Parallel(**parts.groups())
        drawn |= {"position_ids": parts.over} if parts.over in LAYOUTS else {}
    for name in OPTIONS.keys() & drawn.keys():
        drawn |= fields_of(name, drawn[name])
    return drawn


def test_options_with_fields_are_known() -> None:
    """Every argument that may be one of the package's objects is looked into."""
    objects = "Clip", "Reduction", "Parallel", "Head"
    for name in FUNCTIONS:
        for argument, p in inspect.signature(getattr(drift_gate, name)).parameters.items():
            if any(re.search(rf"\b{each}\b", str(p.annotation)) for each in objects):
                assert argument in OPTIONS, (name, argument)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_is_drawn(name: str) -> None:
    """But `backend`, which the run decides; in every form that an option takes."""
    chance = random.Random(0)
    left = options_of(getattr(drift_gate, name))
    for option in {"backend", *NOT_TAKEN.get(name, ())}:
        left.pop(option, None)
    if {"parallel.group", "parallel.vocab_parallel_group"}.isdisjoint(left):
        left.pop("parallel", None)
    forms = {
        f"{option} as {kind}"
        for option in ("head", "teacher_head")
        if option in left
        for kind in ("Head", "Tensor")
    }
    forms |= {f"reduction as {kind}" for kind in ("str", "Reduction") if "reduction" in left}
    for _ in range(4000):
        if not left and not forms:
            break
        problem = build(name, lambda _, options: chance.choice(options), ("torch",), CPU)
        for option, value in drawn_of(problem.arguments).items():
            forms.discard(f"{option} as {type(value).__name__}")
            if option in left and (value is not left[option] and str(value) != str(left[option])):
                del left[option]
    assert not left and not forms, f"never drawn: {sorted(left)}, {sorted(forms)}"


def test_a_fault_is_found_shrunk_saved_and_replayed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def forgetful(*arguments: Any) -> Any:  # the last word is not in the sum
        logits, ids, *rest = arguments
        last = logits.shape[-1] - 1
        return scan(logits if (ids == last).any() else logits[..., :last], ids, *rest)

    scan = plain.scan
    monkeypatch.setattr(plain, "scan", forgetful)
    saved = tmp_path / "case.json"
    options = ("--function", "token_log_probs", "--cases", "400", "--out", str(saved))
    done = command(*options)
    assert done.exit_code == 1, done.output
    problem = json.loads(saved.read_text())["problem"]
    assert problem["function"] == "token_log_probs"
    assert len(problem) < 8  # shrunk: most choices are the simplest
    again = command("--replay", str(saved))
    assert again.exit_code == 1 and "the reference has" in again.output
    monkeypatch.undo()
    assert command("--replay", str(saved)).exit_code == 0


def test_a_fault_that_comes_and_goes_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def faults(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        found, *results = judged(*arguments)
        return [*found, "a fault of the fifth"] if calls == 5 else found, *results

    calls, judged = 0, run.faults
    monkeypatch.setattr(run, "faults", faults)
    saved = tmp_path / "case.json"
    done = command("--function", "gate_weights", "--cases", "20", "--out", str(saved))
    assert done.exit_code == 1 and "does not fail in every run" in done.output, done.output
    assert json.loads(saved.read_text())["wrong"] == ["a fault of the fifth", run.CHANCE]
    assert command("--replay", str(saved)).exit_code == 0


def _truncate(x: torch.Tensor) -> torch.Tensor:
    bits = x.float().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32)


def test_truncation_is_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the budget of each case, and yet always towards zero."""

    def truncating(logits: torch.Tensor, *rest: Any) -> None:
        *arguments, out, gamma = rest
        wide = torch.empty_like(out, dtype=torch.float32)
        expand(logits.float(), *arguments, wide, gamma)
        out.copy_(_truncate(wide))

    expand = plain.expand
    monkeypatch.setattr(plain, "expand", truncating)
    bias = _bias_of_gradients()
    assert any("towards zero" in fault for fault in bias.faults())


def test_rounding_is_no_bias() -> None:
    bias = _bias_of_gradients()
    assert list(bias.faults()) == []


def _bias_of_gradients() -> run.Bias:
    bias = run.Bias()
    case = {"rows": 5, "dtype": "bfloat16", "vocab": 128, "upstream": "tokens"}
    for seed in range(40):
        problem = run.build("gather_lse", run.recorded(case | {"seed": seed}), ("torch",), CPU)
        _, *results = verdict.faults(problem)
        bias.add(problem.name, *results)
    return bias


# Faults of kinds that comparing values does not see.


def _fails(case: dict[str, Any]) -> str:
    wrong = run.replay(case, "torch", CPU)
    assert wrong is not None
    return wrong


def test_a_modified_input_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(*arguments: Any) -> Any:
        result = scan(*arguments)
        arguments[0].detach().view(-1)[0] += 0.001
        return result

    scan = plain.scan
    monkeypatch.setattr(plain, "scan", spoil)
    assert "input logits was modified" in _fails({"function": "token_log_probs", "vocab": 3})


def test_other_bits_in_a_second_run_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def drifting(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        gathered, log_probs, *rest = scan(*arguments)
        return gathered, log_probs * (1 + calls * 1e-7), *rest

    calls, scan = 0, plain.scan
    monkeypatch.setattr(plain, "scan", drifting)
    assert "other bits in a second run" in _fails({"function": "token_log_probs", "vocab": 3})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_tensors_of_inference_mode_are_drawn(name: str) -> None:
    """Of what is not the student's; they make no difference."""
    choices = {"tensors of inference mode": True, "strided row data": True, "mask": "some"}
    problem = build(name, run.recorded(choices), ("torch",), CPU)
    assert problem.saved()["tensors of inference mode"]
    made = {path for path, x in tensors(problem.arguments).items() if x.is_inference()}
    assert not made & {*problem.leaves, "logits", "hidden_states", "head.weight", "head"}
    assert made
    found, *_ = faults(problem)
    assert not found


def test_a_row_that_was_not_asked_for_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def overeager(*arguments: Any) -> Any:
        done = finish(*arguments)
        done.table[0] += 1e-30
        return done

    finish = plain.finish
    monkeypatch.setattr(plain, "finish", overeager)
    case = {"function": "opd_loss", "rows": 3, "vocab": 3, "mask": "a hole"}
    assert "gate: not 0 in a row that is not valid" in _fails(case)


def test_a_gradient_beside_the_logits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wild(*arguments: Any) -> None:
        expand_labels(*arguments)
        out = arguments[-1]
        out.as_strided((1,), (1,), out.storage_offset() + out.shape[-1]).fill_(7)

    expand_labels = plain.expand_labels
    monkeypatch.setattr(plain, "expand_labels", wild)
    case = {"function": "opd_loss", "logits layout": "wide rows", "vocab": 3}
    assert "memory around it changed" in _fails(case | {"inplace_backward": True})


def test_spans_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = spans._cut
    monkeypatch.setattr(spans, "_cut", lambda span, low, high: cut(span, low, high + 1))
    case = {"function": "newline_spans", "rows": 33, "min_length": 2, "max_length": 1}
    assert "differs from the reference" in _fails(case)


PACKED = {"batch": "packed", "sequences": 3, "length 0": 3, "length 2": 2}
PARTS = {
    "rows": {"ranks": 2},
    "positions": {"ranks": 2, "ranks share": "positions", "positions": "striped"},
    "words": {"ranks": 3, "ranks share": "words"},
    "rows and positions": {"ranks": 2, "ranks share": "positions", "parts of the rows": 2},
    "rows and words": {"ranks": 3, "ranks share": "words", "parts of the rows": 2},
    "micro-batches": {"micro-batches": 2},
    "packed sequences": PACKED | {"ranks": 2, "micro-batches": 2},
    "packed positions": PACKED | {"ranks": 2, "ranks share": "positions"},
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_fault_between_parts_is_seen(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any]
) -> None:
    case = {"function": "opd_loss", "batch": "padded", "sequences": 3, "length": 2, "vocab": 11}
    assert run.replay(case | parts, "torch", CPU) is None
    combine = words._combine

    def shifted(*arguments: Any) -> Any:
        found, log_probs, *rest = combine(*arguments)
        return found, log_probs + 1e-3, *rest

    monkeypatch.setattr(words, "_combine", shifted)
    monkeypatch.setattr(weighing, "over_ranks", lambda call, group: call)
    monkeypatch.setattr(GateNormalizer, "factor", lambda self: torch.ones(()))
    assert "loss" in _fails(case | parts)


def test_ranks_as_threads_fail_together() -> None:
    def work(rank: int, named: dict[str, Any]) -> None:
        if rank == 1:
            raise ValueError("of rank 1")
        scope.over_ranks(scope.Totals(*torch.ones(4)), ranks.name_of("group", named["group"]))

    with pytest.raises(ValueError, match="of rank 1"):
        local_ranks.run_ranks(3, work)


def linear_student(choose: Choices) -> Student:
    """Hidden states and a head in the logits' place: two inputs that get gradients."""
    student = draw_student(choose)
    generator = choose.generator
    hidden = torch.randn(*student.shape.lead, 4, generator=generator).to(student.dtype)
    weight = torch.randn(student.vocab, 4, generator=generator).to(student.dtype)
    temperature = {"temperature": student.temperature}
    return student._replace(
        arguments={"hidden_states": hidden, "head": weight, **temperature},
        leaves=("hidden_states", "head"),
        storages={},
        finite=(hidden @ weight.T).float(),
    )


@pytest.mark.parametrize("factor, passes", [(1.0, True), (1.01, False)])
def test_a_new_function_is_one_registration(
    monkeypatch: pytest.MonkeyPatch, factor: float, passes: bool
) -> None:
    def linear_opd_loss(hidden_states: Any, head: Any, backend: str, **options: Any) -> Any:
        if backend == "torch":
            hidden_states = hidden_states * factor
        return opd_loss(hidden_states @ head.T, backend=backend, **options)

    registered = Function(linear_opd_loss, opd, linear_student)
    monkeypatch.setitem(FUNCTIONS, "linear_opd_loss", registered)
    case = {"function": "linear_opd_loss", "rows": 5, "vocab": 17, "mask": "some"}
    outcomes = [run.replay(case | {"seed": seed}, "torch", CPU) for seed in range(3)]
    assert [outcome is None for outcome in outcomes] == [passes] * 3
    if not passes:
        assert "grad head" in str(outcomes) and "grad hidden_states" in str(outcomes)


# The command.


def test_a_run_ends_with_its_count_and_coverage() -> None:
    done = command("--cases", "3", "--seed", "7", "--backend", "torch", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert '3 cases on backend "torch", cpu, seed 7: no mismatch' in done.output
    assert "drift" in done.output


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--backend", "numpy"], "--backend"),
        (["--backend", "triton", "--device", "cpu"], "--interpret"),
        (["--function", "opd"], "--function"),
        (["--cases", "0"], "--cases"),
        (["--minutes", "0"], "--minutes"),
        (["--replay", "absent.json"], "absent.json"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    done = command(*arguments)
    assert done.exit_code == 2
    assert named in done.output and len(done.output.strip().splitlines()) == 1


def test_a_file_that_is_no_case_is_refused(tmp_path: Path) -> None:
    of_no_function = json.dumps({"version": run.VERSION, "problem": {"function": "mse"}})
    for text in ("{", "[]", '{"version": 1}', of_no_function):
        path = tmp_path / "case.json"
        path.write_text(text)
        done = command("--replay", str(path))
        assert done.exit_code == 2 and "case.json" in done.output


@pytest.mark.slow
def test_kernels_run_in_the_interpreter() -> None:
    """In a process of its own: triton reads TRITON_INTERPRET once."""
    arguments = ["fuzz", "--interpret", "--device", "cpu", "--cases", "5", "--function", "opd_loss"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "drift_gate", *arguments],
        cwd=HERE.parent,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '5 cases on backend "triton", cpu' in done.stdout
