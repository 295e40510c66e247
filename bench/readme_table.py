"""Write the README's table from the committed results: `make readme-table`. Nothing is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Replace what lies between the README's marks."""
    reports = sorted(RESULTS.glob("cpu_core_*.json"))
    text = [line for path in reports for line in section(json.loads(path.read_text()))]
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    body = "\n".join(text) if text else "Not measured.\n"
    readme.write_text(f"{before}{BEGIN}\n{body}{END}{after}")


if __name__ == "__main__":
    main()
