"""Measure every implementation of a suite on one case: time, memory, error, floor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from . import device_time, targets, timing
from .bounds import Bounds, TooLong, within
from .calls import Call, Leaves, Run, call
from .cases import Anchor, Case, cases
from .floors import Floor
from .inputs import Work
from .measure import available_bytes, environment, quartiles
from .names import BASELINE, COMPILED, GEMM, GEMMS, OURS
from .peers.guard import LeftOut, OtherWork
from .record import Result
from .truth import Outputs, Truth


class Implementation(NamedTuple):
    """A way to do a suite's work."""

    name: str
    make: Callable[[Work], Callable[..., Outputs]]  # raises LeftOut; run(*leaves) -> outputs
    note: str = ""
    truth: str = "same"  # key into the suite's truths; None of them: nothing to compare
    temporaries: float = 14  # bytes that it takes beside each logit, for the memory guard
    overwrites: bool = False  # its leaves: they are restored before every run
    compiles: bool = False  # in its first call, on a CPU; on a GPU everything does

    @property
    def may_fail(self) -> bool:
        """Whether it is a peer: what it raises, or how long it takes, may leave it out."""
        return self.name != BASELINE and not self.name.startswith(OURS)


class Suite(NamedTuple):
    """One pass or loss, and who else does it."""

    name: str
    works: tuple[str, ...]  # values of Case.what
    anchor: Anchor
    draw: Callable[[Case, torch.device], Work]
    floor: Callable[[Case], Floor]
    truths: Callable[[Work], dict[str, Truth]]
    implementations: tuple[Implementation, ...]
    leaves: tuple[str, ...] = ("logits",)  # fields of Work that the gradient is taken in
    live: Callable[[Work], int] | None = None  # rows whose gradient is not 0; None: all

    def cases(self, grid: str, on_gpu: bool) -> list[Case]:
        """The sizes of a grid; those that the README's rows need first."""
        first = targets.cases(self.name, on_gpu)
        if grid == "targets":
            return first
        found = cases(self.anchor(on_gpu), self.works, grid, on_gpu)
        return found if grid in ("growth", "dry") else list(dict.fromkeys([*first, *found]))

    def chosen(self, grid: str, on_gpu: bool) -> list[Implementation]:
        """Who is measured: for the README's rows those who do the whole work, for the growth of the
        cost this package and the baselines, else everybody."""
        if grid == "targets":
            return [i for i in self.implementations if _for_targets(i, on_gpu)]
        if grid == "growth":
            own = (BASELINE, COMPILED)
            return [i for i in self.implementations if i.name in own or i.name.startswith(OURS)]
        return list(self.implementations)

    def measure(
        self, case: Case, device: torch.device, bounds: Bounds, wanted: Iterable[str] = (),
        keep: Callable[[dict[str, Result]], object] = lambda results: None,
    ) -> dict[str, Result]:  # fmt: skip
        """See `measure` below."""
        return measure(self, case, device, bounds, wanted, keep)


def load_suite(name: str) -> Suite:
    """The suite of suites/test_NAME.py."""
    return importlib.import_module(f"{__package__}.suites.test_{name}").SUITE


def _for_targets(implementation: Implementation, on_gpu: bool) -> bool:
    """Whether a row of the README may show it; the bare products are the unit of a GPU's."""
    if implementation.name in (GEMM, GEMMS):
        return on_gpu
    return targets.does_all(implementation.note)


