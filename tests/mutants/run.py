"""Plant each fault in a copy of the tree, run the tests that must see it, and list survivors.

    make mutants, or in tests/: python -m mutants.run [--log FOLDER] [words of a mutant's name]

A child forked from a process that has imported torch runs pytest, so that most faults cost the time
of the first test that fails. That test must pass without the fault, and is run so at the end. With
`--log` a call goes on from what an earlier one has left in the folder, and calls at the same time
share the work; a mutant is run again once its line in the table has changed or its file is deleted.
The exit code is 1 where a fault is not killed or no longer applies.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis  # noqa: F401  (here and not in each child)
import pytest
import torch  # noqa: F401

from .table import ATEN, MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
PARTS = ("drift_gate", "kernels", "bench", "tests", "pyproject.toml", "setup.py")
NATIVE = "drift_gate/passes/native"
TIMEOUT = 600.0  # seconds on the clock; a slow machine needs some 60 of them
OPTIONS = ["-q", "-p", "no:cacheprovider", "--no-header", "-m", "not gpu"]


def plant(mutant: Mutant, text: str) -> str:
    """The file with the fault; ValueError where the text is not there."""
    places = [m.start() for m in re.finditer(re.escape(mutant.old), text)]
    if mutant.nth >= len(places):
        raise ValueError(f"{mutant.file} no longer has {mutant.old!r}")
    at = places[mutant.nth]
    return text[:at] + mutant.new + text[at + len(mutant.old) :]


class Mode(NamedTuple):
    """Variables of the environment in which a mutant's tests run."""

    DRIFT_GATE_NATIVE: str
    DRIFT_GATE_KERNELS: str


def mode_of(mutant: Mutant) -> Mode:
    return Mode("0" if mutant.file in ATEN else "1", "interpret" if mutant.interpreted else "off")


class Tally:
    """What became of the tests; a skipped one counts nowhere."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []
        self.broken: list[str] = []  # before or after the test itself

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            (self.failed if report.when == "call" else self.broken).append(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed += 1


def _child(copy: Path, mode: Mode, arguments: list[str]) -> None:
    os.setsid()  # whatever the tests start ends with them
    with (copy / "log.txt").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tests")]
    os.environ.update(mode._asdict(), PYTHONPATH=str(copy))
    tally = Tally()
    pytest.main([*OPTIONS, *arguments], plugins=[tally])
    import drift_gate

    assert str(drift_gate.__file__).startswith(str(copy))
    (copy / "tally.json").write_text(json.dumps(vars(tally)))
    os._exit(0)


def run_tests(
    copy: Path, mode: Mode, arguments: list[str], limit: float | None = None
) -> dict[str, Any]:
    """The `Tally` of pytest's run, or what happened instead as its "error"; limit in seconds."""
    (copy / "tally.json").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_child, args=(copy, mode, arguments))
    child.start()
    try:
        child.join(limit)
        code = child.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
    if code is None:
        return {"error": "timed out"}
    tally = json.loads((copy / "tally.json").read_text()) if code == 0 else {}
    if any(tally.values()):
        return tally
    said = (copy / "log.txt").read_text()[-2000:]
    return {"error": f"no verdict, and exit code {code}:\n{said}"}


def outcome_of(tally: dict[str, Any], hangs: bool) -> str:
    """ "killed", or what happened instead."""
    if "error" in tally:
        return "killed" if hangs and tally["error"] == "timed out" else tally["error"]
    if tally["failed"]:
        return "killed"
    if tally["broken"]:
        return f"no test failed, but what is around {tally['broken'][0]} did"
    return "SURVIVED"


