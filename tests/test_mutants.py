"""The sweep of mutants: who counts as killed, on a tree of four lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
TREE = {
    "setup.py": "",
    "drift_gate/__init__.py": "one = 1\ntwo = 2\n",
    "tests/test_one.py": """
import os, time, pytest, drift_gate
def test_one():
    while drift_gate.one > 1:
        time.sleep(0.1)
    assert drift_gate.one == 1
@pytest.mark.skipif(os.environ["DRIFT_GATE_KERNELS"] == "off", reason="no kernels")
def test_two():
    assert drift_gate.two == 2
def test_three():
    assert False
@pytest.fixture
def three():
    assert drift_gate.two == 2
def test_four(three):
    pass
""",
}
SWEEP = """
import sys
from pathlib import Path
from mutants import run
from mutants.table import Mutant

file = "drift_gate/__init__.py"
def mutant(name, old, new, test, **options):
    return Mutant(name, file, old, new, f"tests/test_one.py::test_{test}", **options)
run.ROOT, run.PARTS, run.TIMEOUT = Path(sys.argv[1]), ("drift_gate", "tests", "setup.py"), 15.0
run.MUTANTS = [
    mutant("seen", "one = 1", "one = 0", "one"),
    mutant("not seen", "two = 2", "two = 3", "one"),
    mutant("skipped", "two = 2", "two = 3", "two"),
    mutant("not skipped", "two = 2", "two = 3", "two", interpreted=True),
    mutant("slow", "one = 1", "one = 2", "one"),
    mutant("endless", "one = 1", "one = 2", "one", hangs=True),
    mutant("seen without the fault", "one = 1", "one = 0", "three"),
    mutant("a fixture that fails", "two = 2", "two = 3", "four"),
    mutant("gone", "three = 3", "three = 4", "one"),
    mutant("no such test", "one = 1", "one = 0", "five"),
]
sys.exit(run.main(sys.argv[2:]))
"""
KILLED = "seen", "not skipped", "endless"
OTHERS = {
    "not seen": "SURVIVED",
    "skipped": "no verdict, and exit code 0",
    "slow": "timed out",
    "seen without the fault": "tests/test_one.py::test_three: fails without the fault, too",
    "a fixture that fails": "no test failed, but what is around tests/test_one.py::test_four did",
    "gone": "drift_gate/__init__.py no longer has 'three = 3'",
    "no such test": "no verdict, and exit code 0",
}


def sweep(*arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", SWEEP, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS)
    assert not done.stderr
    return done.returncode, done.stdout


def test_who_is_killed(tmp_path: Path):
    """Neither by a slow machine, nor by what is skipped, nor by a test that always fails."""
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    arguments = str(tmp_path), "--log", str(tmp_path / "log")
    code, said = sweep(*arguments)
    assert code == 1
    assert f"{len(KILLED)} of {len(KILLED) + len(OTHERS)} killed" in said
    for name, why in OTHERS.items():
        assert f"not killed: {name}: {why}" in said
    assert said.count("not killed: ") == len(OTHERS)

    code, again = sweep(*arguments)
    assert code == 1
    assert "/10 " not in again  # nothing is run twice
    assert again.count("not killed: ") == len(OTHERS)
    assert sweep(*arguments, "not", "skipped")[0] == 0
