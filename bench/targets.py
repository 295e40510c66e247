"""The figures to reach, and whether they are: rows of the README's tables.

A row names a work and its limits, relative to what was measured in the same run: on a GPU the time
of the bytes that must move at the copy bandwidth, or of the three bare products; on a CPU the eager
loss; on tiny inputs torch's cross_entropy. A row without a measurement says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .cases import Case
from .measure import quartiles
from .names import BASELINE, COMPILED, GEMMS, HOST, INPLACE, OURS, UNIT, WIDE
from .record import Result
from .verdict import sound

NOT_MEASURED = "not measured"
GIB = 1 << 30
LESS = ("no gate", "no loss", "alone")  # in the note of an implementation that does less
Found = dict[str, Result]  # implementation -> its latest result on the case
Ratio = tuple[float, str]  # of a time to what it is measured in, and that in words


class Target(NamedTuple):
    """One row: where it is measured, and what is asked."""

    work: str
    suite: str
    what: str
    rows: int
    hidden: int
    k: int
    implementation: str
    time: float | None  # limit of the device's time over its floor (GPU), or over that of `beside`
    memory: float | None  # limit of the extra memory: GiB on a GPU, share of eager on a CPU
    call: float | None = None  # on a GPU: limit of the time of a call, over the same
    dtype: str = "bfloat16"
    beside: str = BASELINE
    vocab: int = 151_936
    kind: str = "peaked"
    instead: tuple[float, float] | None = None  # another time and memory that would do

    @property
    def case(self) -> Case:
        return Case(
            self.what, self.rows, self.vocab, self.dtype, self.k, self.hidden, self.kind
        )  # fmt: skip


OPD, TOPK, FULL = "opd_loss", "topk_loss", "full_loss"
LINEAR_OPD, LINEAR_TOPK, LINEAR_FULL = "linear_opd_loss", "linear_topk_loss", "linear_full_loss"
TRAIN, FORWARD, LSM = "forward and backward", "forward, with entropy", "LSM"
GIVEN = "LSM, log-probs given"
SAMPLED = "LSM, drift at every 8th"
INSTALLED = "as installed"  # of the suite host: the backend that a user gets
TINY_ROWS, TINY_WORDS, TINY_HIDDEN, TINY_K = 64, 1000, 64, 8


def tiny(name: str, limit: float) -> Target:
    """Host time of a public function: tiny inputs, where everything else is."""
    return Target(
        f"{name}, tiny inputs", HOST, INSTALLED, TINY_ROWS, TINY_HIDDEN, TINY_K, name, limit, None,
        limit, "float32", UNIT, TINY_WORDS, "normal",
    )  # fmt: skip


_ENTROPY = Target("logits, forward, with entropy", OPD, FORWARD, 8192, 0, 0, OURS, 1.03, None, 1.08)
_SAMPLED = Target(
    "logits, sampled-token, in place, all rows live", OPD, TRAIN, 8192, 0, 0, INPLACE, 1.05, 0.01,
    1.08, kind="live",
)  # fmt: skip
_LSM = Target("logits, LSM, K = 64, in place", TOPK, LSM, 8192, 0, 64, INPLACE, 1.04, 0.01, 1.08)
_WHOLE = Target("logits, reverse KL", FULL, "reverse", 8192, 0, 0, OURS, 1.06, None, 1.1)
_TOP_K = Target(
    "logits, top K = 64", "top_k_log_probs", "top K", 8192, 0, 64, OURS, 2.2, 0.2, 2.3
)  # fmt: skip
_LINEAR = Target(
    "linear, sampled-token, H = 4096", LINEAR_OPD, TRAIN, 8192, 4096, 0, OURS, 1.05, 2.5, 1.06
)  # fmt: skip
_LINEAR_WHOLE = Target(  # four products, the teacher's among them
    "linear, reverse KL, H = 4096", LINEAR_FULL, "reverse", 8192, 4096, 0, OURS, 1.45, 5.0, 1.46
)  # fmt: skip
_LINEAR_LSM = Target(
    "linear, LSM, K = 64, H = 4096", LINEAR_TOPK, LSM, 8192, 4096, 64, OURS, 0.38, 0.7, 0.4
)  # fmt: skip
_GIVEN = _LINEAR_LSM._replace(
    work="linear, LSM, log-probs given", what=GIVEN, time=0.06, memory=None, call=0.07
)  # fmt: skip
_EIGHTH = _LINEAR_LSM._replace(
    work="linear, LSM, drift at every 8th position", what=SAMPLED, time=0.11, call=0.12
)  # fmt: skip
_SHORT = dict(vocab=32_000, time=1.1, memory=None, call=None)
GPU = (
    _ENTROPY,
    _SAMPLED,
    _SAMPLED._replace(work="the same, a third of the rows clipped", kind="peaked"),
    _LSM,
    _LSM._replace(work="logits, LSM, K = 64", implementation=OURS, memory=None),
    _WHOLE,
    _WHOLE._replace(work="logits, forward KL", what="forward"),
    _WHOLE._replace(work="logits, JSD", what="jsd"),
    _TOP_K,
    _LINEAR,
    _LINEAR._replace(
        work="the same, float32 logits", implementation=WIDE, time=1.15, memory=3.7, call=1.16
    ),
    _LINEAR_WHOLE,
    _LINEAR_WHOLE._replace(
        work="the same, float32 logits", implementation=WIDE, time=1.6, memory=5.5, call=1.61
    ),
    _LINEAR_LSM,  # the next has the same inputs, which are drawn once
    _GIVEN,
    _EIGHTH,
    _LINEAR_LSM._replace(work="linear, LSM, lists by a Zipf law", kind="zipf"),
    _GIVEN._replace(work="the same, log-probs given", kind="zipf"),
    _ENTROPY._replace(**_SHORT),
    _SAMPLED._replace(**_SHORT),
    _LSM._replace(**_SHORT),
    _WHOLE._replace(**_SHORT),
    _LINEAR._replace(rows=65_536, time=1.08, memory=4.7, call=1.08, instead=(1.16, 2.9)),
    tiny("opd_loss", 2.5),
    tiny("topk_loss", 2.5),
    tiny("token_log_probs", 1.5),
    tiny("gate_weights", 1.5),
    tiny("linear_opd_loss", 5.0),
    tiny("linear_topk_loss", 5.0),
)
_CPU_LINEAR_LSM = Target(
    "linear, LSM, K = 64, H = 1024", LINEAR_TOPK, LSM, 1024, 1024, 64, OURS, 0.38, 0.05
)  # fmt: skip
_CPU_WHOLE = Target(
    "logits, reverse KL, all words", FULL, "reverse", 1024, 0, 0, OURS, 1.0, 0.2, beside=COMPILED
)  # fmt: skip
_SMALL = Target(
    "linear, sampled-token, H = 64", LINEAR_OPD, TRAIN, 5248, 64, 0, OURS, 1.0, None,
    dtype="float32", vocab=99,
)  # fmt: skip
CPU = (
    Target("logits, sampled-token, in place", OPD, TRAIN, 4096, 0, 0, INPLACE, 0.25, 0.02),
    Target("logits, sampled-token", OPD, TRAIN, 4096, 0, 0, OURS, 0.35, 0.2),
    Target("logits, LSM, K = 64, in place", TOPK, LSM, 1024, 0, 64, INPLACE, 0.12, 0.02),
    Target("logits, LSM, K = 64", TOPK, LSM, 1024, 0, 64, OURS, 0.12, 0.2),
    _CPU_LINEAR_LSM,
    _CPU_LINEAR_LSM._replace(work="the same, log-probs given", what=GIVEN, time=0.08),
    _CPU_LINEAR_LSM._replace(work="the same, drift at every 8th", what=SAMPLED, time=0.13),
    _CPU_LINEAR_LSM._replace(time=0.6, dtype="float32"),
    Target("linear, sampled-token, H = 1024", LINEAR_OPD, TRAIN, 1024, 1024, 0, OURS, 1.0, 0.15),
    _CPU_WHOLE,
    _CPU_WHOLE._replace(work="logits, forward KL, all words", what="forward"),
    _CPU_WHOLE._replace(work="logits, JSD, all words", what="jsd"),
    _TOP_K._replace(rows=1024, time=0.2, memory=0.02, call=None),
    _SMALL,
    _SMALL._replace(work="linear, LSM, K = 32, H = 64", suite=LINEAR_TOPK, what=LSM, k=32),
    tiny("opd_loss", 2.5),
    tiny("topk_loss", 3.0),
    tiny("linear_opd_loss", 5.0),
    tiny("linear_topk_loss", 5.0),
)


def cases(suite: str, on_gpu: bool) -> list[Case]:
    """The sizes of a suite that the rows need."""
    wanted = (target.case for target in (GPU if on_gpu else CPU) if target.suite == suite)
    return list(dict.fromkeys(wanted))


def find(target: Target, results: Iterable[Result]) -> Found:
    """The latest results of the target's case, of all implementations that were timed."""
    case = target.case._asdict()
    return {
        r.implementation: r
        for r in results
        if r.suite == target.suite and r.case == case and r.seconds
    }


