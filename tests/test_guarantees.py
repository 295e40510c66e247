"""The pages of promises and reports name tests that exist, and mutants still apply to the code."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from beyond import BEYOND
from mutants.run import plant
from mutants.table import MUTANTS, Mutant

import drift_gate

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"
REPORTS = PAGE.with_name("reports.md")


def named_tests() -> list[tuple[str, str]]:
    text = PAGE.read_text() + REPORTS.read_text()
    return re.findall(r"`(test_\w+\.py)::(\w+)`", text)


def test_the_page_names_a_test_for_every_promise() -> None:
    promises = re.findall(
        r"^- \*\*.+?(?=^- \*\*|^#|^Not promised|\Z)", PAGE.read_text(), re.M | re.S
    )
    assert len(promises) > 20
    for promise in promises:
        assert "::" in promise, f"no test holds this: {promise}"


def test_every_report_has_its_answer_and_a_test() -> None:
    """A line is the situation in bold, what happens now, and after a colon the tests alone."""
    reports = re.findall(r"^(\d+)\. (.+?)(?=^\d+\. |\Z)", REPORTS.read_text(), re.M | re.S)
    assert [int(number) for number, _ in reports] == list(range(1, len(reports) + 1))
    assert len(reports) >= 19
    test = r"`test_\w+\.py::\w+`"
    for number, text in reports:
        line = " ".join(text.split())
        assert re.fullmatch(rf"\*\*.+?\.\*\* .+: {test}(, {test})*\.", line), number


@pytest.mark.parametrize("file, name", sorted(set(named_tests())))
def test_each_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_make_test_leaves_out_is_there() -> None:
    """And each public function stands in a file that it does not leave out."""
    for name in BEYOND:
        file, _, test = name.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not test or test in names, name
    kept = "".join(p.read_text() for p in TESTS.glob("test_*.py") if p.name not in BEYOND)
    public = [x for x in drift_gate.__all__ if inspect.isfunction(getattr(drift_gate, x))]
    assert len(public) > 10
    assert [name for name in public if not re.search(rf"\b{name}\(", kept)] == []


def test_opcheck_sees_every_op() -> None:
    """Those beside the losses' own, which test_opcheck.py finds by itself."""
    package = TESTS.parent / "drift_gate"
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    tests = "".join(path.read_text() for path in TESTS.glob("*.py"))
    defined = set(re.findall(r'@custom_op\(\s*"drift_gate::(\w+)"', sources))
    checked = set(re.findall(r"\((?:OPS|ops|torch\.ops\.drift_gate)\.(\w+), ", tests))
    assert defined
    assert defined <= checked, f"no opcheck of {sorted(defined - checked)}"


def test_names_of_mutants_differ() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_applies_and_compiles(mutant: Mutant) -> None:
    sound = (TESTS.parent / mutant.file).read_text()
    changed = plant(mutant, sound)
    assert changed != sound
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")
