"""What a call costs the host: time, Python calls, ops and launches, on inputs too tiny to matter.

Forward and backward of every public function on 64 rows of 1000 words, beside torch's
cross_entropy, the unit; a loss of ten eager lines; and peers. On a CPU the route through Triton
too, with a driver that launches nothing: its launch code is Python, and runs anywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import drift_gate
from drift_gate import eager

from . import device_time, inert, targets, timing
from .bounds import Bounds
from .cases import Case
from .harness import CUT, machine
from .inert import Counter
from .measure import quartiles
from .names import BASELINE, HOST, UNIT
from .peers.guard import LeftOut, load, on_gpu_only
from .record import Result
from .targets import INSTALLED

LAUNCHLESS = "Triton, nothing launched"
ROUNDS = 12  # for each paired round of the other suites: a call takes a millisecond
WARM = 3
SEQUENCES = 4
OP = re.compile(r"(?!autograd::|profiler::)\w+::[\w.]+$")  # as torch.profiler names it
Calls = Callable[[], object]


@dataclasses.dataclass
class Inputs:
    """Tiny tensors of all functions, [4, 16, ...]; `backend` where a function takes one."""

    device: torch.device
    backend: dict[str, str]
    logits: Tensor  # [4, 16, 1000], as the teacher's
    teacher_logits: Tensor
    labels: Tensor
    old: Tensor
    ids: Tensor  # [4, 16, 8]
    log_q: Tensor
    hidden: Tensor  # [4, 16, 64], as the teacher's
    teacher_hidden: Tensor
    weight: Tensor  # [1000, 64]


def draw(case: Case, device: torch.device) -> Inputs:
    """Noise; leaves require gradients."""
    generator = torch.Generator().manual_seed(0)
    shape = SEQUENCES, case.rows // SEQUENCES

    def noise(*size: int, grad: bool = False) -> Tensor:
        return torch.randn(*size, generator=generator).to(device).requires_grad_(grad)

    words = torch.rand(*shape, case.vocab, generator=generator).topk(case.k).indices
    return Inputs(
        device, {"backend": "triton"} if case.what == LAUNCHLESS else {},
        noise(*shape, case.vocab, grad=True), noise(*shape, case.vocab),
        torch.randint(case.vocab, shape, generator=generator).to(device),
        noise(*shape), words.to(device), noise(*shape, case.k),
        noise(*shape, case.hidden, grad=True), noise(*shape, case.hidden),
        noise(case.vocab, case.hidden, grad=True),
    )  # fmt: skip


def trained(loss: Callable[..., Any], *leaves: Tensor) -> Calls:
    """Forward and backward; `loss` returns a LossOutput or a tensor."""

    def run() -> object:
        value = loss(*leaves)
        return torch.autograd.grad(getattr(value, "loss", value), leaves)

    return run


def _unit(x: Inputs) -> Calls:
    logits, labels = x.logits.detach().flatten(0, 1).requires_grad_(), x.labels.flatten()
    return trained(lambda z: functional.cross_entropy(z, labels), logits)


def _eager(x: Inputs) -> Calls:
    logits = x.logits.detach().flatten(0, 1).requires_grad_()
    labels, old, ones = x.labels.flatten(), x.old.flatten(), torch.ones_like(x.old).flatten()
    blocks = eager.block_numbers([x.labels.shape[1]] * SEQUENCES, 64).to(x.device)
    return trained(lambda z: eager.loss(z, labels, old, old + 0.1, ones, blocks), logits)


def _trl(x: Inputs) -> Calls:
    function = load("trl.trainer.utils", "selective_log_softmax")
    return trained(lambda z: function(z, x.labels).sum(), x.logits)


def _liger(x: Inputs) -> Calls:
    function = load("liger_kernel.transformers.functional", "liger_cross_entropy")
    on_gpu_only(x.device)
    logits, labels = x.logits.detach().flatten(0, 1), x.labels.flatten()
    return lambda: trained(
        lambda z: function(z, labels), logits.clone().requires_grad_()
    )()  # overwrites them


def _sum(pair: tuple[Tensor, Tensor | None]) -> Tensor:
    return pair[0].sum()


def _gather(function: Callable[..., Any], *leaves: Tensor, x: Inputs) -> Calls:
    def loss(*leaves: Tensor) -> Tensor:
        z, lse = function(*leaves, x.ids, **x.backend)
        return (lse - z.mean(-1)).mean()

    return trained(loss, *leaves)


def _newline_spans(x: Inputs) -> Calls:
    return lambda: drift_gate.newline_spans(x.labels, [1, 2])


def _gate_weights(x: Inputs) -> Calls:
    return lambda: drift_gate.gate_weights(x.old, x.old + 0.1)


class Entry(NamedTuple):
    """A function, and the call of it that is measured."""

    name: str
    make: Callable[[Inputs], Calls]  # raises LeftOut
    note: str = ""
    routed: bool = True  # whether it takes the name of a backend


def _of(name: str, logits: bool, *arguments: str) -> Entry:
    """A public loss of logits, or of hidden states and head, and these fields of the inputs."""
    function = getattr(drift_gate, name)

    def make(x: Inputs) -> Calls:
        given = [getattr(x, argument) for argument in arguments]
        leaves = [x.logits] if logits else [x.hidden, x.weight]
        return trained(lambda *leaves: function(*leaves, *given, **x.backend), *leaves)

    return Entry(name, make)


def _log_probs(name: str, logits: bool) -> Entry:
    function = getattr(drift_gate, name)

    def make(x: Inputs) -> Calls:
        leaves = [x.logits] if logits else [x.hidden, x.weight]
        return trained(lambda *leaves: _sum(function(*leaves, x.labels, **x.backend)), *leaves)

    return Entry(name, make)


def _top_k(name: str, *arguments: str) -> Entry:
    function = getattr(drift_gate, name)

    def make(x: Inputs) -> Calls:
        given = [getattr(x, argument).detach() for argument in arguments]
        return lambda: function(*given, x.ids.shape[-1], **x.backend)

    return Entry(name, make, "forward alone")


_SAMPLED = "labels", "old", "old"
_LISTED = "labels", "old", "ids", "log_q"
OURS = (
    _of("opd_loss", True, *_SAMPLED),
    _of("topk_loss", True, *_LISTED),
    _of("full_loss", True, "labels", "old", "teacher_logits"),
    _log_probs("token_log_probs", True),
    Entry("gather_lse", lambda x: _gather(drift_gate.gather_lse, x.logits, x=x)),
    Entry("gate_weights", _gate_weights, "forward alone", routed=False),
    Entry("newline_spans", _newline_spans, "forward alone", routed=False),
    _of("linear_opd_loss", False, *_SAMPLED),
    _of("linear_topk_loss", False, *_LISTED),
    _of("linear_full_loss", False, "labels", "old", "teacher_hidden", "weight"),
    _log_probs("linear_token_log_probs", False),
    Entry(
        "linear_gather_lse",
        lambda x: _gather(drift_gate.linear_gather_lse, x.hidden, x.weight, x=x),
    ),
    _top_k("top_k_log_probs", "logits"),
    _top_k("linear_top_k_log_probs", "hidden", "weight"),
)
ENTRIES = (
    Entry(UNIT, _unit),
    Entry(BASELINE, _eager, "ten lines"),
    Entry("TRL selective_log_softmax", _trl, "log-probs alone"),
    Entry("Liger cross_entropy", _liger, "cross entropy alone, of a clone that it overwrites"),
    *OURS,
)


class HostSuite(NamedTuple):
    """The suite as the others look to those who run them."""

    name: str
    works: tuple[str, ...]
    implementations: tuple[Entry, ...]

    def cases(self, grid: str, on_gpu: bool) -> list[Case]:
        """The README's size, in every grid but that of growth; on a CPU with both routes."""
        if grid == "growth":
            return []
        first = targets.cases(self.name, on_gpu)
        if on_gpu or grid in ("targets", "dry"):
            return first
        return [*first, *(case._replace(what=LAUNCHLESS) for case in first)]

    def chosen(self, grid: str, on_gpu: bool) -> list[Entry]:
        return list(self.implementations)

    def measure(
        self, case: Case, device: torch.device, bounds: Bounds, wanted: Iterable[str] = (),
        keep: Callable[[dict[str, Result]], object] = lambda results: None,
    ) -> dict[str, Result]:  # fmt: skip
        """Results by function: those wanted (all, if none are) and the unit."""
        chosen = [e for e in self.implementations if not wanted or e.name in (*wanted, UNIT)]
        if case.what == LAUNCHLESS:
            chosen = [e for e in chosen if (e in OURS and e.routed) or e.name == UNIT]
        results = {entry.name: _blank(entry, case, device) for entry in chosen}
        keep(results)
        with _one_thread(), _driver(case, results) as counter:
            _measure(chosen, draw(case, device), results, counter, bounds)
        keep(results)
        return results