def gpu_times(target: Target, ours: Result, found: Found) -> tuple[Ratio | None, Ratio | None]:
    """Time of the device, and of a call, over their floor, and what the floor is."""
    if target.suite == HOST:
        return None, cpu_time(target, ours, found)
    if target.hidden:
        gemms = found.get(GEMMS)
        if gemms is None or gemms.machine != ours.machine:
            return None, None
        name, units = "3 GEMMs", (gemms.device, gemms.median)
    else:
        floor = floor_seconds(target, ours)
        if floor is None:
            return None, None
        name, units = "floor", (floor, floor)
    times = zip((ours.device, ours.median), units, strict=True)
    device, call = ((mine / unit, name) if mine and unit else None for mine, unit in times)
    return device, call


def floor_seconds(target: Target, ours: Result) -> float | None:
    """Of the bytes that must move, as the suite counts them today; None where that is not known.

    Results of earlier versions do not say how many rows are live.
    """
    from .harness import load_suite

    floor = load_suite(target.suite).floor(target.case)
    if ours.live_rows is None and floor.unread:
        return None
    dead = 0 if ours.live_rows is None else target.rows - ours.live_rows
    return floor.with_dead(dead).bytes / ours.copy_bytes_per_s


def cpu_time(target: Target, ours: Result, found: Found) -> Ratio | None:
    """Time over that of the call beside it: the median over paired rounds, and its quartiles."""
    unit = found.get(target.beside)
    if unit is None or unit.one_call or unit.machine != ours.machine:
        return None
    pairs = zip(ours.seconds, unit.seconds, strict=True)
    ratios = [quartiles(mine)[1] / quartiles(theirs)[1] for mine, theirs in pairs]
    low, median, high = quartiles(ratios)
    return median, f"{target.beside} ({low:.3g} to {high:.3g})"


