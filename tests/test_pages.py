"""The site: its pages are all reached, and every public name is documented by itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import drift_gate as dg

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LOSSES = [name for name in dg.__all__ if name.endswith("_loss")]
SHARED = (  # options that mean the same in every loss
    "row_weights", "response_mask", "cu_seqlens", "position_ids", "temperature", "ignore_index",
    "reduction", "return_entropy", "inplace_backward", "validate", "backend",
)  # fmt: skip


def entries(name: str) -> dict[str, str]:
    """Of the docstring's list of arguments: name -> what is said of it."""
    text = inspect.getdoc(getattr(dg, name)) or ""
    if "\nArgs:\n" not in text:
        return {}
    listed = text.split("\nArgs:\n")[1].split("\n\n")[0]
    found = re.findall(r"^    ([^\s:][^:]*): (.*?)(?=^    \S|\Z)", listed + "\n", re.M | re.S)
    return {argument: " ".join(words.split()) for argument, words in found}


@pytest.mark.parametrize("name", dg.__all__)
def test_every_argument_has_words_of_its_own(name: str) -> None:
    """A tuple's fields have docstrings instead; another name's page is no description."""
    thing = getattr(dg, name)
    assert inspect.getdoc(thing)
    if isinstance(thing, type) and issubclass(thing, tuple):
        source = inspect.getsource(thing)
        assert all(
            re.search(rf'^    {field}: .*\n    """', source, re.M) for field in thing._fields
        )
        return
    taken = [p for p in inspect.signature(thing).parameters if p != "removed"]
    assert list(entries(name)) == taken
    assert not [
        words for words in entries(name).values() if re.match(r"(see|as in|as for) `", words)
    ]


@pytest.mark.parametrize("option", SHARED)
def test_an_option_has_the_same_words_in_every_loss(option: str) -> None:
    said = [entries(name)[option] for name in LOSSES if option in entries(name)]
    assert len(said) >= 3 and len(set(said)) == 1


def test_every_public_name_is_on_a_page() -> None:
    pages = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: drift_gate\.(\w+)$", pages, re.M)
    assert sorted(shown) == sorted(dg.__all__)


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1])
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_links_between_pages_lead_somewhere() -> None:
    """`make docs` asks the same of the anchors; this needs nothing installed."""
    for page in (*DOCS.rglob("*.md"), ROOT / "README.md", *ROOT.glob("CONTRIBUTING.md")):
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_one_page() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 120
