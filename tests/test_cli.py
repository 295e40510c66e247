"""`drift-gate check`, and how the command line refuses what it cannot do."""

from __future__ import annotations

import builtins
import inspect
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from drift_gate import checks, cli
from drift_gate.passes import native
from drift_gate.passes.backends import HAS_TRITON, passes_of

ON_CPU = checks.backends_on(torch.device("cpu"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.fixture
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them, of a twentieth of the size: nothing is timed here."""

    def small(device: torch.device, seed: int) -> Any:
        yield checks._draw("plain", 2053, torch.bfloat16, device, seed)
        yield checks._draw("in place", 2053, torch.float32, device, seed, inplace_backward=True)

    monkeypatch.setattr(checks, "problems", small)


@pytest.mark.slow
def test_every_backend_agrees_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [20, 1, 75]  # fewer rows, and one round, than is worth timing
    for name, value in (("LENGTHS", lengths), ("ROWS", sum(lengths)), ("ROUNDS", 1)):
        monkeypatch.setattr(checks, name, value)
    done = run("check")
    assert done.exit_code == 0, done.output
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for backend in checks.backends_on(torch.device(device)):
            assert f'backend "{backend}"' in done.output
    if native.instruction_set():
        assert f"native (functions in C, compiled for {native.instruction_set()})" in done.output
    assert "torch (plain PyTorch)" in done.output
    for problem in ("plain", "in place", "masked", "packed", "span gate"):
        assert problem in done.output
    assert "MISMATCH" not in done.output and "FAILED" not in done.output


@pytest.mark.usefixtures("few_problems")
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_gradient_off_by_a_hundredth_is_a_mismatch(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    passes = passes_of(backend)
    expand_labels = passes.expand_labels

    def scaled(*arguments: Any) -> None:
        expand_labels(*arguments)
        inspect.signature(expand_labels).bind(*arguments).arguments["out"].mul_(1.01)

    assert run("check", "--device", "cpu").exit_code == 0
    monkeypatch.setattr(passes, "expand_labels", scaled)
    done = run("check", "--device", "cpu")
    assert done.exit_code == 1
    assert done.output.count("MISMATCH") == 2


@pytest.mark.usefixtures("few_problems")
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("poison", [float("nan"), 1e-4])
def test_a_wrong_loss_is_a_mismatch(
    monkeypatch: pytest.MonkeyPatch, backend: str, poison: float
) -> None:
    passes = passes_of(backend)
    scan = passes.scan

    def wrong(*arguments: Any) -> Any:
        gathered, log_probs, *rest = scan(*arguments)
        log_probs += poison
        return gathered, log_probs, *rest

    monkeypatch.setattr(passes, "scan", wrong)
    done = run("check", "--device", "cpu")
    assert done.exit_code == 1
    assert done.output.count("MISMATCH") == 2


@pytest.mark.usefixtures("few_problems")
@pytest.mark.parametrize("backend", ON_CPU)
def test_a_backend_that_raises_fails(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(passes_of(backend), "scan", broken)
    done = run("check", "--device", "cpu")
    assert done.exit_code == 1
    assert "out of registers" in done.output and "FAILED" in done.output


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["check", "--device", "tpu"], "--device"),
        (["check", "--device", "meta"], "--device"),
        (["check", "--device", "cuda:99"], "--device cuda:99"),
        (["check", "--backend", "numpy"], "--backend"),
        (["check", "--device", "cpu", "--backend", "triton"], "--backend triton"),
        (["distill", "--steps", "0"], "--steps"),
        (["distill", "--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(arguments: list[str], named: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert named in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_triton_is_listed_for_a_gpu_where_it_is_installed() -> None:
    on_gpu = checks.backends_on(torch.device("cuda"))
    assert on_gpu == (["triton", "torch"] if HAS_TRITON else ["torch"])


def test_without_typer_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
        return found(name, *arguments, **keywords)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "drift_gate.cli")
    with pytest.raises(SystemExit, match=r"typer: pip install drift-gate\[cli\]$"):
        import drift_gate.cli  # noqa: F401