def _measure(
    chosen: list[Entry], inputs: Inputs, results: dict[str, Result], counter: Counter | None,
    bounds: Bounds,
) -> None:  # fmt: skip
    runs: dict[str, Calls] = {}
    for entry in chosen:
        result = results[entry.name]
        try:
            run = entry.make(inputs)
            for _ in range(WARM):
                run()
            result.host = counts(run, inputs.device, counter)
        except LeftOut as reason:
            result.left_out = str(reason)
        except Exception as error:  # what a peer may raise is not known
            if counter is None and (entry in OURS or entry.name == UNIT):
                raise
            # Without launches a function may stumble over what a kernel was to compute.
            result.left_out = f"{type(error).__name__}: {error}"
        else:
            runs[entry.name] = run
    for name, seconds in _rounds(runs, inputs.device, bounds).items():
        results[name].seconds, results[name].left_out = [[s] for s in seconds], None
    for name in runs:
        unit, mine = results[UNIT].samples, results[name].samples
        ratios = [a / b for a, b in zip(mine, unit, strict=True)]
        results[name].ratio_quartiles = quartiles(ratios)


def _rounds(runs: dict[str, Calls], device: torch.device, bounds: Bounds) -> dict[str, list[float]]:
    """Seconds of a call of each, in turn, until the call returns; a GPU may still be at work."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    for i in range(ROUNDS * bounds.rounds):
        if i and time.monotonic() > bounds.end:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            found[name].append(time.perf_counter() - start)
            del result
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return found


def counts(run: Calls, device: torch.device, counter: Counter | None) -> dict[str, int]:
    """What one warm call does: Python calls, ops that the dispatcher sees, launches."""
    found = {"python_calls": python_calls(run)}
    before = counter.launches if counter else 0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * (device.type == "cuda"))]
    with profile(activities=activities) as profiler:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.profiler.kineto_results.events()
    found["ops"] = sum(OP.match(event.name()) is not None for event in events)
    if counter is not None:
        found["launches"] = counter.launches - before
    elif device.type == "cuda":
        found["launches"] = sum(
            event.count
            for event in device_time.device_events(profiler)
            if not event.key.startswith("Mem")
        )
    return found


def python_calls(run: Calls) -> int:
    """Calls of Python functions, those of the backward included."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    with torch.autograd.set_multithreading_enabled(False):  # the backward in this thread, too
        before = sys.getprofile()
        sys.setprofile(seen)
        try:
            run()
        finally:
            sys.setprofile(before)
    return count - 1  # run itself


def _blank(entry: Entry, case: Case, device: torch.device) -> Result:
    return Result(
        HOST, case._asdict(), entry.name, entry.note, UNIT, bytes_must_move=0, flops=0,
        machine=machine(device), copy_bytes_per_s=timing.copy_bandwidth(device), left_out=CUT,
    )  # fmt: skip


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _driver(case: Case, results: dict[str, Result]) -> AbstractContextManager[Counter | None]:
    if case.what == LAUNCHLESS:
        return inert.launching_nothing()
    return contextlib.nullcontext()


SUITE = HostSuite(HOST, (INSTALLED, LAUNCHLESS), ENTRIES)
