"""Which folder becomes which package; the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

# kernels/ has no __init__.py, so that from the repository root `import kernels` still finds Hugging
# Face's package of that name, which transformers imports: a regular package anywhere on sys.path
# goes before a folder without __init__.py.
FOLDERS = {"drift_gate": "drift_gate", "drift_gate.kernels": "kernels", "drift_gate.bench": "bench"}

# Loaded by ctypes, no module of Python's; without a compiler the package does without.
ROWS = Extension(
    "drift_gate.passes.native._rows",
    ["drift_gate/passes/native/rows.c"],
    depends=sorted(str(path) for path in Path("drift_gate/passes/native").glob("*.h")),
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
    ],
    libraries=["m"],
    optional=True,
)

setup(
    ext_modules=[ROWS],
    package_dir=FOLDERS,
    packages=sorted(
        {
            ".".join((package, *source.relative_to(folder).parent.parts))
            for package, folder in FOLDERS.items()
            for source in Path(folder).rglob("*.py")
        }
    ),
)
