"""The README's one table of figures: a loss, its gradient, and the others' best known ways."""

from __future__ import annotations

from collections.abc import Iterable

from . import targets
from .names import BASELINE, COMPILED, INPLACE, OURS
from .record import Result
from .verdict import sound

LINES = (  # as the README calls it, suite, work, implementation
    ("`opd_loss`, in place", targets.OPD, targets.TRAIN, INPLACE),
    ("`topk_loss` (LSM, K = 64), in place", targets.TOPK, targets.LSM, INPLACE),
    ("`full_loss`, reverse KL", targets.FULL, "reverse", OURS),
    ("`linear_opd_loss`, from the head", targets.LINEAR_OPD, targets.TRAIN, OURS),
    ("`linear_topk_loss`, from the head", targets.LINEAR_TOPK, targets.LSM, OURS),
)
OTHERS = (BASELINE, COMPILED)


def markdown(results: Iterable[Result]) -> list[str]:
    """Lines of the table: time, and memory beyond the inputs, of eager, compiled and this."""
    results = list(results)
    text = [
        "| forward and backward | tokens x words | eager | torch.compile | drift_gate |",
        "|---|---|---|---|---|",
    ]
    each = [(targets.GPU, mine) for mine in targets.by_device(results, True, targets.GPU)]
    each += [(targets.CPU, mine) for mine in targets.by_device(results, False, targets.CPU)]
    for rows, mine in each:
        chosen = [(name, _target(rows, *rest)) for name, *rest in LINES]
        found = [(name, target, targets.find(target, mine)) for name, target in chosen]
        shown = [one for one in found if one[1].implementation in one[2]]
        if not shown:
            continue
        machine = shown[0][2][shown[0][1].implementation].machine
        text.append(f"| **{machine['device']}**, torch {machine['torch']} | | | | |")
        for name, target, each in shown:
            right = {r.implementation: r for r in sound(each.values())}
            cells = [_cell(right.get(one)) for one in (*OTHERS, target.implementation)]
            size = f"{target.rows:,} x {target.vocab:,}"
            size += f", H {target.hidden:,}" if target.hidden else ""
            text.append(f"| {' | '.join([name, size, *cells])} |")
    return text


def _target(rows: Iterable[targets.Target], suite: str, what: str, name: str) -> targets.Target:
    """The first row of the long table that is about this, and that all were measured on."""
    wanted = suite, what, name, "peaked"
    return next(t for t in rows if (t.suite, t.what, t.implementation, t.kind) == wanted)


def _cell(result: Result | None) -> str:
    """Milliseconds and GiB; nothing without a result that is right."""
    if result is None:
        return ""
    gib = (result.extra_bytes or 0) / targets.GIB
    memory = f"{gib:.3g} GiB" if gib >= 0.1 else f"{1024 * gib:.2g} MiB"
    return f"{_milliseconds(1e3 * result.median)} ms, {memory}"


def _milliseconds(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
