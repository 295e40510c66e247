"""Tile sizes, warps and stages of every pass, timed: `python -m drift_gate.bench.sweep`.

The launchers take their tiles from constants of their modules, and pass options to the kernels they
launch. A configuration sets the former and adds to the latter, for the length of a block; no kernel
knows of it. On a machine without a GPU the kernels run in Triton's interpreter on tiny inputs: that
shows that every configuration can be set, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import floors, timing
from .cases import Case
from .inputs import Work, draw, draw_rows
from .internals import GateRule, PositionRule, ReduceRule, RowData
from .measure import device_here, environment, quartiles

Options = dict[str, Any]
OPTIONS = ("num_warps", "num_stages")  # of a launch; the rest are constants of the module,
# or fields of a NamedTuple that is one: "TILES.rows"


class Sweep(NamedTuple):
    """A pass, and what to try."""

    module: str  # of drift_gate.kernels
    kernels: tuple[str, ...]  # whose launches take the options
    grid: dict[str, tuple[Any, ...]]
    prepare: Callable[[Work], Callable[[ModuleType], object]]  # -> run(module)
    floor: Callable[[Case], floors.Floor]
    case: Case


class WithOptions:
    """A kernel whose launches take further options."""

    def __init__(self, kernel: Any, options: Options) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self.kernel[grid]
        return lambda *arguments, **keywords: launch(*arguments, **(keywords | self.options))


@contextlib.contextmanager
def configured(module: ModuleType, kernels: tuple[str, ...], settings: Options) -> Iterator[None]:
    """Set the constants of a kernel module and the options of its launches; both are put back.

    Raises:
        AttributeError: the module has no such constant, or no such kernel.
    """
    options = {name: value for name, value in settings.items() if name in OPTIONS}
    replaced: dict[str, Any] = {}
    for place, value in settings.items():
        name, _, field = place.partition(".")
        now = replaced.get(name, getattr(module, name, None))
        if place not in OPTIONS:
            replaced[name] = now._replace(**{field: value}) if field else value
    replaced |= {name: WithOptions(getattr(module, name), options) for name in kernels}
    before = {name: getattr(module, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _listed(work: Work) -> tuple[torch.Tensor, ...]:
    """(ids, maximum, log_sum, gathered) of the labels, as `scan` gives them."""
    now, lse = work.now64, work.lse64
    return (
        work.labels[:, None],
        lse.float(),
        torch.zeros_like(lse).float(),
        (now + lse).float()[:, None],
    )


def _scan(work: Work) -> Callable[[ModuleType], object]:
    logits, ids = work.logits[None], work.labels[:, None]
    return lambda module: module.scan(logits, ids, None, 1.0, True)


def _expand(work: Work) -> Callable[[ModuleType], object]:
    logits, out = work.logits[None], torch.empty_like(work.logits)[None]
    slope = torch.randn(work.case.rows, device=work.device)
    arguments = logits, *_listed(work), None, slope, -slope[:, None], 1.0, out
    return lambda module: module.expand(*arguments)


def _rows(work: Work) -> tuple[Any, ...]:
    """Data of one sequence and its gate, as the row functions take them."""
    valid = torch.ones_like(work.old, dtype=torch.bool)
    data = RowData(valid, work.now, work.old, None, None, work.case.rows)
    return data, GateRule("block", 64, tau=1.0, normalize="batch")


def _weigh(work: Work) -> Callable[[ModuleType], object]:
    from drift_gate.kernels import rows

    arguments = _rows(work)
    return lambda module: rows.weigh(*arguments)


def _finish(work: Work) -> Callable[[ModuleType], object]:
    arguments = *_rows(work), None, None, work.teacher
    rules = PositionRule("ppo", dual=3.0), ReduceRule(1.0, "tokens")
    return lambda module: module.finish(*arguments, *rules)


def _finish_spans(work: Work) -> Callable[[ModuleType], object]:
    """The gate over spans of 30 rows, whose ids no one sorted."""
    data, gate = _rows(work)
    spans = torch.arange(work.case.rows, device=work.device) // 30 * 7919 % 1_000_003
    data, gate = data._replace(spans=spans), gate._replace(granularity="span")
    rules = PositionRule("ppo", dual=3.0), ReduceRule(1.0, "tokens")
    return lambda module: module.finish(data, gate, None, None, work.teacher, *rules)


def _topk_rows(work: Work) -> Callable[[ModuleType], object]:
    present = torch.ones_like(work.scores, dtype=torch.bool)
    valid = work.old == work.old
    arguments = work.scores, None, work.log_q, present, valid, "reverse", "renormalized", 0.5
    return lambda module: module.topk_rows(*arguments)


def _weigh_words(work: Work) -> Callable[[ModuleType], object]:
    slope = torch.randn(work.ids.shape, device=work.device)
    return lambda module: module.weigh_words(work.weight, work.ids, slope)


def _gather(work: Work) -> Callable[[ModuleType], object]:
    valid = torch.ones_like(work.old, dtype=torch.bool)
    return lambda module: module.gather(work.hidden, work.weight, None, work.ids, valid)


def _by_word(work: Work) -> Callable[[ModuleType], object]:
    return lambda module: module.by_word(work.ids, work.case.vocab)


def _sum_words(work: Work) -> Callable[[ModuleType], object]:
    slope = torch.randn(work.ids.shape, device=work.device)
    sorted_once: list[Any] = []

    def run(module: ModuleType) -> None:
        if not sorted_once:
            sorted_once.extend(module.by_word(work.ids, work.case.vocab))
        module.sum_words(work.hidden, slope, *sorted_once)

    return run


def _select(work: Work) -> Callable[[ModuleType], object]:
    logits, k = work.logits[None], work.case.k
    return lambda module: module.select(logits, k, None, 1.0)


def _divergence(direction: str) -> Callable[[Work], Callable[[ModuleType], object]]:
    def prepare(work: Work) -> Callable[[ModuleType], object]:
        logits, teacher = work.logits[None], work.teacher_logits[None]
        valid = work.old == work.old
        arguments = logits, teacher, work.labels, valid, 1.0, 1.0, direction, 0.5, False
        return lambda module: module.divergence(*arguments)

    return prepare


def _divergence_grad(work: Work) -> Callable[[ModuleType], object]:
    logits, teacher = work.logits[None], work.teacher_logits[None]
    valid, zero = work.old == work.old, torch.zeros_like(work.old)
    lse = work.lse64.float()
    statistics = torch.stack([lse, zero, lse, zero, zero + 1])
    options = 1.0, 1.0, "reverse", 0.5, torch.empty_like(logits)
    return lambda module: module.divergence_grad(
        logits, teacher, statistics, valid, zero + 1, *options
    )


def _lane_tiles(warps: tuple[int, ...], loads: tuple[int, ...]) -> tuple[Any, ...]:
    """Tables of `scan` with one entry, for rows of every length."""
    return tuple(((2**31, w, n),) for w in warps for n in loads)


def sweeps(small: bool) -> list[Sweep]:
    """Every pass, at the size that the README quotes."""
    size = (3, 200, "float32") if small else (8192, 151_936, "bfloat16")
    logits, rows = Case("", *size), Case("", 70 if small else 8192, 0, "float32")
    many = rows if small else rows._replace(rows=65_536)
    short = logits if small else logits._replace(vocab=32_000)
    lanes = {"TILES": _lane_tiles((4, 2, 8, 1), (4, 2, 8))}
    short_lanes = {"TILES": _lane_tiles((2, 4, 1, 8), (4, 2, 8))}
    pair = {"NUM_WARPS": (4, 2, 8), "LOADS": (2, 1, 4)}
    tiles = {"TILE_BYTES": (8192, 4096, 16_384), "num_warps": (8, 4, 16)}
    alone = {"TILES_PER_PROGRAM": (8, 4, 16, 1), **tiles}
    paired = {"TILES_PER_PROGRAM": (4, 8, 2, 1), **tiles}
    listed = rows._replace(k=8 if small else 64)
    blocks = {"num_warps": (1, 2, 4)}
    token = {"TILES.rows": (512, 256, 1024), "num_warps": (4, 8, 16)}
    k, width = (8, 40) if small else (64, 4096)
    headed = logits._replace(k=k, hidden=width)
    gathered = {
        "CACHE": (0 if small else 32 << 20, 1 << 40), "SLICE": (128, 64, 256),
        "SLICE_ENTRIES": (16, 32, 64), "SLICE_WARPS": (1, 2, 4),
    }  # fmt: skip
    weigh = {
        "WEIGH_WIDTH": (512, 128, 256, 64), "WEIGH_ENTRIES": (2, 4, 8), "WEIGH_WARPS": (1, 2, 4)
    }  # fmt: skip
    summed = {"SUM_WIDTH": (1024, 512, 2048), "SUM_WARPS": (2, 1, 4), "SEGMENT": (128, 64, 256)}
    select = {
        "WARPS": (8, 16, 4), "READ": ((64, 16), (64, 32), (32, 32), (64, 8)),
        "READ_WARPS": (4, 8, 2),
    }  # fmt: skip
    topk = {"ELEMENTS": (2048, 1024, 4096), "num_warps": (4, 8)}

    def entropy(case: Case) -> floors.Floor:
        return floors.scan(case, 1, with_entropy=True)

    def one(case: Case) -> floors.Floor:
        return floors.expand(case, 1)

    def two_reads(case: Case) -> floors.Floor:
        return floors.divergence(case) + floors.divergence(case)

    return [
        Sweep("scan", ("_scan",), lanes, _scan, entropy, logits),
        Sweep("scan", ("_scan",), short_lanes, _scan, entropy, short),
        Sweep("expand", ("_expand",), alone, _expand, one, logits),
        Sweep("divergence", (), pair, _divergence("reverse"), floors.divergence, logits),
        Sweep("divergence", (), pair, _divergence("jsd"), two_reads, logits),
        Sweep(
            "divergence_grad", ("_divergence_grad",), paired, _divergence_grad,
            floors.divergence_grad, logits,
        ),
        Sweep("blocks", ("_row_blocks",), blocks, _weigh, floors.rows, rows),
        Sweep("rows", ("_sampled_token",), token, _finish, floors.rows, rows),
        Sweep("rows", (), {}, _finish, floors.rows, many),  # shares of 65,536 rows of 32,000 words
        Sweep("rows", (), {}, _finish_spans, floors.rows, many),
        Sweep("topk", ("_topk_rows",), topk, _topk_rows, floors.topk_rows, listed),
        Sweep("select", (), select, _select, floors.top_k, logits._replace(k=k)),
        Sweep("gather", (), gathered, _gather, floors.sparse, headed),
        Sweep("sparse", (), weigh, _weigh_words, floors.sparse, headed),
        Sweep("sparse", (), {"KEYS": (1024, 4096)}, _by_word, floors.sparse, headed),
        Sweep("sparse", (), summed, _sum_words, floors.sparse, headed),
    ]  # fmt: skip


def search(
    grid: dict[str, tuple[Any, ...]], measure: Callable[[Options], float], end: float
) -> None:
    """Measure the present configuration, then one axis after the other from the best so far.

    What time is left goes to the other products.
    """
    best = {name: values[0] for name, values in grid.items()}
    known = {tuple(best.values()): measure(best)}

    def tried(settings: Options) -> float:
        key = tuple(settings.values())
        if key not in known and time.monotonic() < end:
            known[key] = measure(settings)
        return known.get(key, math.inf)

    for name, values in grid.items():
        best = min(({**best, name: value} for value in values), key=tried)
    for values in itertools.product(*grid.values()):
        tried(dict(zip(grid, values, strict=True)))


@functools.cache
def _inputs(case: Case, device: torch.device) -> Work:
    """Drawn once for the passes that share a size."""
    return draw(case, device, full_teacher=True) if case.vocab else draw_rows(case, device)


def run(sweep: Sweep, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Time configurations until the seconds are spent; the first is the present one."""
    module = importlib.import_module(f"drift_gate.kernels.{sweep.module}")
    case, on_gpu = sweep.case, device.type == "cuda"
    once, bandwidth = sweep.prepare(_inputs(case, device)), timing.copy_bandwidth(device)
    results: list[dict[str, Any]] = []

    def measure(settings: Options) -> float:
        result: dict[str, Any] = {"pass": sweep.module, "words": case.vocab}
        result["settings"] = dict(settings)
        results.append(result)
        try:
            with configured(module, sweep.kernels, settings):
                once(module)  # compiles
                samples = timing.launches(lambda: once(module), device, 20 if on_gpu else 1)
        except Exception as error:  # out of registers or of shared memory: not to be had here
            first = (str(error).strip().splitlines() or [""])[0]
            result["left_out"] = f"{type(error).__name__}: {first}"
            return math.inf
        median = result["seconds"] = quartiles(samples)[1]
        result["fraction_of_copy"] = sweep.floor(case).bytes / median / bandwidth
        return median

    search(_present_first(module, sweep.grid), measure, time.monotonic() + seconds)
    return results


