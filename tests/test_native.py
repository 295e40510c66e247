"""The functions in C: each instruction set beside float64, every 16-bit float, the library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from support.problems import peaked_logits

from drift_gate import opd_loss
from drift_gate.passes import native
from drift_gate.passes.backends import resolve

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_library = pytest.mark.skipif(
    native.instruction_set() is None, reason="there is no compiled library"
)


def instruction_sets() -> list[str]:
    best = native.instruction_set()
    order = ["any", "avx2", "avx512"]
    return order[: order.index(best) + 1] if best else []


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make calls go to the functions of this set."""
    native.library.function.cache_clear()
    monkeypatch.setattr(native.library, "instruction_set", lambda: request.param)
    yield request.param
    native.library.function.cache_clear()


def softmax_of(x: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * exp(x) of [N, V], by `expand`."""
    out, zero = torch.empty_like(x), torch.zeros(len(x))
    softmax(x[None], zero, zero, zero + factor, out[None])
    return out


def softmax(
    x: torch.Tensor,
    maximum: torch.Tensor,
    log_sum: torch.Tensor,
    alpha: torch.Tensor,
    out: torch.Tensor,
    valid: torch.Tensor | None = None,
) -> None:
    """`expand` without entries."""
    none = torch.zeros(len(alpha), 0)
    native.expand(x, none.long(), maximum, log_sum, none, valid, alpha, none, 1.0, out)


def statistics(
    x: torch.Tensor, valid: torch.Tensor | None, scale: float = 1.0, entropy: bool = True
) -> torch.Tensor:
    """`scan` without entries: maximum, log_sum and entropy [3, N]."""
    ids = torch.zeros(x.shape[0] * x.shape[1], 0, dtype=torch.int64, device="cpu")
    return torch.stack(native.scan(x, ids, valid, scale, entropy)[2 : 5 if entropy else 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_short_float_is_read_and_rounded_as_torch_does(instruction_set, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = every[:, None].contiguous()  # a row each: its maximum is the value
    maximum = statistics(rows[None], None, entropy=False)[0]
    assert torch.equal(maximum.nan_to_num(7.0), every.float().nan_to_num(7.0))
    for part in (every.float(), every.float() * 1.0001, every.float() * 0.9999):
        # exp(0) times each value is that value, rounded
        factors = part[part.isfinite()]
        out = torch.empty(1, len(factors), 1, dtype=dtype)
        zeros = torch.zeros(len(factors))
        softmax(torch.zeros_like(out), zeros, zeros, factors, out)
        assert torch.equal(out.flatten(), factors.to(dtype))


def test_nan_stays_nan_whatever_its_bits(instruction_set):
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)
    for dtype in DTYPES:
        out = torch.empty(1, len(bits), 1, dtype=dtype)
        zeros = torch.zeros(len(bits))
        softmax(torch.zeros_like(out), zeros, zeros, bits.view(torch.float32), out)
        assert out.isnan().all()


def test_ties_go_to_even(instruction_set):
    for dtype, bits in ((torch.bfloat16, 16), (torch.float16, 13)):
        one = torch.tensor(1.0).view(torch.int32)
        halves = (one + (torch.arange(64) << (bits - 1))).to(torch.int32).view(torch.float32)
        out = torch.empty(1, 64, 1, dtype=dtype)
        softmax(torch.zeros_like(out), torch.zeros(64), torch.zeros(64), halves, out)
        assert torch.equal(out.flatten(), halves.to(dtype))


def test_exponentials_are_within_a_unit_and_not_biased(instruction_set):
    x = -torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0)) * 87
    x[0, :3] = torch.tensor([0.0, -200.0, -torch.inf])
    got, truth = softmax_of(x, 1.0).double(), x.double().exp()
    assert got[0, :3].tolist() == [1.0, 0.0, 0.0]
    error = (got / truth - 1)[:, 3:]
    assert error.abs().max() < 2**-23
    assert error.mean().abs() < 6 * error.square().mean().sqrt() / error.numel() ** 0.5 + 2**-29
    assert softmax_of(torch.tensor([[torch.nan]]), 1.0).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 2047, 2048, 2049, 6150])
def test_statistics_beside_float64(instruction_set, dtype, vocab):
    generator = torch.Generator().manual_seed(vocab)
    z = peaked_logits(2, 5, vocab, generator=generator).to(dtype)
    wide = torch.empty(2, 6, vocab + 3, dtype=dtype).fill_(torch.nan)[:, 1:, 1 : vocab + 1]
    wide.copy_(z)
    mask = torch.tensor([True, False, True, True, False] * 2)
    got = statistics(wide, mask, 0.7)[:, mask].double()
    truth = (z.double() * 0.7).flatten(0, 1)[mask]
    top = truth.amax(-1)
    log_p = truth.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for name, result, expected in (
        ("maximum", got[0], top),
        ("log_sum", got[1], truth.logsumexp(-1) - top),
        ("entropy", got[2], entropy),
    ):
        torch.testing.assert_close(result, expected, rtol=3e-7, atol=2e-6, msg=name)


def test_special_rows(instruction_set):
    inf, nan = torch.inf, torch.nan
    z = torch.zeros(5, 3000)
    z[0] = -inf
    z[1, 2500] = nan
    z[2, 7] = inf
    z[3, :2999] = -inf
    z[4, 100:] = -1e38
    maximum, log_sum, entropy = statistics(z[None], None)
    assert maximum[0] == -inf and log_sum[0] == -inf and entropy[0].isnan()
    assert maximum[1].isnan() and log_sum[1].isnan() and entropy[1].isnan()
    assert maximum[2] == inf and log_sum[2].isnan() and entropy[2].isnan()
    assert (maximum[3], log_sum[3], entropy[3]) == (0, 0, 0)
    torch.testing.assert_close(log_sum[4].exp(), torch.tensor(100.0))


@needs_library
def test_the_callers_defaults_do_not_matter():
    z = torch.randn(1, 4, 9)
    expected = statistics(z, None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = statistics(z, None)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, expected)


@needs_library
def test_without_the_library_results_are_the_same_to_rounding(monkeypatch):
    z = peaked_logits(2, 30, 700, generator=torch.Generator().manual_seed(0))
    labels = z.argmax(-1)
    old, teacher = torch.zeros(2, 30), torch.full((2, 30), -0.5)
    losses = []
    for enabled in (True, False):
        monkeypatch.setattr(native, "enabled", enabled)
        assert resolve("auto", z) == ("native" if enabled else "torch")
        assert resolve("auto", z.double()) == "torch"
        losses.append(opd_loss(z, labels, old, teacher, reduction="none").loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_a_library_that_cannot_be_loaded_is_left_out_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / f"_rows{EXTENSION_SUFFIXES[0]}").write_text("of another machine")
    monkeypatch.setattr(native.library, "FOLDER", tmp_path)
    native.library.find.cache_clear()
    with pytest.warns(UserWarning, match="without their functions in C"):
        assert resolve("auto", torch.zeros(1)) == "torch"
    assert native.instruction_set() is None
    native.library.find.cache_clear()


def test_the_environment_switches_it_off():
    code = "from drift_gate.passes import native; print(native.instruction_set())"
    environment = os.environ | {"DRIFT_GATE_NATIVE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "None\n"


def test_an_installation_without_a_compiler_goes_on(tmp_path):
    """The library is optional: its build fails with a warning, and the package is whole."""
    for part in ("drift_gate/passes/native", "setup.py"):
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, tmp_path / part, ignore=ignored)
        else:
            shutil.copy(source, tmp_path / part)
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CC": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not list(tmp_path.rglob("*.so"))
