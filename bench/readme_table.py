"""Write the README's table from the committed results: `make readme-table`. Nothing is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import targets
from .record import Result, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: make readme-table -->", "<!-- end of figures -->"


def rows_of(result: dict[str, Any]) -> list[str]:
    """One line of the table for every variant of one size."""
    work = f"{result['work']}: " if "work" in result else ""
    work += f"{result['rows']:,} x {result['vocab']:,} {result['dtype']}"
    lines = []
    for name, figure in result["variants"].items():
        low, median, high = figure["time_ratio_quartiles"]
        time = f"{median:.2f} ({low:.2f} to {high:.2f})"
        memory = f"{100 * figure['memory_ratio']:.1f}%"
        lines.append(f"| {work} | {name} | {time} | {memory} | {figure['grad_error']:.1e} |")
        work = ""
    return lines


def section(report: dict[str, Any]) -> list[str]:
    """The table of one device, under what it must be read with."""
    machine = report["machine"]
    return [
        f"Losses from logits, forward and backward, on {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}, {machine['date']}, commit "
        f"{machine['commit']}. Ratios to the eager loss in the same run: median and quartiles of "
        "paired rounds; the gradient counts as extra memory; errors of the gradient against "
        "float64, relative to its largest entry.",
        "",
        "| work: tokens x words | | time | extra memory | gradient error |",
        "|---|---|---|---|---|",
        *(line for result in report["results"] for line in rows_of(result)),
        "",
    ]


CORE = {"rows", "vocab", "dtype", "rounds", "must_move", "variants"}  # of the sampled-token loss
NAMES = {"torch.compile of it": "torch.compile of eager"}


def from_core(report: dict[str, Any]) -> list[Result]:
    """The sampled-token loss of `cpu_core` as results of the suite `opd_loss`."""
    found = []
    for result in report["results"]:
        if set(result) != CORE:  # another loss
            continue
        size = {name: result[name] for name in ("rows", "vocab", "dtype")}
        case = dict(what=targets.TRAIN, **size, k=0, hidden=0, kind=targets.KIND)
        for name, figure in result["variants"].items():
            low, median, high = figure["time_ratio_quartiles"]
            found.append(
                Result(
                    targets.OPD, case, NAMES.get(name, name), "", "eager", 0, 0, report["machine"],
                    0.0, seconds=[[s] for s in figure["seconds"]],
                    ratio_quartiles=(low, median, high), extra_bytes=figure["extra_bytes"],
                    extra_ratio=figure["memory_ratio"],
                )
            )  # fmt: skip
    return found


def main() -> None:
    """Replace what lies between the README's marks."""
    reports = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu_core_*.json"))]
    measured = [result for report in reports for result in from_core(report)] + read(RESULTS)
    text = targets.tables(measured)
    text += [line for report in reports for line in section(report)]
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    body = "\n".join(text)
    readme.write_text(f"{before}{BEGIN}\n{body}{END}{after}")


if __name__ == "__main__":
    main()