def free_bytes(device: torch.device) -> float:
    """Memory that can be had, on the device or the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _cached(device)
    return available_bytes()


def _cached(device: torch.device) -> int:
    """Bytes that the allocator holds and no tensor uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def forget(device: torch.device) -> None:
    """Free what earlier runs left in cycles, and what the allocator keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def input_bytes(case: Case) -> int:
    """Memory of the inputs, a copy to restore them from, and float64 scratch."""
    logits = case.rows * case.vocab * case.itemsize
    if case.hidden:
        head = (case.rows + case.vocab) * case.hidden
        return 2 * head * case.itemsize + 8 * case.vocab * case.hidden + (1 << 30)
    return 2 * logits + (1 << 30) if logits > 1 << 26 else 0


OUT_OF_MEMORY = "out of memory"
CUT = "the run ended before its turn"
UNREACHED = "the time budget does not reach so far (--budget)"


def measure(
    suite: Suite, case: Case, device: torch.device, bounds: Bounds, wanted: Iterable[str] = (),
    keep: Callable[[dict[str, Result]], object] = lambda results: None,
) -> dict[str, Result]:  # fmt: skip
    """Results of a case by implementation: those wanted (all, if none are) and the baseline.

    Whatever a peer raises is its reason to be left out; this package and the baseline must run.
    `keep` is called with what there is so far, and again whenever there is more.
    """
    chosen = [i for i in suite.implementations if not wanted or i.name in (*wanted, BASELINE)]
    results = _blank(suite, case, device, chosen)
    keep(results)
    try:
        with within(bounds.most()):
            work = _inputs(suite, case, device)
            _count_live_rows(suite, work, results)
            truths = suite.truths(work)
    except (LeftOut, TooLong) as reason:
        for result in results.values():
            result.left_out = UNREACHED if isinstance(reason, TooLong) else str(reason)
        return results
    leaves = Leaves([getattr(work, name) for name in suite.leaves])
    warm: dict[str, float] = {}  # seconds of a call of those that take part in the rounds
    runs: dict[str, Run] = {}
    timers: dict[str, device_time.Timer] = {}
    for implementation in chosen:
        result = results[implementation.name]
        if bounds.spent:
            result.left_out = UNREACHED
            continue
        try:
            run = _prepared(implementation, work, leaves)
            gc.freeze()  # what a peer imports need not be walked after every call
            truth = truths.get(implementation.truth, {})
            one = functools.partial(call, run, leaves, truth, device)
            if _warmed(implementation, one, result, warm, bounds, device):
                runs[implementation.name] = run
                if device.type == "cuda":
                    _time_device(result, run, timers, device)
        except OtherWork:
            del results[implementation.name]
        except Exception as error:  # what a peer may raise is not known
            if not implementation.may_fail and not isinstance(error, LEAVES_OUT):
                raise
            result.left_out = UNREACHED if bounds.spent else reason_of(error)
        finally:
            leaves.restore()
            forget(device)
        keep(results)
    if sum(warm.values()) > bounds.most():  # no time for one round
        for name in runs:
            results[name].seconds, results[name].left_out = [[warm[name]]], None
        _compare(results)
        return results
    pause = PAUSE if case.hidden and device.type == "cuda" else 0.0
    for times in timing.interleaved(runs, device, bounds.rounds, bounds.end, pause):
        for name, rounds in times.items():
            results[name].seconds, results[name].left_out = rounds, None
        for name, timer in timers.items():
            time.sleep(pause)
            results[name].device_seconds.append(timer())
        _compare(results)
        keep(results)
    leaves.restore()
    return results


LEAVES_OUT = LeftOut, torch.OutOfMemoryError  # even this package and the baseline
PAUSE = 0.1  # seconds before each run of a round with products, on a GPU
DEVICE_SAMPLES = 3  # of those whose graph would take memory from the others during the rounds


def reason_of(error: Exception) -> str:
    """Why somebody is left out, in a line."""
    if isinstance(error, LeftOut):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def _blank(
    suite: Suite, case: Case, device: torch.device, chosen: list[Implementation]
) -> dict[str, Result]:
    """Results of a case before anything was measured, all rows taken to be live."""
    floor = suite.floor(case)
    blank = functools.partial(
        Result, suite.name, case._asdict(), baseline=BASELINE, bytes_must_move=floor.bytes,
        flops=floor.flops, machine=machine(device),
        copy_bytes_per_s=timing.copy_bandwidth(device), gemm_flops_per_s=_gemm_rate(case, device),
    )  # fmt: skip
    return {i.name: blank(implementation=i.name, note=i.note, left_out=CUT) for i in chosen}


def _count_live_rows(suite: Suite, work: Work, results: dict[str, Result]) -> None:
    """Say how many rows have a gradient, and take what need not be read out of the floor."""
    rows, floor = work.case.rows, suite.floor(work.case)
    live = suite.live(work) if suite.live is not None and floor.unread else rows
    for result in results.values():
        result.live_rows = live
        result.bytes_must_move = floor.with_dead(rows - live).bytes


def _time_device(
    result: Result, run: Run, timers: dict[str, device_time.Timer], device: torch.device
) -> None:
    """Of this package and the bare products in every round, side by side; of the others now."""
    found = device_time.timer(*run, device)
    if found is None:
        return
    timer, result.device_by = found
    name = result.implementation
    if name.startswith(OURS):
        with contextlib.suppress(Exception):  # a profiler without rights: no figure is lost for it
            result.profile = device_time.profiled_call(*run, device)
    if name.startswith(OURS) or name in (GEMM, GEMMS):
        timers[name] = timer
        return
    for _ in range(DEVICE_SAMPLES):
        time.sleep(PAUSE if result.gemm_flops_per_s else 0.0)
        result.device_seconds.append(timer())


def _warmed(
    implementation: Implementation, one: Callable[[float], Call], result: Result,
    warm: dict[str, float], bounds: Bounds, device: torch.device,
) -> bool:  # fmt: skip
    """Call until warm, note memory and errors, and say whether it takes part in the rounds."""
    found, result.one_call = _called(implementation, one, warm, bounds, device)
    seconds, result.extra_bytes, result.gradient_bytes, result.errors = found
    if not result.one_call:
        warm[implementation.name] = seconds
        return True
    result.seconds, result.left_out = [[seconds]], None
    result.ratio_quartiles = (seconds / warm[BASELINE],) * 3
    return False


_LAST: dict[str, Work] = {}  # the inputs drawn last: works of one size follow one another


def _inputs(suite: Suite, case: Case, device: torch.device) -> Work:
    """The inputs of a case, which depend on its size alone, and not on what is done with them.

    Raises:
        LeftOut: they need more memory than is free.
    """
    key = repr((suite.draw, case._replace(what=""), device))
    gc.unfreeze()
    if key not in _LAST:
        _LAST.clear()
    forget(device)
    if key not in _LAST:
        if (needed := input_bytes(case)) > free_bytes(device):
            raise LeftOut(_memory(needed, device))
        _LAST[key] = suite.draw(case, device)
    return dataclasses.replace(_LAST[key], case=case)


TILES: dict[str, str] = {}  # of kernels, where they are not what stands in the source


def machine(device: torch.device) -> dict[str, Any]:
    """The environment, with the versions of what this package and its peers are made of."""
    return dict(_environment(device))


@functools.cache
def _environment(device: torch.device) -> tuple[tuple[str, Any], ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = environment(device) | ({"tiles": dict(TILES)} if TILES else {})
    packages = (
        "triton",
        "transformers",
        "trl",
        "liger-kernel",
        "cut-cross-entropy",
        "veomni",
        "verl",
    )
    for package in (*packages, "quack-kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or torch.version.hip
    return tuple(found.items())


def _gemm_rate(case: Case, device: torch.device) -> float | None:
    return timing.gemm_rate(device, case.torch_dtype, case.hidden) if case.hidden else None


def _memory(needed: float, device: torch.device) -> str:
    return f"takes about {needed / 1e9:.1f} GB, and {free_bytes(device) / 1e9:.1f} GB are free"


def _prepared(implementation: Implementation, work: Work, leaves: Leaves) -> Run:
    """What restores the leaves, and the run itself."""
    needed = implementation.temporaries * work.case.rows * work.case.vocab
    if needed > free_bytes(work.device):
        raise LeftOut(_memory(needed, work.device))
    before = functools.partial(leaves.before, implementation.overwrites)
    leaves.before(overwrites=False)
    return before, functools.partial(implementation.make(work), *leaves.tensors)


def _called(
    implementation: Implementation, one: Callable[[float], Call], warm: dict[str, float],
    bounds: Bounds, device: torch.device,
) -> tuple[Call, bool]:  # fmt: skip
    """A warm call, and whether it is to be the only one of a peer: so slow that it takes no rounds.

    A slow peer that does not compile is not warmed: its first call is it.
    """
    if not implementation.may_fail:
        one(bounds.most())
        return one(bounds.most()), False
    compiles = implementation.compiles or device.type == "cuda"
    eager = warm.get(BASELINE, math.inf)  # which may have found no memory
    limit = bounds.limit(eager, compiles)
    if (
        bounds.hard or implementation.name != COMPILED
    ):  # the peer that always is, and that rows refer to
        limit = min(limit, bounds.left() - 2 * sum(warm.values()))  # of two rounds to come
    if limit < (eager if BASELINE in warm else 0):
        raise LeftOut(UNREACHED)
    first = one(limit)
    if not compiles and bounds.is_slow(first.seconds, eager):
        return first, True
    second = one(bounds.limit(eager, False))
    return second, bounds.is_slow(second.seconds, eager)


def _compare(results: dict[str, Result]) -> None:
    """Ratios to the baseline, round by round."""
    base = results[BASELINE]
    for result in results.values():
        if result.seconds and base.seconds and not result.one_call:
            pairs = zip(result.seconds, base.seconds, strict=True)
            ratios = [quartiles(mine)[1] / quartiles(theirs)[1] for mine, theirs in pairs]
            result.ratio_quartiles = quartiles(ratios)
        if result.extra_bytes is not None and base.extra_bytes:
            result.extra_ratio = result.extra_bytes / base.extra_bytes