def best_peer(found: Found) -> Result | None:
    """The fastest of the others that does the same work, and does it right."""
    peers = [
        r
        for r in sound(found.values())
        if r.host is None
        and not r.implementation.startswith(OURS)
        and r.implementation not in (BASELINE, GEMMS)
        and does_all(r.note)
    ]
    return min(peers, key=lambda r: r.median, default=None)


def does_all(note: str) -> bool:
    """Whether what a peer leaves out was done beside it."""
    return not any(word in note for word in LESS)


def extra_memory(target: Target, ours: Result, found: Found, gpu: bool) -> Ratio | None:
    """GiB, or the share of the eager loss's. Through a head, beyond the gradients returned too."""
    if ours.host is not None:
        return 0.0, "-"
    if not gpu and BASELINE not in found:
        return None
    results = [ours] if gpu else [ours, found[BASELINE]]
    extra = [(r.extra_bytes or 0) - (r.gradient_bytes if target.hidden else 0) for r in results]
    if gpu:
        return extra[0] / GIB, f"{extra[0] / GIB:.3g} GiB"
    return extra[0] / extra[1], f"{100 * extra[0] / extra[1]:.1f}%"


def asked(target: Target, gpu: bool) -> str:
    """The target in words."""
    unit = target.beside
    if gpu and target.suite != HOST:
        unit = "3 GEMMs" if target.hidden else "floor"
    limit, call = "", ""
    if target.memory is not None:
        limit = f", {target.memory:g} GiB" if gpu else f", {100 * target.memory:g}%"
    if gpu and target.call not in (None, target.time):
        call = f" (call {target.call:g} x)"
    other = "" if target.instead is None else "; or {:g} x, {:g} GiB".format(*target.instead)
    return f"{target.time:g} x {unit}{call}{limit}{other}"


