"""The functions in C: each instruction set beside float64, every 16-bit float, exact bounds."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from support.problems import peaked_logits

from drift_gate import native, opd_loss

ROOT = Path(__file__).resolve().parent.parent
PROT_NONE = 0  # of mprotect
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
    native._function.cache_clear()
    monkeypatch.setattr(native, "instruction_set", lambda: request.param)
    yield request.param
    native._function.cache_clear()


def softmax_of(x: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * exp(x) of [N, V], by `expand`."""
    out = torch.empty_like(x)
    on, zero = torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x))
    native.expand(x[None], on, zero, zero, zero + factor, 1.0, out[None])
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_short_float_is_read_and_rounded_as_torch_does(instruction_set, dtype):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = every[:, None].contiguous()  # a row each: its maximum is the value
    whole = torch.ones(len(rows), dtype=torch.bool)
    maximum = native.scan(rows[None], whole, 1.0, False)[0]
    assert torch.equal(maximum.nan_to_num(7.0), every.float().nan_to_num(7.0))
    for part in (every.float(), every.float() * 1.0001, every.float() * 0.9999):
        # exp(0) times each value is that value, rounded
        factors = part[part.isfinite()]
        out = torch.empty(1, len(factors), 1, dtype=dtype)
        zeros, on = torch.zeros(len(factors)), torch.ones(len(factors), dtype=torch.bool)
        native.expand(torch.zeros_like(out), on, zeros, zeros, factors, 1.0, out)
        assert torch.equal(out.flatten(), factors.to(dtype))


def test_nan_stays_nan_whatever_its_bits(instruction_set):
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)
    for dtype in DTYPES:
        out = torch.empty(1, len(bits), 1, dtype=dtype)
        zeros, on = torch.zeros(len(bits)), torch.ones(len(bits), dtype=torch.bool)
        native.expand(torch.zeros_like(out), on, zeros, zeros, bits.view(torch.float32), 1.0, out)
        assert out.isnan().all()


def test_ties_go_to_even(instruction_set):
    for dtype, bits in ((torch.bfloat16, 16), (torch.float16, 13)):
        one = torch.tensor(1.0).view(torch.int32)
        halves = (one + (torch.arange(64) << (bits - 1))).to(torch.int32).view(torch.float32)
        out = torch.empty(1, 64, 1, dtype=dtype)
        zeros, on = torch.zeros(64), torch.ones(64, dtype=torch.bool)
        native.expand(torch.zeros_like(out), on, zeros, zeros, halves, 1.0, out)
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
    got = native.scan(wide, mask, 0.7, True).double()
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
    maximum, log_sum, entropy = native.scan(z[None], None, 1.0, True)
    assert maximum[0] == -inf and log_sum[0] == -inf and entropy[0].isnan()
    assert maximum[1].isnan() and log_sum[1].isnan() and entropy[1].isnan()
    assert maximum[2] == inf and log_sum[2].isnan() and entropy[2].isnan()
    assert (maximum[3], log_sum[3], entropy[3]) == (0, 0, 0)
    torch.testing.assert_close(log_sum[4].exp(), torch.tensor(100.0))


@needs_library
def test_the_callers_defaults_do_not_matter():
    z = torch.randn(1, 4, 9)
    expected = native.scan(z, None, 1.0, True)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = native.scan(z, None, 1.0, True)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got, expected)


def page_of(data: torch.Tensor, at_end: bool) -> tuple[mmap.mmap, torch.Tensor]:
    """The data at the end, or the beginning, of memory between two pages that cannot be touched."""
    page, size = mmap.PAGESIZE, data.nbytes
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, page + inner):
        address = ctypes.c_void_p(whole.data_ptr() + guard)
        assert libc.mprotect(address, ctypes.c_size_t(page), PROT_NONE) == 0
    begin = page + (inner - size if at_end else 0)
    placed = whole[begin : begin + size].view(data.dtype).view(data.shape)
    return memory, placed.copy_(data)


def touch_every_border() -> None:
    """Run every function between pages that cannot be touched: in a process that may die."""
    for at_end in (False, True):
        for dtype in DTYPES:
            for vocab in (1, 15, 16, 17, 64, 100, 2049):
                data = torch.randn(2, vocab).to(dtype)
                kept = [page_of(data, at_end) for _ in range(3)]
                x, y, out = (tensor[None] for _, tensor in kept)
                on, ones = torch.ones(2, dtype=torch.bool), torch.ones(2)
                top, log_sum, _ = native.scan(x, on, 1.0, True)
                native.expand(x, on, top, log_sum, ones, 1.0, out)
                native.expand(x, ~on, top, log_sum, ones, 1.0, out)
                for direction in native.DIRECTIONS:
                    options = 1.0, 1.0, direction, 0.5
                    found = native.divergence(x, y, on, *options, True)
                    native.divergence_grad(x, y, found[1:6], on, ones, *options, out)


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_nothing_beyond_the_rows_is_touched():
    code = "import test_native; test_native.touch_every_border(); print('alive')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert run.stdout == "alive\n", run.stderr


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_a_touch_beyond_the_rows_is_seen():
    """The test of the test: a vocabulary of one word more than there is."""
    code = (
        "import torch, test_native; from drift_gate import native; "
        "memory, x = test_native.page_of(torch.randn(1, 64), True); "
        "native.scan(x.as_strided((1, 1, 65), (65, 65, 1)), None, 1.0, False); print('alive')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert run.returncode < 0 and "alive" not in run.stdout


@needs_library
def test_without_the_library_results_are_the_same_to_rounding(monkeypatch):
    z = peaked_logits(2, 30, 700, generator=torch.Generator().manual_seed(0))
    labels = z.argmax(-1)
    old, teacher = torch.zeros(2, 30), torch.full((2, 30), -0.5)
    losses = []
    for enabled in (True, False):
        monkeypatch.setattr(native, "enabled", enabled)
        assert native.takes(z) is enabled and not native.takes(z.double())
        losses.append(opd_loss(z, labels, old, teacher, loss_agg_mode="none").loss)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_a_library_that_cannot_be_loaded_is_left_out_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / f"_rows{EXTENSION_SUFFIXES[0]}").write_text("of another machine")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native._library.cache_clear()
    with pytest.warns(UserWarning, match="without their functions in C"):
        assert not native.takes(torch.zeros(1))
    assert native.instruction_set() is None
    native._library.cache_clear()


def test_the_environment_switches_it_off():
    code = "from drift_gate import native; print(native.instruction_set())"
    environment = os.environ | {"DRIFT_GATE_NATIVE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "None\n"


def test_an_installation_without_a_compiler_goes_on(tmp_path):
    """The library is optional: its build fails with a warning, and the package is whole."""
    for part in ("drift_gate/native", "setup.py"):
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
