"""The pages of docs/: what they show runs, and the picture of the house is that of the code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drift_gate import Clip
from drift_gate.passes import native
from drift_gate.passes.backends import HAS_TRITON

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: str, kind: str) -> list[str]:
    """The code blocks of a page, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)


def applied(diff: str, tree: Path) -> None:
    """Make one change: a file's name, and its lines before and after by their first letters."""
    first, *lines = diff.splitlines(keepends=True)
    path = tree / first.removeprefix("# ").strip()
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    text = path.read_text()
    assert text.count(before) == 1, f"{path.name} has {text.count(before)} times:\n{before}"
    path.write_text(text.replace(before, after))


def test_a_loss_of_ones_own() -> None:
    """All but the last block, which takes an estimator that is not here."""
    *code, _ = blocks("add_a_loss.md", "python")
    assert len(code) == 3
    space: dict[str, object] = {}
    for block in code:
        exec(compile(block, "add_a_loss.md", "exec"), space)


def test_the_quickstart() -> None:
    space: dict[str, object] = {}
    for block in blocks("quickstart.md", "python"):
        exec(compile(block, "quickstart.md", "exec"), space)
    assert space["result"].loss.isfinite()  # type: ignore[attr-defined]


def test_the_drop_in_of_the_readme_is_the_loss_that_it_replaces() -> None:
    """Ungated, as the eager lines are."""
    text = (ROOT / "README.md").read_text()
    before, after = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    torch.manual_seed(0)
    mask = torch.rand(2, 70) < 0.9
    values = dict(
        zip(("old", "teacher"), -torch.rand(2, 2, 70), strict=True), mask=mask, torch=torch
    )
    values["labels"] = torch.randint(501, (2, 70))
    source = 3 * torch.randn(2, 70, 501)
    values["old"] = source.log_softmax(-1).gather(-1, values["labels"][..., None])[..., 0] + 0.1
    spaces = [values | {"logits": source.clone().requires_grad_()} for _ in range(2)]
    exec(before, spaces[0])
    exec(
        after.replace("response_mask", "gate=None, clip=Clip(dual=None), response_mask"),
        spaces[1] | {"Clip": Clip},
    )
    gradients = [space["logits"].grad for space in spaces]
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the package with the new estimator of the page, its C compiled again."""
    for folder in ("drift_gate", "kernels"):
        skipped = shutil.ignore_patterns("__pycache__", *(f"*{x}" for x in EXTENSION_SUFFIXES))
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    changes = blocks("add_a_loss.md", "diff")
    assert len(changes) == 9
    for diff in changes:
        applied(diff, tmp_path)
    if native.instruction_set():
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.slow
def test_a_new_estimator(changed: Path) -> None:
    """On every backend, the kernels interpreted."""
    backends = [*(["native"] if native.instruction_set() else []), "torch", "reference"]
    *code, last = blocks("add_a_loss.md", "python")
    script = [*code[:2], f"BACKENDS = {backends}", last]
    if HAS_TRITON:
        last = "\n".join(f"    {line}" for line in last.splitlines())
        script += [
            "from drift_gate.fuzz.interpreter import corrected",
            "from drift_gate.passes.backends import triton_on_cpu",
            'BACKENDS = ["triton"]',
            "logits = logits[:, :, :501].detach().requires_grad_()",
            "labels = labels % 501",
            f"with corrected(), triton_on_cpu():\n{last}",
        ]
    (changed / "page.py").write_text("\n".join([*script, 'print("done")\n']))
    environment = os.environ | {"PYTHONPATH": str(changed), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=changed, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "done\n", done.stderr


@pytest.fixture(scope="module")
def draw_house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_house", DOCS / "draw_house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_of_this_house(draw_house: ModuleType) -> None:
    """`make house` draws it anew."""
    picture = (DOCS / "house.svg").read_text()
    graph = draw_house.arrows()
    wanted = {f"{a} &gt; {b}" for a, b in draw_house.drawn(graph)} | {f"box {a}" for a in graph}
    assert set(re.findall(r'<g id="(box [^"]+|[^"]+ &gt; [^"]+)"', picture)) == wanted
    text = set(re.sub(r"<[^>]+>", " ", picture).split())
    missing = {name for box in draw_house.boxes() for name in box.files} - text
    assert not missing


def test_a_drawing(draw_house: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_house.draw(str(tmp_path / "house.svg"))
    assert "import drift_gate &gt; losses/" in (tmp_path / "house.svg").read_text()


def test_arrows_that_others_say_and_circles(draw_house: ModuleType) -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d.py": set()}
    assert draw_house.drawn(graph) == [("a", "b"), ("b", "c")]
    assert draw_house.levels(graph) == {"a": 3, "b": 2, "c": 1, "d.py": 1}
    with pytest.raises(ValueError, match="imports itself"):
        draw_house.drawn({"a": {"b"}, "b": {"a"}})


def test_every_folder_is_on_the_page(draw_house: ModuleType) -> None:
    page = (DOCS / "house.md").read_text()
    folders = {box.name for box in draw_house.boxes() if box.name.endswith("/")}
    assert {name for name in folders if f"`{name}`" not in page} == set()
