"""Write the README's tables from the committed results: `make readme-table`. Nothing is typed."""

from __future__ import annotations

from pathlib import Path

from . import growth, targets
from .record import Result, read

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- figures: make readme-table -->", "<!-- end of figures -->"


def figures(results: list[Result]) -> str:
    """What stands between the README's marks."""
    return "\n".join([*targets.tables(results), *growth.markdown(results)])


def main() -> None:
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    _, after = rest.split(END)
    results = read(RESULTS) if RESULTS.exists() else []
    readme.write_text(f"{before}{BEGIN}\n{figures(results)}{END}{after}")


if __name__ == "__main__":
    main()