def missed(
    target: Target, times: Iterable[tuple[Ratio | None, float | None]], memory: float
) -> bool:
    """Whether a limit is passed: of a time (each with its own) or of the memory."""
    limits = [(ratio[0], most) for ratio, most in times if ratio is not None and most is not None]

    def over(scale: float, most: float | None) -> bool:
        slow = any(ratio > scale * limit for ratio, limit in limits)
        return slow or (most is not None and memory > most)

    if target.instead is None or target.time is None:
        return over(1.0, target.memory)
    time, most = target.instead
    return over(1.0, target.memory) and over(time / target.time, most)


def line(target: Target, results: list[Result], gpu: bool) -> str:
    """One row of Markdown."""
    size = f"{target.rows:,} x {target.vocab:,} {target.dtype}"
    cells = _cells(target, find(target, results), gpu)
    return f"| {' | '.join([target.work, size, asked(target, gpu), *cells])} |"


def _cells(target: Target, found: Found, gpu: bool) -> list[str]:
    """What was measured: times, extra memory, and the best of the others."""
    ours = found.get(target.implementation)
    absent = [NOT_MEASURED] * (3 if gpu else 2) + [""]
    if ours is None:
        return absent
    if ours not in sound(found.values()):
        return ["wrong"] * (2 if gpu else 1) + ["-", ""]
    extra = extra_memory(target, ours, found, gpu)
    ratios = gpu_times(target, ours, found) if gpu else (cpu_time(target, ours, found),)
    if not gpu and (ratios[0] is None or extra is None):
        return absent
    limits = (target.time, target.call) if gpu else (target.time,)
    seconds = (ours.device, ours.median) if gpu else (ours.median,)
    times = [_shown(*one) for one in zip(ratios, seconds, strict=True)]
    if missed(target, zip(ratios, limits, strict=True), extra[0] if extra else 0.0):
        times[-1] += " (missed)"
    return [*times, extra[1] if extra else "-", _other(best_peer(found))]


def _shown(ratio: Ratio | None, seconds: float | None) -> str:
    """A time in words; without its ratio where that is not known."""
    if seconds is None:
        return "-"
    return f"{f'{ratio[0]:.3g} x {ratio[1]}, ' if ratio else ''}{1e3 * seconds:.4g} ms"


def _other(peer: Result | None) -> str:
    """The fastest of the others, in words."""
    if peer is None:
        return ""
    ratio = f", {peer.ratio_quartiles[1]:.3g} x eager" if peer.ratio_quartiles else ""
    return f"{peer.implementation}{ratio}, {1e3 * peer.median:.4g} ms"


def by_device(results: Iterable[Result], gpu: bool, rows: Iterable[Target]) -> list[list[Result]]:
    """The results of each device on which one of the rows was measured; a list without any else.

    Devices are not mixed: what a row compares was measured side by side.
    """
    found: dict[str, list[Result]] = {}
    for r in results:
        if ("cuda" in r.machine) == gpu:
            found.setdefault(r.machine["device"], []).append(r)
    mine = [found[name] for name in sorted(found)]
    return [one for one in mine if any(row.implementation in find(row, one) for row in rows)] or [
        []
    ]


def tables(results: list[Result]) -> list[str]:
    """A table for each device, in Markdown."""
    text = []
    each = [("GPU", GPU, one) for one in by_device(results, True, GPU)]
    each += [("CPU", CPU, one) for one in by_device(results, False, CPU)]
    for title, targets, mine in each:
        gpu = title == "GPU"
        used = [r for target in targets for r in find(target, mine).values()]
        times = "device | call" if gpu else "time"
        text += [f"Targets on a {title}, and what was measured{where(used)}:", ""]
        text += [
            f"| work | tokens x words | at most | {times} | extra memory | best of the others |"
        ]
        text += [f"|---|---|---|---|---|---|{'---|' if gpu else ''}"]
        text += [line(target, mine, gpu) for target in targets] + [""]
    return text


def where(results: list[Result]) -> str:
    """The devices and versions that figures must be read with."""
    seen = dict.fromkeys(
        f"{r.machine['device']}, torch {r.machine['torch']}, {r.machine['date']}, commit "
        f"{r.machine['commit']}"
        for r in results
    )
    return f" ({'; '.join(seen)})" if seen else ""
