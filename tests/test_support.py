"""The tools of tests/support catch what they are for: each fault is planted once, and found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from conftest import KERNELS
from support import toy_kernels
from support.compile_check import TARGETS, Report, check, report
from support.launches import compile_only, record_launches

from drift_gate.budget import assert_as_good_as
from drift_gate.fuzz.bounds import Extents, KernelFault
from drift_gate.fuzz.memory import nan_filled_memory
from drift_gate.measure import peak_bytes

compiles = pytest.mark.skipif(KERNELS == "interpret", reason="interpreted kernels do not compile")
checked = pytest.mark.skipif(
    torch.cuda.is_available() and KERNELS != "interpret", reason="a GPU checks nothing"
)

# ---------------------------------------------------------------- kernels on the CPU


def launch_row_sum(x: torch.Tensor, **faults: int) -> torch.Tensor:
    out = torch.empty(len(x), device=x.device)
    toy_kernels.row_sum[(len(x),)](x, out, x.shape[1], x.stride(0), BLOCK=8, **faults)
    return out


def launch_copy(x: torch.Tensor, out: torch.Tensor, step: int = 8, **faults: int) -> None:
    grid = (-(-len(x) // step),)
    toy_kernels.copy[grid](x, out, len(x), BLOCK=8, STEP=step, **faults)


def test_sound_kernels_run(kernels_on_cpu: torch.device) -> None:
    x = torch.randn(3, 20, device=kernels_on_cpu)  # two full blocks of 8 and half a third
    torch.testing.assert_close(launch_row_sum(x), x.sum(1))
    total = torch.zeros(1, device=x.device)
    toy_kernels.add_everything[(8,)](x, total, x.numel(), BLOCK=8)  # atomics are no race
    torch.testing.assert_close(total[0], x.sum())


@checked
@pytest.mark.parametrize(
    "width",
    [20, 24],  # the row's end is the storage's end; or padding follows each row, the last too
)
def test_out_of_bounds_load(kernels_on_cpu: torch.device, width: int) -> None:
    x = torch.randn(3, width)[:, :20]
    assert launch_row_sum(x).isfinite().all()
    with pytest.raises(KernelFault, match=r"out-of-bounds (load|read)"):
        launch_row_sum(x[2:], LOAD_LIMIT_OFFSET=1)


@checked
@pytest.mark.xfail(reason="bounds are those of all arguments together", strict=True)
def test_a_load_that_lands_in_the_next_row(kernels_on_cpu: torch.device) -> None:
    x, out = torch.randn(3, 20), torch.empty(2)
    with pytest.raises(KernelFault):
        toy_kernels.row_sum[(2,)](x, out, 20, 20, BLOCK=8, LOAD_LIMIT_OFFSET=1)


@checked
def test_padding_holds_up_that_load(kernels_on_cpu: torch.device) -> None:
    with pytest.raises(KernelFault, match="between the elements of `x`"):
        launch_row_sum(torch.randn(3, 21)[:, :20], LOAD_LIMIT_OFFSET=1)


@checked
@pytest.mark.parametrize("storage", [20, 64])  # exact; with slack behind the view
def test_out_of_bounds_store(kernels_on_cpu: torch.device, storage: int) -> None:
    x, out = torch.randn(20), torch.empty(storage)[:20]
    launch_copy(x, out)
    assert torch.equal(out, x)
    with pytest.raises(KernelFault, match=r"out-of-bounds (store|write)"):
        launch_copy(x, out, STORE_LIMIT_OFFSET=1)


@checked
def test_race(kernels_on_cpu: torch.device) -> None:
    with pytest.raises(KernelFault, match="race"):
        launch_copy(torch.randn(20), torch.empty(20), step=4)  # each block overlaps the next


@checked
def test_uninitialised_read_shows_as_nan(kernels_on_cpu: torch.device) -> None:
    x, out = torch.randn(20), torch.empty(20)
    toy_kernels.accumulate[(3,)](x, out, 20, BLOCK=8)
    assert out.isnan().all()


@pytest.mark.skipif(KERNELS != "interpret", reason="the emulator would copy the memory")
def test_an_offset_in_32_bits(kernels_on_cpu: torch.device) -> None:
    """Rows 2^30 elements apart, in memory that is reserved and never touched."""
    storage = torch.from_numpy(np.empty(2**31 + 64, dtype=np.float16))
    x = storage.as_strided((3, 20), (2**30, 1))
    x.fill_(1)
    out = torch.empty(3)
    toy_kernels.row_sum[(3,)](x, out, 20, x.stride(0), BLOCK=32)
    assert out.tolist() == [20, 20, 20]
    with pytest.raises(KernelFault, match=r"out-of-bounds (load|read)"):
        toy_kernels.row_sum_in_32_bits[(3,)](x, out, 20, x.stride(0), BLOCK=32)


def test_bfloat16_rounds_to_nearest_even(kernels_on_cpu: torch.device) -> None:
    x = torch.randn(1000, device=kernels_on_cpu)
    x[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # two ties: down to even, up to even
    out = torch.empty(1000, dtype=torch.bfloat16, device=x.device)
    launch_copy(x, out)
    assert torch.equal(out, x.bfloat16())


def test_launches_are_recorded_and_happen(kernels_on_cpu: torch.device) -> None:
    x = torch.randn(3, 20, device=kernels_on_cpu)
    with record_launches() as launches:
        out = launch_row_sum(x)
    assert [(launch.name, launch.grid) for launch in launches] == [("row_sum", (3,))]
    assert launches[0].arguments["V"] == 20
    assert launches[0].arguments["x"] is x
    torch.testing.assert_close(out, x.sum(1))


def test_extents_are_exact_on_views() -> None:
    base = torch.empty(4, 6, 10)
    view = base[1:3, ::2, 2:9]  # rows with gaps, planes with gaps
    inside = torch.zeros(base.shape, dtype=torch.bool)
    inside[1:3, ::2, 2:9] = True
    addresses = torch.arange(base.numel()).mul(4).add(base.data_ptr())
    outside = Extents([("x", (view,))]).outside(addresses.numpy())
    assert torch.equal(torch.from_numpy(outside), ~inside.flatten())


# ---------------------------------------------------------------- compiled kernels

ROW_SUM = {"x": "*bf16:16", "out": "*fp32", "V": "i32:16", "row_stride": "i32:16", "BLOCK": 2048}


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_a_gpu(target: str) -> None:
    lean = check(toy_kernels.row_sum, ROW_SUM, target, num_warps=4)
    assert lean.registers > 0
    assert lean.spill_bytes == 0
    assert lean.shared_bytes > 0
    assert lean.widest_load == 128
    assert lean.widest_store == 32
    assert lean.barriers > 0
    assert lean.barriers_in_loops == 0

    meeting = check(toy_kernels.row_sum_with_barriers, ROW_SUM, target, num_warps=4)
    assert meeting.barriers_in_loops > 0


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_undivisible_stride_loses_wide_loads(target: str) -> None:
    arguments = ROW_SUM | {"row_stride": "i32"}
    assert check(toy_kernels.row_sum, arguments, target, num_warps=4).widest_load == 16


@compiles
@pytest.mark.parametrize("target", TARGETS)
def test_spill_is_seen(target: str) -> None:
    amd = target.startswith("gfx")
    arguments = ROW_SUM | {"BLOCK": 65536 if amd else 8192}  # 256 or 64 sums a thread ...
    options = {} if amd else {"maxnreg": 32}  # ... ptxas takes 20 s to run out of all 255
    assert check(toy_kernels.row_sum, arguments, target, num_warps=4, **options).spill_bytes > 0


@compiles
def test_compile_check_names_a_wrong_argument() -> None:
    with pytest.raises(ValueError, match=r"no parameter.*stride"):
        check(toy_kernels.row_sum, ROW_SUM | {"stride": "i32"}, "sm90")


@compiles
@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])  # in one process: separate caches
def test_compile_only_sees_what_the_launcher_passes(target: str) -> None:
    def launched(width: int) -> Report:
        x = torch.zeros(3, width, dtype=torch.bfloat16)
        with compile_only(target) as launches:
            toy_kernels.row_sum[(3,)](x, torch.empty(3), width, width, BLOCK=2048, num_warps=4)
        assert [(launch.name, launch.grid) for launch in launches] == [("row_sum", (3,))]
        assert launches[0].options == {"num_warps": 4}
        assert launches[0].arguments["LOAD_LIMIT_OFFSET"] == 0
        return report(launches[0].kernel)

    assert launched(4096).widest_load == 128
    assert launched(4095).widest_load == 16


@compiles
def test_compile_only_inside_a_checked_run(kernels_on_cpu: torch.device) -> None:
    x = torch.ones(3, 20)
    with compile_only() as launches:
        toy_kernels.row_sum[(3,)](x, torch.empty(3), 20, 20, BLOCK=32)
    assert report(launches[0].kernel).registers > 0
    out = launch_row_sum(x.to(kernels_on_cpu))
    assert out.tolist() == [20, 20, 20]


@compiles
def test_a_checked_run_after_a_compilation_for_amd(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    x, out = torch.ones(3, 20), torch.empty(3)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)  # nothing of it was compiled before
        with compile_only("gfx942"):
            toy_kernels.row_sum[(3,)](x, out, 20, 20, BLOCK=128)  # a block of this test alone
        device = request.getfixturevalue("kernels_on_cpu")
        assert launch_row_sum(x.to(device)).tolist() == [20, 20, 20]


@compiles
def test_compile_only_takes_grids_that_are_functions() -> None:
    x = torch.zeros(20)
    with compile_only() as launches:
        toy_kernels.copy[lambda meta: (-(-meta["N"] // meta["BLOCK"]),)](x, x, 20, 8, STEP=8)
        toy_kernels.copy[(1,)](x, x, 20, BLOCK=32, STEP=32)
    assert [launch.grid for launch in launches] == [(3,), (1,)]


# ---------------------------------------------------------------- numbers


def truncated(x: torch.Tensor) -> torch.Tensor:
    """float32 to bfloat16 towards zero."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()


