"""docs/guarantees.md names tests that exist, and the mutants still apply to the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from mutants.run import plant
from mutants.table import MUTANTS, Mutant

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"


def named_tests() -> list[tuple[str, str]]:
    return re.findall(r"`(test_\w+\.py)::(\w+)`", PAGE.read_text())


def test_the_page_names_a_test_for_every_promise() -> None:
    promises = re.findall(
        r"^- \*\*.+?(?=^- \*\*|^#|^Not promised|\Z)", PAGE.read_text(), re.M | re.S
    )
    assert len(promises) > 20
    for promise in promises:
        assert "::" in promise, f"no test holds this: {promise}"


@pytest.mark.parametrize("file, name", sorted(set(named_tests())))
def test_each_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_opcheck_sees_every_op() -> None:
    package = TESTS.parent / "drift_gate"
    sources = "".join(path.read_text() for path in package.rglob("*.py"))
    tests = "".join(path.read_text() for path in TESTS.glob("*.py"))
    defined = set(re.findall(r'custom_op\(\s*"drift_gate::(\w+)"', sources))
    checked = set(re.findall(r"\((?:OPS|ops)\.(\w+), ", tests))
    assert len(defined) > 20
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