@contextlib.contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    """The fault in the copy's file, compiled where it is in C; ValueError where that cannot be."""
    file = copy / mutant.file
    sound = file.read_text()
    faulty = plant(mutant, sound)
    file.write_text(faulty)
    compiled = {}
    try:
        if file.suffix in (".c", ".h"):
            compiled = {path: path.read_bytes() for path in (copy / NATIVE).glob("*.so")}
            for path in compiled:
                path.unlink()
            _build(copy)
            if not all(path.exists() for path in compiled):
                raise ValueError("the fault does not compile")
        yield
    finally:
        file.write_text(sound)
        for path, content in compiled.items():
            path.unlink(missing_ok=True)  # it may be mapped by a process that is ending
            path.write_bytes(content)


def _build(copy: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    subprocess.run(build, cwd=copy, check=True, capture_output=True)


def run(mutant: Mutant, copy: Path) -> dict[str, Any]:
    """The "outcome", and the "test" that failed, "" where it was another fault that is seen."""
    begin = time.monotonic()
    try:
        with planted(mutant, copy):
            tally = run_tests(copy, mode_of(mutant), ["-x", *shlex.split(mutant.tests)], TIMEOUT)
    except ValueError as error:
        tally = {"error": str(error)}
    return {
        "outcome": outcome_of(tally, mutant.hangs),
        "test": next(iter(tally.get("failed", [])), ""),
        "seconds": round(time.monotonic() - begin),
    }


def unsound(found: dict[Mutant, dict[str, Any]], copy: Path) -> dict[Mutant, str]:
    """Mutants whose test fails without the fault, too: that has not killed them."""
    left = {}
    for mode in {mode_of(m) for m in found}:
        tests = {m: x["test"] for m, x in found.items() if x["test"] and mode_of(m) == mode}
        if not tests:
            continue
        tally = run_tests(copy, mode, sorted({*tests.values()}))
        failed = tests.values() if "error" in tally else tally["failed"] + tally["broken"]
        why = tally.get("error", "fails without the fault, too")
        left.update({m: f"{test}: {why}" for m, test in tests.items() if test in failed})
    return left


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
                shutil.copytree(source, copy / part, ignore=ignored)
            else:
                shutil.copy(source, copy / part)
        setup = copy / "setup.py"
        setup.write_text(setup.read_text().replace('"-O3"', '"-O1"'))  # compiles four times as fast
        _build(copy)
        yield copy


def digest(mutant: Mutant) -> str:
    """Names the outcome's file, and gives the order, in which the parts are mixed."""
    return hashlib.sha256(repr(mutant).encode()).hexdigest()[:16]


def sweep(chosen: list[Mutant], log: Path, copy: Path) -> dict[Mutant, dict[str, Any]]:
    """The outcomes of those that no other call is at or has run, each written as it comes."""
    found = {}
    for number, mutant in enumerate(sorted(chosen, key=digest), 1):
        with (log / digest(mutant)).open("a+") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if file.tell():
                continue
            found[mutant] = run(mutant, copy)
            json.dump({"name": mutant.name, **found[mutant]}, file)
        said = " ".join(str(x) for x in found[mutant].values())
        print(f"{number}/{len(chosen)} {mutant.name} ({mutant.file}): {said} s", flush=True)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="mutants.run")
    parser.add_argument("--log", type=Path, help="a folder of outcomes to go on from")
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if all(word in m.name for word in asked.words)]
    begin = time.monotonic()
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copy and the tests end, too
    with copied_tree() as copy:
        log = asked.log or copy / "outcomes"
        log.mkdir(parents=True, exist_ok=True)
        sweep(chosen, log, copy)
        files = {m: (log / digest(m)).read_text() for m in chosen}
        found = {m: json.loads(text) for m, text in files.items() if text}
        left = {m: x["outcome"] for m, x in found.items() if x["outcome"] != "killed"}
        left.update(unsound(found, copy))
    left.update({m: "another call is at it" for m in chosen if m not in found})
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(chosen) - len(left)} of {len(chosen)} killed in {minutes:.1f} minutes")
    for mutant, why in left.items():
        print(f"not killed: {mutant.name}: {why}")
    return 1 if left or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
