"""Profile the pass farthest from the copy bandwidth: `python -m drift_gate.bench.profile_pass`.

Which one that is, `sweep.json` says. Runs it a few times under torch.profiler; with --plain under
nothing, for a profiler that watches from outside (ncu).
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .inputs import draw
from .measure import device_here
from .sweep import sweeps

LAUNCHES = 3


def slowest(path: Path) -> str:
    """The vocabulary pass whose present configuration reaches the least of the copy bandwidth.

    The first pass where the file has none: the sweep was cut short.
    """
    passes = [sweep.module for sweep in sweeps(small=True) if sweep.case.vocab]
    results = json.loads(path.read_text())["results"] if path.exists() else []
    present: dict[str, float] = {}
    for result in results:
        if result["pass"] in passes and "seconds" in result:
            present.setdefault(result["pass"], result["fraction_of_copy"])
    return min(present, key=present.__getitem__) if present else passes[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", type=Path, default=Path("sweep.json"))
    parser.add_argument("--out", type=Path, default=Path("profile.txt"))
    parser.add_argument("--plain", action="store_true", help="run it, and profile nothing")
    arguments = parser.parse_args()
    with device_here() as device:
        profile_slowest(arguments, device)


def profile_slowest(arguments: argparse.Namespace, device: torch.device) -> None:
    name = slowest(arguments.sweep)
    on_gpu = device.type == "cuda"
    sweep = next(s for s in sweeps(small=not on_gpu) if s.module == name)
    module = importlib.import_module(f"drift_gate.kernels.{name}")
    run = sweep.prepare(draw(sweep.case, device, full_teacher="divergence" in name))
    run(module)  # compiles
    if arguments.plain:
        for _ in range(LAUNCHES):
            run(module)
        if on_gpu:
            torch.cuda.synchronize()
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(LAUNCHES):
            run(module)
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=12)
    report = f"{name}, {sweep.case}, {LAUNCHES} launches\n{table}"
    print(report)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
