"""Measure every implementation of a suite on one case: time, memory, error, floor."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import timing
from .cases import Anchor, Case, cases
from .floors import Floor
from .inputs import Work
from .measure import available_bytes, environment, peak_bytes, quartiles
from .peers.guard import LeftOut, OtherWork
from .record import Result
from .truth import Outputs, Truth, errors

BASELINE = "eager"
OURS = "drift_gate"


class Implementation(NamedTuple):
    """A way to do a suite's work."""

    name: str
    make: Callable[[Work], Callable[..., Outputs]]  # raises LeftOut; run(*leaves) -> outputs
    note: str = ""
    truth: str = "same"  # key into the suite's truths; None of them: nothing to compare
    temporaries: float = 14  # bytes that it takes beside each logit, for the memory guard
    overwrites: bool = False  # its leaves: they are restored before every run


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

    def cases(self, grid: str, on_gpu: bool) -> list[Case]:
        return cases(self.anchor(on_gpu), self.works, grid, on_gpu)


def free_bytes(device: torch.device) -> float:
    """Memory that can be had, on the device or the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + _cached(device)
    return available_bytes()


def _cached(device: torch.device) -> int:
    """Bytes that the allocator holds and no tensor uses."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _forget(device: torch.device) -> None:
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


def measure(
    suite: Suite, case: Case, device: torch.device, rounds: int, wanted: Iterable[str] = ()
) -> dict[str, Result]:
    """Results of a case by implementation: those wanted (all, if none are) and the baseline.

    Whatever a peer raises is its reason to be left out; this package and the baseline must run.
    """
    chosen = [i for i in suite.implementations if not wanted or i.name in (*wanted, BASELINE)]
    floor = suite.floor(case)
    _forget(device)
    blank = functools.partial(
        Result, suite.name, case._asdict(), baseline=BASELINE, bytes_must_move=floor.bytes,
        flops=floor.flops, machine=_machine(device),
        copy_bytes_per_s=timing.copy_bandwidth(device), gemm_flops_per_s=_gemm_rate(case, device),
    )  # fmt: skip
    results = {i.name: blank(implementation=i.name, note=i.note) for i in chosen}
    if (needed := input_bytes(case)) > free_bytes(device):
        for result in results.values():
            result.left_out = _memory(needed, device)
        return results
    work = suite.draw(case, device)
    truths = suite.truths(work)
    leaves = Leaves([getattr(work, name) for name in suite.leaves])
    runs = {}
    for implementation in chosen:
        result = results[implementation.name]
        try:
            leaves.before(overwrites=False)
            run = _prepared(implementation, work, leaves)
            result.extra_bytes, outputs = _once(*run, device)
            result.gradient_bytes = _gradient_bytes(outputs, leaves)
            result.errors = errors(outputs, truths.get(implementation.truth, {}))
            runs[implementation.name] = run
        except OtherWork:
            del results[implementation.name]
        except LeftOut as reason:
            result.left_out = str(reason)
        except torch.OutOfMemoryError:
            result.left_out = "out of memory"
        except Exception as error:  # what a peer may raise is not known
            if implementation.name.startswith(OURS) or implementation.name == BASELINE:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            result.left_out = f"{type(error).__name__}: {first}"
        finally:
            outputs = None
            _forget(device)
    for name, seconds in timing.interleaved(runs, device, rounds).items():
        results[name].seconds = seconds
    _compare(results)
    return results


def _machine(device: torch.device) -> dict[str, Any]:
    """The environment, with the versions of what this package and its peers are made of."""
    return dict(_environment(device))


@functools.cache
def _environment(device: torch.device) -> tuple[tuple[str, Any], ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = environment(device)
    packages = ("triton", "trl", "liger-kernel", "cut-cross-entropy", "veomni", "verl")
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


class Leaves:
    """What gradients are taken in, and copies of it once somebody overwrites it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = [x.detach().requires_grad_() for x in tensors]
        self.copies: list[Tensor] = []
        self.dirty = False

    def before(self, overwrites: bool) -> None:
        """Restore what the last run overwrote; `overwrites` says whether the next one does."""
        if self.dirty:
            with torch.no_grad():
                for leaf, copy in zip(self.tensors, self.copies, strict=True):
                    leaf.copy_(copy)
        if overwrites and not self.copies:
            self.copies = [leaf.detach().clone() for leaf in self.tensors]
        self.dirty = overwrites

    def own(self, x: Tensor) -> bool:
        """Whether a tensor lies in their memory."""
        return x.data_ptr() in {leaf.data_ptr() for leaf in self.tensors}


def _prepared(
    implementation: Implementation, work: Work, leaves: Leaves
) -> tuple[Callable[[], None], Callable[[], Outputs]]:
    """(before, run): what is not timed, and what is."""
    needed = implementation.temporaries * work.case.rows * work.case.vocab
    if needed > free_bytes(work.device):
        raise LeftOut(_memory(needed, work.device))
    before = functools.partial(leaves.before, implementation.overwrites)
    return before, functools.partial(implementation.make(work), *leaves.tensors)


def _once(
    before: Callable[[], None], run: Callable[[], Outputs], device: torch.device
) -> tuple[int, Outputs]:
    """Run twice, the first time to compile: exact peak of extra bytes, and the outputs."""
    before()
    run()
    before()
    with peak_bytes(device) as memory:
        outputs = run()  # kept: gradients count
    return memory.peak, outputs


def _gradient_bytes(outputs: Outputs, leaves: Leaves) -> int:
    """Bytes of the gradients that do not lie in a leaf's memory."""
    grads = [x for name, x in outputs.items() if name.startswith("grad")]
    return sum(x.nbytes for x in grads if not leaves.own(x))


def _compare(results: dict[str, Result]) -> None:
    """Ratios to the baseline, round by round."""
    base = results[BASELINE]
    if not base.seconds:
        return
    for result in results.values():
        if result.seconds:
            pairs = zip(result.seconds, base.seconds, strict=True)
            ratios = [quartiles(mine)[1] / quartiles(theirs)[1] for mine, theirs in pairs]
            result.ratio_quartiles = quartiles(ratios)
        if result.extra_bytes is not None and base.extra_bytes:
            result.extra_ratio = result.extra_bytes / base.extra_bytes
