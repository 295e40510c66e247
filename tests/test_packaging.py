"""What is installed, and what the checkout does to other people's imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, cwd: Path) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_one_top_level_package():
    assert metadata.distribution("drift-gate").read_text("top_level.txt") == "drift_gate\n"


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_installation_has_built_the_functions_in_c():
    code = "from drift_gate.passes import native; print(native.library.find() is not None)"
    assert run_python(code, ROOT) == "True\n"


def test_kernels_beside_the_package_is_not_hugging_faces():
    """A folder without __init__.py gives way to a package `kernels` anywhere on sys.path."""
    spec = PathFinder.find_spec("kernels", [str(ROOT)])
    assert spec is not None and spec.origin is None  # a namespace, which a real package beats
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_real_package_wins_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the real one'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.name)"
    assert run_python(code, ROOT) == "the real one\n"


def test_submodules_import_from_anywhere(tmp_path):
    code = "import drift_gate.kernels.scan, drift_gate.bench.measure; print(drift_gate.__version__)"
    for cwd in (ROOT, tmp_path):
        assert run_python(code, cwd).strip() == metadata.version("drift-gate")


def test_importing_the_package_needs_no_extra_and_imports_no_triton(tmp_path):
    """Triton exists for Linux alone, and starts slowly; kernels are imported when first used."""
    extras = ("triton", "typer", "rich", "matplotlib", "pytest", "transformers", "trl", "verl")
    extras += ("skyrl", "swift")
    code = f"import sys, drift_gate; print([m for m in {extras} if m in sys.modules])"
    assert run_python(code, tmp_path) == "[]\n"


def test_reference_is_imported_by_no_other_path(tmp_path):
    code = (
        "import sys, torch, drift_gate as d; z = torch.randn(4, 9, requires_grad=True); "
        "y = torch.ones(4, dtype=torch.int64); o = d.opd_loss(z, y, -z[:, 0], -z[:, 1]); "
        "o.loss.backward(); print('drift_gate.reference' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "False\n"
