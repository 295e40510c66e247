"""docs/study_plan.md: its commands are commands, and its table has as many runs as they do."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from drift_gate.bench.distill import arguments, plan, settings
from typer.testing import CliRunner

from drift_gate import cli

PLAN = (Path(__file__).parent.parent / "docs" / "study_plan.md").read_text()
CHOSEN = 'RATE=5e-4; EPOCHS=8; REST="--minibatch 16 --warmup 16"; BAND=low\n'
PRINTED = "drift-gate() { printf '%q ' \"$@\"; echo; }\n"


def commands(block: str) -> list[list[str]]:
    """What a block of the plan calls, its loops run by bash."""
    script = PRINTED + CHOSEN + block
    done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def settings_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> settings.Settings:
    """Of a command that is taken in full, and not run."""
    taken: list[settings.Settings] = []

    def run(options: dict[str, object], *_: object) -> tuple[int, str]:
        wrong = arguments.out_of_range(options, None)
        taken.append(settings.Settings(**options))  # type: ignore[arg-type]
        return bool(wrong), wrong

    monkeypatch.setattr(arguments, "run", run)
    done = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert done.exit_code == 0, (words, done.output)
    return taken[0]


def test_the_plans_commands_make_the_runs_of_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PLAN, re.M | re.S)
    rows = re.findall(r"^\| [^|]+ \| (\d+) \|", PLAN, re.M)
    found, folders = [], []
    for block in blocks:
        chosen = [(settings_of(words, monkeypatch), words) for words in commands(block)]
        found.append(sum(len(settings.jobs(one)) for one, _ in chosen))
        folders += [words[words.index("--out") + 1] for _, words in chosen]
        assert {one.seed for one, _ in chosen} == ({100} if block == blocks[0] else {0})
    assert found == [int(row) for row in rows]
    assert len(folders) == len(set(folders)), "two commands share a folder"


def test_the_program_makes_the_runs_of_the_plans_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PLAN, re.M | re.S)
    chosen = plan.Setting(5e-4, 8, 1.0, minibatch=16, warmup=16)
    selection = dict(seed=100, seeds=3, variant=plan.LOSSES)
    made = [
        [setting.settings(**selection) for setting in plan.GRID],
        [chosen.settings(seeds=plan.SEEDS)],
        [settings.Settings(seeds=plan.SEEDS)],
        list(plan.other_settings(chosen).values()),
    ]
    for block, ours in zip(blocks, made, strict=True):
        theirs = [settings_of(words, monkeypatch) for words in commands(block)]
        assert len(ours) == len(theirs)
        assert {as_first_written(one) for one in ours} == set(theirs)


def as_first_written(one: settings.Settings) -> settings.Settings:
    """Before the plan's dated changes: nothing was compiled, and part 3 had all seeds."""
    seeds = plan.SEEDS if one.seeds == plan.OTHER_SEEDS else one.seeds
    return dataclasses.replace(one, compile=False, seeds=seeds)


def test_when_to_gate_has_the_shares_and_weights_of_its_formula() -> None:
    page = (Path(__file__).parent.parent / "docs" / "when_to_gate.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+)% \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 5
    rng = np.random.default_rng(0)
    for mean, share, weight in rows:
        gates = np.exp(-rng.exponential(float(mean), 400_000))
        assert float(share) == pytest.approx(100 * gates.mean() ** 2 / (gates**2).mean(), abs=0.2)
        assert float(weight) == pytest.approx(np.exp(-3 * float(mean)) / gates.mean(), abs=0.01)
