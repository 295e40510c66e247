"""Which folder becomes which package; the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

# kernels/ has no __init__.py, so that from the repository root `import kernels` still finds Hugging
# Face's package of that name, which transformers imports: a regular package anywhere on sys.path
# goes before a folder without __init__.py.
FOLDERS = {"drift_gate": "drift_gate", "drift_gate.kernels": "kernels", "drift_gate.bench": "bench"}

setup(
    package_dir=FOLDERS,
    packages=sorted(
        {
            ".".join((package, *source.relative_to(folder).parent.parts))
            for package, folder in FOLDERS.items()
            for source in Path(folder).rglob("*.py")
        }
    ),
)
