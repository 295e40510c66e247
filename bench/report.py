"""Results for people: rich tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from . import step_report
from .compare import Change
from .growth import Growth, cells
from .names import HOST, STEP
from .record import Result
from .recorded import Cost, Recording
from .recorded import size as recorded_size
from .verdict import verdicts


def duration(seconds: float) -> str:
    """Three digits in the unit that fits."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for factor, unit in ((1e-9, "GB"), (1e-6, "MB"), (1e-3, "kB")):
        if abs(count) * factor >= 1:
            return f"{count * factor:.3g} {unit}"
    return f"{count:.0f} B"


WIDE = 100  # columns of a terminal that has room for everything
MAIN = ("grad", "grad_hidden", "log_probs", "loss")  # whose error the table shows


def error(result: Result) -> tuple[str, str]:
    """Largest and RMS error of the main output, relative to its largest entry."""
    for name in MAIN:
        if name in result.errors:
            found = result.errors[name]
            scale = found["scale"] or 1.0
            return f"{found['max'] / scale:.0e}", f"{found['rms'] / scale:.0e}"
    return "-", "-"


def spread(result: Result) -> str:
    """Half the interquartile range of the time, in percent of the median."""
    if len(result.samples) == 1:
        return "one call" if result.one_call else "one round"
    low, median, high = result.quartiles
    return f"{50 * (high - low) / median:.0f}"


def tables(results: Iterable[Result], width: int) -> Iterator[Table]:
    """One table a case, for a terminal of that width."""
    cases: dict[tuple, list[Result]] = {}
    for result in results:
        cases.setdefault((result.suite, result.size), []).append(result)
    for (suite, case), found in cases.items():
        if suite == STEP:
            yield from map(step_report.table, step_report.found_in(found))
            continue
        if suite == HOST:
            yield host_table(f"{suite}: {case}", found)
            continue
        yield table(f"{suite}: {case}", found, width >= WIDE)


