"""`.github/workflows` parse, and call targets, files and Pythons that are there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_target_is_in_the_makefile(path):
    """A step runs `make` with its targets, and nothing else that could be missing."""
    makefile = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z][\w \-]*?):(?!=)", makefile, re.M)
    targets = {target for rule in rules for target in rule.split()}
    runs = [step["run"] for step in steps(path) if "run" in step]
    assert runs
    for line in runs:
        program, *asked = line.split()
        assert program == "make" and asked and not set(asked) - targets, line


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_has_a_version(path):
    uses = [step["uses"] for step in steps(path) if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[a-z-]+@v\d+", use) for use in uses), uses


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_paths_that_start_it_are_there(path):
    """YAML reads the key `on` as true."""
    start = yaml.safe_load(path.read_text())[True]
    for pattern in (start.get("pull_request") or {}).get("paths", []):
        assert list(ROOT.glob(pattern)), pattern


def test_every_python_that_is_declared_is_tested_and_has_wheels():
    project = (ROOT / "pyproject.toml").read_text()
    first, end = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project).groups()
    declared = [f"3.{minor}" for minor in range(int(first), int(end))]
    (check,) = (path for path in WORKFLOWS if path.name == "check.yml")
    assert jobs(check)["test"]["strategy"]["matrix"]["python"] == declared
    built = re.search(r'build = "cp3(\d){((?:\d,?)+)}-manylinux_x86_64"', project)
    assert [f"3.{built[1]}{minor}" for minor in built[2].split(",")] == declared
