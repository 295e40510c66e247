"""Pages that are partly generated: what lies between two marks is, and the rest is not."""

from __future__ import annotations

from pathlib import Path


def between(path: Path, begin: str, end: str, text: str) -> str:
    """The page's text with `text` between its marks; what stood there goes."""
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{text}{end}{after}"
