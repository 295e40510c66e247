"""The figures to reach, and whether they are: rows of the README's tables.

A row names a work and a limit, relative to what was measured in the same run: on a GPU the time of
the bytes that must move at the copy bandwidth, or of the three bare products; on a CPU the eager
loss. A row without a measurement says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .cases import Case
from .measure import quartiles
from .names import BASELINE, COMPILED, GEMMS, INPLACE, OURS
from .record import Result

NOT_MEASURED = "not measured"
GIB = 1 << 30
LESS = ("no gate", "no loss", "alone")  # in the note of an implementation that does less
Found = dict[str, Result]  # implementation -> its latest result on the case
Timed = Callable[["Target", Result, Found], "tuple[float, str] | None"]


class Target(NamedTuple):
    """One row: where it is measured, and what is asked."""

    work: str
    suite: str
    what: str
    rows: int
    hidden: int
    k: int
    implementation: str
    time: float  # limit of the time, over its floor on a GPU, over that of `beside` on a CPU
    memory: float | None  # limit of the extra memory: GiB on a GPU, share of eager on a CPU
    dtype: str = "bfloat16"
    beside: str = BASELINE

    @property
    def case(self) -> Case:
        return Case(self.what, self.rows, VOCAB, self.dtype, self.k, self.hidden, KIND)


VOCAB, KIND = 151_936, "peaked"
FULL = "full_loss"
OPD, TOPK, LINEAR_OPD, LINEAR_TOPK = "opd_loss", "topk_loss", "linear_opd_loss", "linear_topk_loss"
TRAIN, FORWARD, LSM = "forward and backward", "forward, with entropy", "LSM"
GIVEN = "LSM, log-probs given"

GPU = (
    Target("logits, forward, with entropy", OPD, FORWARD, 8192, 0, 0, OURS, 1.05, None),
    Target("logits, sampled-token, in place", OPD, TRAIN, 8192, 0, 0, INPLACE, 1.06, 0.01),
    Target("logits, LSM, K = 64, in place", TOPK, LSM, 8192, 0, 64, INPLACE, 1.06, 0.01),
    Target("linear, sampled-token, H = 4096", LINEAR_OPD, TRAIN, 8192, 4096, 0, OURS, 1.08, 3.2),
    Target("linear, LSM, K = 64, H = 4096", LINEAR_TOPK, LSM, 8192, 4096, 64, OURS, 0.5, 0.7),
)
LINEAR_LSM = Target(
    "linear, LSM, K = 64, H = 1024", LINEAR_TOPK, LSM, 1024, 1024, 64, OURS, 0.38, 0.05
)  # fmt: skip
WHOLE = Target(
    "logits, reverse KL, all words", FULL, "reverse", 1024, 0, 0, OURS, 1.0, 0.2, beside=COMPILED
)  # fmt: skip
CPU = (
    Target("logits, sampled-token, in place", OPD, TRAIN, 4096, 0, 0, INPLACE, 0.25, 0.02),
    Target("logits, sampled-token", OPD, TRAIN, 4096, 0, 0, OURS, 0.35, 0.2),
    Target("logits, LSM, K = 64, in place", TOPK, LSM, 1024, 0, 64, INPLACE, 0.12, 0.02),
    Target("logits, LSM, K = 64", TOPK, LSM, 1024, 0, 64, OURS, 0.12, 0.2),
    LINEAR_LSM,
    LINEAR_LSM._replace(work="the same, log-probs given", what=GIVEN, time=0.08),
    LINEAR_LSM._replace(time=0.6, dtype="float32"),
    Target("linear, sampled-token, H = 1024", LINEAR_OPD, TRAIN, 1024, 1024, 0, OURS, 1.0, 0.15),
    WHOLE,
    WHOLE._replace(work="logits, forward KL, all words", what="forward"),
    WHOLE._replace(work="logits, JSD, all words", what="jsd"),
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


def gpu_time(target: Target, ours: Result, found: Found) -> tuple[float, str] | None:
    """Time over its floor, and what the floor is."""
    if not ours.gemm_flops_per_s:
        return ours.median * ours.copy_bytes_per_s / ours.bytes_must_move, "floor"
    gemms = found.get(GEMMS)
    return None if gemms is None else (ours.median / gemms.median, "3 GEMMs")


def cpu_time(target: Target, ours: Result, found: Found) -> tuple[float, str] | None:
    """Time over that of the loss beside it: the median over paired rounds, and its quartiles."""
    beside = found.get(target.beside)
    if beside is None or beside.one_call or beside.machine != ours.machine:
        return None
    pairs = zip(ours.seconds, beside.seconds, strict=True)
    ratios = [quartiles(mine)[1] / quartiles(theirs)[1] for mine, theirs in pairs]
    low, median, high = quartiles(ratios)
    return median, f"{target.beside} ({low:.3g} to {high:.3g})"


def best_peer(found: Found) -> Result | None:
    """The fastest of the others that does the same work."""
    peers = [
        r
        for name, r in found.items()
        if not name.startswith(OURS) and name not in (BASELINE, GEMMS) and does_all(r.note)
    ]
    return min(peers, key=lambda r: r.median, default=None)


def does_all(note: str) -> bool:
    """Whether what a peer leaves out was done beside it."""
    return not any(word in note for word in LESS)


def extra_memory(target: Target, ours: Result, found: Found, gpu: bool) -> tuple[float, str] | None:
    """GiB, or the share of the eager loss's. Through a head, beyond the gradients returned too."""
    if not gpu and BASELINE not in found:
        return None
    results = [ours] if gpu else [ours, found[BASELINE]]
    extra = [(r.extra_bytes or 0) - (r.gradient_bytes if target.hidden else 0) for r in results]
    if gpu:
        return extra[0] / GIB, f"{extra[0] / GIB:.3g} GiB"
    return extra[0] / extra[1], f"{100 * extra[0] / extra[1]:.1f}%"


