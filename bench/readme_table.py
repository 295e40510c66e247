"""Write the tables and pictures of README and docs from the committed results: `make readme-table`.

The README has the picture of a training step and one short table; docs/benchmarks.md everything.
"""

from __future__ import annotations

from pathlib import Path

from . import chunks, growth, pages, short_table, step_report, targets
from .plots import save
from .record import Result, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: make readme-table -->", "<!-- end of figures -->"


def figures(results: list[Result]) -> str:
    """What stands between the marks of docs/benchmarks.md."""
    return "\n".join(
        [
            *step_report.markdown(results),
            *targets.tables(results),
            *chunks.markdown(RESULTS),
            *growth.markdown(results),
        ]
    )


def first_screen(results: list[Result]) -> str:
    """What stands between the README's marks."""
    return "\n".join([*short_table.markdown(results), ""])


def pictures(results: list[Result]) -> list[Path]:
    """docs/train_step_gpu.svg and _cpu.svg: the first model that each kind of device has."""
    written: dict[str, Path] = {}
    for steps in step_report.found_in(results):
        kind = "gpu" if "cuda" in steps.machine else "cpu"
        if kind not in written:
            path = ROOT / "docs" / f"train_step_{kind}.svg"
            written[kind] = save(step_report.picture(steps), path)
    return list(written.values())


def between_marks(path: Path, text: str) -> str:
    """The file's text with `text` between its marks."""
    return pages.between(path, BEGIN, END, text)


def main() -> None:
    results = read(RESULTS) if RESULTS.exists() else []
    pictures(results)
    for path, text in ((README, first_screen(results)), (PAGE, figures(results))):
        path.write_text(between_marks(path, text))


if __name__ == "__main__":
    main()