def table(title: str, results: list[Result], wide: bool) -> Table:
    """All implementations of one case; what they leave out, and who is left out, stands below."""
    first = results[0]
    caption = [f"must move {size(first.bytes_must_move)}; copy {size(first.copy_bytes_per_s)}/s"]
    if first.gemm_flops_per_s:
        caption[0] += f"; GEMM {first.gemm_flops_per_s / 1e12:.3g} Tflop/s"
    if first.live_rows is not None and first.size.rows:
        caption[0] += f"; {first.live_rows / first.size.rows:.1%} of the rows live"
    measured, bad = [r for r in results if r.seconds], verdicts(results)
    for note in dict.fromkeys(r.note for r in measured if r.note):
        names = "; ".join(r.implementation for r in measured if r.note == note)
        caption.append(f"{note}: {names}")
    caption += [f"wrong: {r.implementation}: {bad[id(r)]}" for r in results if id(r) in bad]
    caption += [f"left out: {r.implementation}: {r.left_out}" for r in results if r.left_out]
    on_gpu = any(r.device_seconds for r in results)
    shown = Table(
        title=title, caption="\n".join(map(escape, caption)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption_justify="left", show_edge=False,
    )  # fmt: skip
    shown.add_column("")
    times = ("device", "call", "±%") if on_gpu else ("time", "±%")
    for name in (*times, "ratio", "GB/s", "roof", "extra", "error", "rms")[: 5 + len(times) + wide]:
        shown.add_column(name, justify="right", no_wrap=True)
    for result in measured:
        cells = ["-"] * (3 + len(times))
        cells[len(times) - 2] = "wrong"
        if id(result) not in bad:
            cells = _times(result, on_gpu)
        errors = error(result)[: 1 + wide]
        shown.add_row(result.implementation, *cells, size(result.extra_bytes or 0), *errors)
    return shown


def host_table(title: str, results: list[Result]) -> Table:
    """What a call of each function costs the host."""
    caption = [
        f"forward and backward, but where noted; ratio: to {results[0].baseline}; ops: as "
        "torch.profiler counts them; launches: all kernels on a GPU, Triton's alone without one"
    ]
    noted = [r for r in results if r.note]
    caption += [f"{r.implementation}: {r.note}" for r in noted]
    caption += [f"left out: {r.implementation}: {r.left_out}" for r in results if r.left_out]
    shown = Table(
        title=title, caption="\n".join(map(escape, caption)), box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption_justify="left", show_edge=False,
    )  # fmt: skip
    shown.add_column("")
    for name in ("time", "±%", "ratio", "Python calls", "ops", "launches"):
        shown.add_column(name, justify="right", no_wrap=True)
    for result in results:
        if not result.seconds or result.host is None:
            continue
        ratio, count = result.ratio_quartiles, result.host
        shown.add_row(
            result.implementation,
            duration(result.median),
            spread(result),
            f"{ratio[1]:.3g}" if ratio else "-",
            *(str(count.get(what, "-")) for what in ("python_calls", "ops", "launches")),
        )
    return shown


def _times(result: Result, on_gpu: bool) -> list[str]:
    """Cells of one row from the times to the roof."""
    ratio = result.ratio_quartiles
    device = [duration(result.device) if result.device else "-"] if on_gpu else []
    return [
        *device,
        duration(result.median),
        spread(result),
        f"{ratio[1]:.3g}" if ratio else "-",
        f"{result.bytes_per_s / 1e9:.2g}",
        f"{max(result.fraction_of_copy, result.fraction_of_gemm or 0):.2f}",
    ]


def calls_table(
    recording: Recording, costs: list[tuple[Cost | str, Cost | str]]
) -> Table:  # fmt: skip
    """A line for each kind of call that was recorded: ours, and as a trainer would write it."""
    caption = ["a call, forward and backward; extra: peak beyond the inputs, gradients included"]
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", show_edge=False)
    shown.add_column("")
    for name in ("calls", "valid", "time", "extra", "eager", "extra"):
        shown.add_column(name, justify="right", no_wrap=True)
    for calls, pair in zip(recording.groups, costs, strict=True):
        cells = []
        for name, one in zip((calls.function, "eager"), pair, strict=True):
            if isinstance(one, str):
                caption.append(f"{name}, {recorded_size(calls)}: {one}")
                cells += ["-", "-"]
            else:
                cells += [duration(one.seconds), size(one.extra_bytes)]
        title = f"{calls.function}, {recorded_size(calls)}"
        shown.add_row(title, f"{calls.count:,}", f"{calls.valid:.0%}", *cells)
    shown.caption = "\n".join(map(escape, caption))
    return shown


def grown(growth: Growth) -> Table:
    """Time of a token and memory against N."""
    shown = Table(
        title=f"{growth.suite}, {growth.size.what}: growth with N",
        caption="microseconds a token, extra MB beyond the gradients returned",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False,
    )  # fmt: skip
    shown.add_column("")
    for n in growth.rows:
        shown.add_column(f"{n:,}", justify="right")
    for name, row in cells(growth):
        shown.add_row(name, *row)
    return shown


LEGEND = (
    "time, or call: median; device: without the host, a CUDA graph's replay or the kernels summed; "
    "±%: half the interquartile range of the call; ratio: to eager, median over paired rounds; "
    "GB/s: bytes that must move over the time (of the device, where it is known); live rows have a "
    "gradient that is not 0, others need not be read for it; roof: the larger fraction of the copy "
    "bandwidth and of the GEMM rate, measured in this run; extra: exact peak beyond the inputs, "
    "gradients included; error: the largest of the gradient (else of the log-probs) against "
    "float64, over its largest entry; rms, on a wide terminal: its root mean square; wrong: an "
    "output that is not finite, or too far from float64 to be the same loss"
)


def comparison(found: list[Change]) -> Table:
    """B over A; a verdict where the quartiles of the times are apart."""
    caption = "relative: of the ratios to the baseline of each run"
    shown = Table(title="B over A", caption=caption, box=SIMPLE_HEAD, show_edge=False)
    shown.add_column("", overflow="fold")
    for name in ("time", "relative", "extra", ""):
        shown.add_column(name, justify="right", no_wrap=True)
    colours = {"faster": "[green]faster[/]", "slower": "[red]slower[/]", "": ""}
    for change in found:
        result = change.result
        shown.add_row(
            f"{result.suite}: {result.size}: {result.implementation}",
            f"{change.time:.3f}",
            "-" if change.ratio is None else f"{change.ratio:.3f}",
            "-" if change.memory is None else f"{change.memory:.3f}",
            colours[change.verdict],
        )
    return shown