def _present_first(
    module: ModuleType, grid: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Each axis with what its module has now in front; options of a launch are the sweep's."""
    found = {}
    for name, values in grid.items():
        place, _, field = name.partition(".")
        now = getattr(module, place, values[0])
        now = getattr(now, field) if field else now
        found[name] = (now, *(value for value in values if value != now))
    return found


def summary(results: list[dict[str, Any]]) -> str:
    """The best configuration of one pass, beside the present one."""
    timed = [r for r in results if "seconds" in r]
    lines = [f"{results[0]['pass']}: {len(timed)} of {len(results)} configurations ran"]
    if timed:
        lines.append(f"  best     {_shown(min(timed, key=lambda r: r['seconds']))}")
    return "\n".join([*lines, f"  present  {_shown(results[0])}"])


WORTH = 0.97  # of the present time: what is not faster by this much is left as it is


def best(path: Path, passes: tuple[str, ...]) -> dict[str, Options]:
    """Of each of these passes the constants that a sweep found faster; for `configured`."""
    sweeps_of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in json.loads(path.read_text())["results"] if path.exists() else []:
        if result["pass"] in passes and "seconds" in result:
            sweeps_of.setdefault((result["pass"], *result["settings"]), []).append(result)
    found: dict[str, Options] = {}
    for (name, *_), results in sweeps_of.items():
        fastest = min(results, key=lambda r: r["seconds"])
        if fastest["seconds"] < WORTH * results[0]["seconds"]:
            found.setdefault(name, {}).update(fastest["settings"])
    return found


def _shown(result: dict[str, Any]) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    if "left_out" in result:
        return f"failed with {settings}: {result['left_out']}"
    fraction = result["fraction_of_copy"]
    return f"{1e3 * result['seconds']:.4g} ms ({fraction:.3f} of copy) with {settings}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120, help="for all passes together")
    parser.add_argument("--out", type=Path, default=Path("sweep.json"))
    parser.add_argument("--only", nargs="*", default=[], help="passes; all, if left out")
    parser.add_argument("--add", action="store_true", help="to what the file has already")
    parser.add_argument("--small", action="store_true", help="tiny inputs, as without a GPU")
    arguments = parser.parse_args()
    with device_here() as device:
        run_all(arguments, device)


def run_all(arguments: argparse.Namespace, device: torch.device) -> None:
    """Each pass for its share of the time that is left; the file has what was measured so far."""
    wanted, small = arguments.only, arguments.small or device.type != "cuda"
    chosen = [s for s in sweeps(small) if not wanted or s.module in wanted]
    end = time.monotonic() + arguments.seconds
    results: list[dict[str, Any]] = []
    if arguments.add and arguments.out.exists():
        results = json.loads(arguments.out.read_text())["results"]
    for i, sweep in enumerate(chosen):
        share = (end - time.monotonic()) / (len(chosen) - i)
        found = run(sweep, device, share)
        print(summary(found), flush=True)
        results += found
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        data = {"machine": environment(device), "results": results}
        arguments.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
