"""Plant each fault in a copy of the tree, run the tests that must see it, and list survivors.

    make mutants, or in tests/: python -m mutants.run [words of a mutant's name]

A child forked from a process that has imported torch runs pytest, so that most faults cost the time
of the first test that fails. The exit code is 1 where a fault survives or no longer applies.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import hypothesis  # noqa: F401  (here and not in each child)
import pytest
import torch  # noqa: F401

from .table import ATEN, MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PARTS = ("drift_gate", "kernels", "bench", "tests", "pyproject.toml", "setup.py")
TIMEOUT = 300.0  # seconds: an endless loop is seen, too
FAILED = 1  # pytest's exit code where tests ran and failed


def plant(mutant: Mutant, text: str) -> str:
    """The file with the fault; ValueError where the text is not there."""
    places = [m.start() for m in re.finditer(re.escape(mutant.old), text)]
    if mutant.nth >= len(places):
        raise ValueError(f"{mutant.file} no longer has {mutant.old!r}")
    at = places[mutant.nth]
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


def _child(copy: Path, mutant: Mutant, log: Path) -> None:
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    os.environ["PYTHONPATH"] = str(copy)
    os.environ["DRIFT_GATE_NATIVE"] = "0" if mutant.file in ATEN else "1"
    os.environ["DRIFT_GATE_KERNELS"] = "interpret" if mutant.interpreted else "off"
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-m", "not gpu"]
    code = pytest.main([*options, *shlex.split(mutant.tests)])
    import drift_gate

    used = str(drift_gate.__file__)
    os._exit(int(code) if used.startswith(str(copy)) else 99)


def _write(file: Path, text: str, copy: Path) -> None:
    file.write_text(text)
    if file.suffix in (".c", ".h"):
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
        subprocess.run(build, cwd=copy, check=True, capture_output=True)


def run(mutant: Mutant, copy: Path) -> str:
    """ "killed", or what happened instead."""
    file = copy / mutant.file
    sound = file.read_text()
    try:
        faulty = plant(mutant, sound)
    except ValueError as error:
        return str(error)
    _write(file, faulty, copy)
    log = copy / "log.txt"
    child = multiprocessing.get_context("fork").Process(target=_child, args=(copy, mutant, log))
    child.start()
    child.join(TIMEOUT)
    hung = child.is_alive()
    if hung:
        child.kill()
        child.join()
    _write(file, sound, copy)
    if hung or child.exitcode == FAILED:
        return "killed"
    if child.exitcode == 0:
        return "SURVIVED"
    return f"pytest ended with {child.exitcode}:\n{log.read_text()[-2000:]}"


@contextlib.contextmanager
def copied_tree():
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
                shutil.copytree(source, copy / part, ignore=ignored)
            else:
                shutil.copy(source, copy / part)
        yield copy


def main(words: list[str]) -> int:
    chosen = [m for m in MUTANTS if all(word in m.name for word in words)]
    left = []
    begin = time.monotonic()
    with copied_tree() as copy:
        sys.dont_write_bytecode = True
        for number, mutant in enumerate(chosen, 1):
            outcome = run(mutant, copy)
            print(f"{number}/{len(chosen)} {mutant.name} ({mutant.file}): {outcome}", flush=True)
            if outcome != "killed":
                left.append(mutant.name)
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(chosen) - len(left)} of {len(chosen)} killed in {minutes:.1f} minutes")
    for name in left:
        print(f"not killed: {name}")
    return 1 if left or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
