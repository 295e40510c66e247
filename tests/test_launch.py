"""`launch`: runs the variant that Triton would, and Triton itself wherever it cannot know."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import triton
import triton.language as tl
from conftest import KERNELS
from drift_gate.kernels import launch as module
from drift_gate.kernels.launch import launch
from support.launches import compile_only, record_launches
from support.null_driver import null_driver
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.skipif(KERNELS == "interpret", reason="the driver is never asked")


TRIED = pytest.mark.skipif(not module.KNOWN, reason="this Triton launches every kernel by itself")


@triton.jit
def fill(x, other, n, value, BLOCK: tl.constexpr, NAME: tl.constexpr = "default"):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if other is not None:
        value += tl.load(other + lane, mask=lane < n, other=0.0)
    tl.store(x + lane, value, mask=lane < n)


@pytest.fixture(autouse=True)
def _no_variants(monkeypatch):
    monkeypatch.setattr(module, "_variants", {})


@pytest.fixture
def triton_runs(monkeypatch):
    """Launches that went through Triton's own code."""
    seen = []
    run = JITFunction.run.__code__

    class Counting(dict):
        def __setitem__(self, key, value):
            seen.append(key)
            super().__setitem__(key, value)

    assert run.co_filename == module._TRITONS_FILE
    monkeypatch.setattr(module, "_variants", Counting())
    return seen


@TRIED
def test_the_second_launch_runs_the_kept_kernel_with_plain_numbers(triton_runs):
    x = torch.zeros(64)
    with null_driver() as driver:
        for _ in range(3):
            launch(fill, (2,), x, None, 64, 1.5, BLOCK=32, num_warps=1)
    assert len(triton_runs) == 1
    first, *others = driver.launched
    assert [name for name, *_ in driver.launched] == ["fill"] * 3
    for name, grid, arguments in others:
        assert (name, grid) == ("fill", first[1]) and grid == (2, 1, 1)
        assert arguments == (x.data_ptr(), None, 64, 1.5, 32, "default")
    assert first[2][0] is x and first[2][2:] == (64, 1.5, 32, "default")


SAME = [
    (dict(n=64), dict(n=128)),  # multiples of 16
    (dict(n=3), dict(n=5)),
    (dict(value=0.5), dict(value=1.0)),
    (dict(x=torch.zeros(64)), dict(x=torch.zeros(32))),
]
APART = [
    (dict(n=64), dict(n=65)),
    (dict(n=3), dict(n=1)),
    (dict(n=5), dict(n=2**31 + 5)),
    (dict(n=2**31 + 5), dict(n=2**63 + 5)),
    (dict(n=-5), dict(n=-(2**31) - 5)),
    (dict(n=2), dict(n=True)),
    (dict(value=1.0), dict(value=1)),
    (dict(x=torch.zeros(64)), dict(x=torch.zeros(64).double())),
    (dict(x=torch.zeros(64)), dict(x=torch.zeros(65)[1:])),  # no longer on a 16-byte boundary
    (dict(other=None), dict(other=torch.zeros(64))),
    (dict(BLOCK=32), dict(BLOCK=64)),
    (dict(NAME=1), dict(NAME=1.0)),
    (dict(NAME=1), dict(NAME=True)),
    (dict(num_warps=1), dict(num_warps=2)),
    (dict(), dict(num_stages=2)),
]


def run(**changes) -> None:
    given = dict(x=torch.zeros(64), other=None, n=64, value=1.5, BLOCK=32, num_warps=1) | changes
    x, other, n, value = (given.pop(name) for name in ("x", "other", "n", "value"))
    launch(fill, (1,), x, other, n, value, **given)


@TRIED
@pytest.mark.parametrize(
    ("kept", "one", "other"),
    [*((1, *pair) for pair in SAME), *((2, *pair) for pair in APART)],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else str(x),
)
def test_variants(triton_runs, kept, one, other):
    with null_driver():
        for changes in (one, other, one, other):
            run(**changes)
    assert len(triton_runs) == kept


