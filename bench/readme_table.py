"""Write the README's tables and pictures from the committed results: `make readme-table`."""

from __future__ import annotations

from pathlib import Path

from . import chunks, growth, step_report, targets
from .plots import save
from .record import Result, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: make readme-table -->", "<!-- end of figures -->"


def figures(results: list[Result]) -> str:
    """What stands between the README's marks."""
    return "\n".join(
        [
            *targets.tables(results),
            *chunks.markdown(RESULTS),
            *growth.markdown(results),
            *step_report.markdown(results),
        ]
    )


def pictures(results: list[Result]) -> list[Path]:
    """docs/train_step_gpu.svg and _cpu.svg: the first model that each kind of device has."""
    written: dict[str, Path] = {}
    for steps in step_report.found_in(results):
        kind = "gpu" if "cuda" in steps.machine else "cpu"
        if kind not in written:
            path = ROOT / "docs" / f"train_step_{kind}.svg"
            written[kind] = save(step_report.picture(steps), path)
    return list(written.values())


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    results = read(RESULTS) if RESULTS.exists() else []
    pictures(results)
    readme.write_text(f"{before}{BEGIN}\n{figures(results)}{END}{after}")


if __name__ == "__main__":
    main()