def test_rounding_passes_and_truncation_does_not() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert_as_good_as(x.bfloat16(), x.bfloat16(), x.double())
    with pytest.raises(AssertionError, match=r"biased.*towards zero"):
        assert_as_good_as(truncated(x), x.bfloat16(), x.double())


def test_errors_that_neighbours_share_are_as_many_as_their_means() -> None:
    """Chance that leaves a mean of few roundings is none of many; a truncation is still seen."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 1, generator=generator).expand(200, 24)
    x = x * (1 + torch.rand(200, 24, generator=generator))
    shared = torch.randn(200, 1, generator=generator) + 0.2
    got, eager = ((x.double() * (1 + 1e-3 * s)).float() for s in (shared, -shared + 0.4))
    with pytest.raises(AssertionError, match="biased"):
        assert_as_good_as(got, eager, x.double())
    assert_as_good_as(got, eager, x.double(), together=24)
    with pytest.raises(AssertionError, match=r"biased.*towards zero"):
        assert_as_good_as(truncated(x), x.bfloat16(), x.double(), together=24)


@pytest.mark.parametrize("times, passes", [(1, True), (1.9, True), (3, False)])
def test_error_budget(times: float, passes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    truth, noise = torch.randn(2, 4000, dtype=torch.float64, generator=generator)
    baseline, actual = (truth + 1e-3 * noise).float(), (truth - times * 1e-3 * noise).float()
    if passes:
        assert_as_good_as(actual, baseline, truth)
        return
    with pytest.raises(AssertionError, match=r"error .* the eager maximum is"):
        assert_as_good_as(actual, baseline, truth)


def test_rms_catches_many_errors_below_the_maximum() -> None:
    truth = torch.randn(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sign = torch.ones(4000).index_fill(0, torch.arange(0, 4000, 2), -1.0)
    baseline = truth.float()
    baseline[0] += 1e-3  # one poor element is no licence for all
    with pytest.raises(AssertionError, match="rms"):
        assert_as_good_as((truth + 1e-3 * sign).float(), baseline, truth)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_must_be_where_the_truth_has_them(value: float) -> None:
    truth = torch.randn(10, dtype=torch.float64)
    wrong = truth.float().index_fill(0, torch.tensor(3), value)
    for actual, reference in ((wrong, truth), (truth.float(), wrong.double()), (-wrong, wrong)):
        if value != value and actual is not wrong and reference is wrong:
            continue  # NaN has no sign to get wrong
        with pytest.raises(AssertionError):
            assert_as_good_as(actual, reference.float(), reference.double())
    assert_as_good_as(wrong, wrong, wrong.double())


def test_an_overflowing_baseline_is_no_licence() -> None:
    truth = torch.randn(10, dtype=torch.float64)
    baseline = truth.float().index_fill(0, torch.tensor(3), float("inf"))
    assert_as_good_as(truth.float(), baseline, truth)
    with pytest.raises(AssertionError):
        assert_as_good_as((truth + 1).float(), baseline, truth)


def test_overflow_of_the_dtype_is_infinity() -> None:
    truth = torch.tensor([1.0, 1e6], dtype=torch.float64)
    assert_as_good_as(truth.half(), truth.half(), truth)


# ---------------------------------------------------------------- memory


def test_peak_bytes_is_exact() -> None:
    with peak_bytes() as memory:
        x = torch.ones(1000)  # 4000 bytes live
        y = x * 2  # 8000
        del y
        z = (x + 1).mul_(3).double()  # x + 1 lives until its copy of 8000 bytes is made: 16000
    assert memory.peak == 16000
    assert memory.end == 4000 + z.nbytes


@pytest.mark.gpu
def test_peak_bytes_is_exact_on_a_gpu() -> None:
    with peak_bytes("cuda") as memory:
        x = torch.ones(1000, device="cuda")
        z = (x + 1).mul_(3).double()
    assert memory.peak == 16000
    assert memory.end == 4000 + z.nbytes


def test_peak_bytes_sees_temporaries_inside_an_operator() -> None:
    x = torch.randn(100, 1000)
    with peak_bytes() as memory:
        torch.nn.functional.cross_entropy(x, torch.zeros(100, dtype=torch.long))
    assert memory.peak >= x.nbytes  # the log-softmax that no name holds


def test_nan_filled_memory() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with nan_filled_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(3)).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
    assert torch.are_deterministic_algorithms_enabled() == before