def asked(target: Target, gpu: bool) -> str:
    """The target in words."""
    unit = ("3 GEMMs" if target.hidden else "floor") if gpu else target.beside
    limit = ""
    if target.memory is not None:
        limit = f", {target.memory:g} GiB" if gpu else f", {100 * target.memory:g}%"
    return f"{target.time:g} x {unit}{limit}"


def line(target: Target, results: list[Result], timed: Timed, gpu: bool) -> str:
    """One row of Markdown."""
    found = find(target, results)
    size = f"{target.rows:,} x {VOCAB:,} {target.dtype}"
    head = f"| {target.work} | {size} | {asked(target, gpu)}"
    ours = found.get(target.implementation)
    ratio = None if ours is None else timed(target, ours, found)
    extra = None if ours is None else extra_memory(target, ours, found, gpu)
    if ours is None or ratio is None or extra is None:
        return f"{head} | {NOT_MEASURED} | {NOT_MEASURED} | |"
    over = ratio[0] > target.time or (target.memory is not None and extra[0] > target.memory)
    time = f"{ratio[0]:.3g} x {ratio[1]}, {1e3 * ours.median:.4g} ms{' (missed)' if over else ''}"
    return f"{head} | {time} | {extra[1]} | {_other(best_peer(found))} |"


def _other(peer: Result | None) -> str:
    """The fastest of the others, in words."""
    if peer is None:
        return ""
    ratio = f", {peer.ratio_quartiles[1]:.3g} x eager" if peer.ratio_quartiles else ""
    return f"{peer.implementation}{ratio}, {1e3 * peer.median:.4g} ms"


def tables(results: list[Result]) -> list[str]:
    """Both tables, in Markdown; results of one kind of device each."""
    on_gpu = [r for r in results if "cuda" in r.machine]
    on_cpu = [r for r in results if "cuda" not in r.machine]
    text = []
    for title, targets, mine, timed in (
        ("GPU", GPU, on_gpu, gpu_time), ("CPU", CPU, on_cpu, cpu_time),
    ):  # fmt: skip
        used = [r for target in targets for r in find(target, mine).values()]
        text += [f"Targets on a {title}, and what was measured{where(used)}:", ""]
        text += ["| work | tokens x words | at most | time | extra memory | best of the others |"]
        text += ["|---|---|---|---|---|---|"]
        text += [line(target, mine, timed, title == "GPU") for target in targets] + [""]
    return text


def where(results: list[Result]) -> str:
    """The devices and versions that figures must be read with."""
    seen = dict.fromkeys(
        f"{r.machine['device']}, torch {r.machine['torch']}, {r.machine['date']}, commit "
        f"{r.machine['commit']}"
        for r in results
    )
    return f" ({'; '.join(seen)})" if seen else ""
