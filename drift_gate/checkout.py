"""In a checkout kernels/ and bench/ lie beside this folder: they are found as this package's."""

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
FOLDERS = "kernels", "bench"


class _Beside(importlib.abc.MetaPathFinder):
    """Finds the two folders, and nothing else that lies there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != __package__ or name not in FOLDERS:
            return None
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(HERE.parent / name)]
        return spec


def find_folders() -> None:
    """Once, at import; an installed package has both inside."""
    if not (HERE / "kernels").is_dir() and not any(type(x) is _Beside for x in sys.meta_path):
        sys.meta_path.append(_Beside())
