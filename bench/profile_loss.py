"""Where a loss spends its time on a CPU: `python -m drift_gate.bench.profile_loss SUITE WORK`.

Runs this package's loss at the size of the README's row under torch.profiler, with one thread, and
prints what share of the time each operation takes; `--out FOLDER` keeps it beside the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import targets
from .calls import Leaves
from .harness import Suite, load_suite
from .internals import recorded_passes
from .measure import environment
from .names import OURS

CPU = torch.device("cpu")
CALLS = 3
SHOWN = 0.01  # smallest share that has a line of its own


def profiled(suite: Suite, what: str, rows: int | None = None) -> tuple[Any, Any]:
    """(case, events by operation) of a suite's work at the size of the README's row."""
    case = next(case for case in targets.cases(suite.name, on_gpu=False) if case.what == what)
    case = case if rows is None else case._replace(rows=rows)
    work = suite.draw(case, CPU)
    leaves = Leaves([getattr(work, name) for name in suite.leaves])
    run = next(i for i in suite.implementations if i.name == OURS).make(work)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # other threads' operations are not recorded
    try:
        run(*leaves.tensors)
        x = leaves.tensors[0]
        with recorded_passes(x), profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(CALLS):
                run(*leaves.tensors)
    finally:
        torch.set_num_threads(before)
    return case, profiler.key_averages()


def table(events: Iterable[Any]) -> list[str]:
    """Operations by their share of the time, the small ones together; and milliseconds a call."""
    times = {event.key: event.self_cpu_time_total / CALLS for event in events}
    total = sum(times.values())
    large = {key: t for key, t in times.items() if t >= SHOWN * total}
    large["others"] = total - sum(large.values())
    lines = [f"{t / total:6.1%} {t / 1e3:9.1f} ms  {key}" for key, t in large.items()]
    return [*sorted(lines, reverse=True), f"100.0% {total / 1e3:9.1f} ms"]


def main() -> None:
    """Print one profile, and keep it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("work")
    parser.add_argument("--rows", type=int, help="instead of those of the README's row")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    case, events = profiled(load_suite(chosen.suite), chosen.work, chosen.rows)
    machine = environment(CPU)
    head = f"{chosen.suite}, {chosen.work}, {case}, one thread; "
    head += ", ".join(str(machine[key]) for key in ("device", "torch", "date", "commit"))
    text = "\n".join([head, *table(events)])
    print(text)
    if chosen.out is not None:
        chosen.out.mkdir(parents=True, exist_ok=True)
        name = f"profile_{chosen.suite}_{chosen.work}".lower().replace(" ", "-")
        (chosen.out / f"{name}.txt").write_text(text + "\n")


if __name__ == "__main__":
    main()