@TRIED
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_what_triton_tells_apart_has_keys_of_its_own(target, monkeypatch):
    """Values with one key of ours have one specialisation of Triton's."""
    from support.compile_check import TARGETS
    from triton._C.libtriton import native_specialize_impl
    from triton.compiler.compiler import make_backend

    monkeypatch.setattr(module, "ON_AMD", target == "gfx942")
    big = torch.empty(2**31, dtype=torch.int8, device="meta")
    memory = torch.zeros(64)
    tensors = [memory[i:].view(d) for i in (0, 1, 4, 5) for d in (torch.float32, torch.int32)]
    numbers = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**32, 2**40 + 1, -(2**31) - 1]
    values = [*tensors, memory.double(), memory > 0, *numbers, 2**63, 2**63 + 1, 2**64 - 1]
    values += [0.0, 1.0, 16.0, True, False, None, big[:64], torch.empty(64, device="meta").char()]
    backend = make_backend(TARGETS[target])
    keyed = []
    for value in values:
        index = value.get_device() if isinstance(value, torch.Tensor) else -1
        traits, _ = module._look_up((value,), index)
        keyed.append((traits, native_specialize_impl(backend, value, False, True, True)))
    for (key, ours), (other_key, theirs) in itertools.combinations(keyed, 2):
        if key == other_key and list(map(type, key)) == list(map(type, other_key)):
            assert ours == theirs


@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_products_and_sums_are_fused_whatever_triton_takes_unless_told(target):
    with compile_only(target) as launches:
        run()
    assert launches[0].options["enable_fp_fusion"] is True
    assert launches[0].kernel.metadata.enable_fp_fusion is True


@TRIED
def test_the_variants_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_VARIANTS", 2)
    with null_driver() as driver:
        for n in (3, 1, 16, 3):
            run(n=n)
            assert len(module._variants) <= 2
    assert len(driver.launched) == 4


@TRIED
def test_devices_and_drivers_have_kernels_of_their_own(triton_runs):
    for _ in range(2):
        with null_driver() as driver:
            here = driver.device
            for driver.device in (here, here + 1, here, here + 1):
                run()
    assert len(triton_runs) == 4


@TRIED
def test_threads(triton_runs):
    with null_driver() as driver:
        threads = [threading.Thread(target=lambda: [run(n=n) for n in (3, 16)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(driver.launched) == 16
    assert len(module._variants) == 2


@TRIED
def test_hooks_see_every_launch():
    seen = []
    hooks = triton.knobs.runtime.launch_enter_hook
    with null_driver():
        run()
        hooks.add(seen.append)
        try:
            run()
            run()
        finally:
            hooks.remove(seen.append)
    assert len(module._variants) == 1


@pytest.mark.parametrize("case", ["a version not tried", "a hook before the run", "a wrapper"])
def test_triton_launches_where_this_module_cannot_know(case, monkeypatch, triton_runs):
    kernel, args = fill, (torch.zeros(64), None, 64, 1.5)
    options = dict(BLOCK=32, num_warps=1)
    if case == "a version not tried":
        monkeypatch.setattr(module, "KNOWN", False)
    elif case == "a hook before the run":
        monkeypatch.setattr(fill, "pre_run_hooks", [lambda *args, **options: None])
    else:
        kernel = triton.heuristics({"NAME": lambda arguments: "named"})(fill)
    with null_driver() as driver:
        for _ in range(2):
            launch(kernel, (2,), *args, **options)
    assert len(driver.launched) == 2
    assert not triton_runs


@TRIED
def test_arguments_that_vary_unseen_are_not_kept(triton_runs):
    """A runtime parameter by name, and an argument of a type with no rule here."""
    with null_driver() as driver:
        launch(fill, (1,), torch.zeros(64), None, 64, value=1.5, BLOCK=32)
        launch(fill, (1,), torch.zeros(64), None, 64, value=2.5, BLOCK=32)
        launch(fill, (1,), torch.zeros(64), None, 64, triton.language.constexpr(2), BLOCK=32)
    assert [arguments[3] for _, _, arguments in driver.launched[:2]] == [1.5, 2.5]
    assert not triton_runs


@TRIED
def test_tools_that_replace_the_run_see_every_launch():
    with null_driver() as driver:
        run()
        with record_launches() as launches:
            run()
            run()
    assert [launch.name for launch in launches] == ["fill", "fill"]
    assert len(driver.launched) == 3


def test_checked_kernels_run(kernels_on_cpu):
    x = torch.empty(50, device=kernels_on_cpu)
    for value in (1.5, 2.5):
        launch(fill, (2,), x, None, 50, value, BLOCK=32, num_warps=1)
        assert (x == value).all()
