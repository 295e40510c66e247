"""A result, its schema, and the files that hold results."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .cases import Case
from .measure import quartiles, slug

SCHEMA = 1


@dataclasses.dataclass
class Result:
    """One implementation on one case: what `extra_info` and the files hold."""

    suite: str
    case: dict[str, Any]  # fields of Case
    implementation: str
    note: str  # what it computes less, or otherwise
    baseline: str  # the implementation that ratios refer to
    bytes_must_move: int
    flops: int
    machine: dict[str, Any]  # device, threads, versions, date, commit ("+" where changed since)
    copy_bytes_per_s: float  # measured in the same run, as the next
    gemm_flops_per_s: float | None = None  # where the work has products
    left_out: str | None = None  # why it was not run; then what follows is empty
    seconds: list[list[float]] = dataclasses.field(default_factory=list)  # rounds x launches
    one_call: bool = False  # too slow for rounds: its first, or first warm, call
    ratio_quartiles: tuple[float, float, float] | None = None  # of time, by round
    extra_bytes: int | None = None  # exact peak beyond the inputs, gradients included
    gradient_bytes: int = 0  # of the gradients returned in memory of their own
    live_rows: int | None = None  # whose gradient is not 0: bytes_must_move reads those; see floors
    device_seconds: list[float] = dataclasses.field(default_factory=list)  # on a GPU
    device_by: str | None = None  # how: see device_time.py
    profile: dict[str, Any] | None = None  # of this package's call on a GPU: see device_time.py
    host: dict[str, int] | None = None  # of the suite host: what a call does, see host.py
    step: dict[str, float] | None = None  # of the suite train_step: its peak, see train_step.py
    extra_ratio: float | None = None
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> list[float]:
        return [s for one_round in self.seconds for s in one_round]

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Of seconds."""
        return quartiles(self.samples)

    @property
    def median(self) -> float:
        return self.quartiles[1]

    @property
    def device(self) -> float | None:
        """Median seconds of the device alone."""
        return quartiles(self.device_seconds)[1] if self.device_seconds else None

    @property
    def fastest(self) -> float:
        """Seconds of the device alone where they were measured, else of the call."""
        return self.device or self.median

    @property
    def bytes_per_s(self) -> float:
        """Bytes that the work must move, over the time it took."""
        return self.bytes_must_move / self.fastest

    @property
    def fraction_of_copy(self) -> float:
        return self.bytes_per_s / self.copy_bytes_per_s

    @property
    def fraction_of_gemm(self) -> float | None:
        rate = self.gemm_flops_per_s
        return None if rate is None else self.flops / self.fastest / rate

    @property
    def of_case(self) -> tuple[Any, ...]:
        """What measurements of one case on one device share."""
        return self.suite, tuple(sorted(self.case.items())), self.machine["device"]

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies a measurement."""
        return self.suite, tuple(sorted(self.case.items())), self.implementation

    @property
    def size(self) -> Case:
        return Case(**self.case)

    def as_dict(self) -> dict[str, Any]:
        """Fields, and the figures derived from them."""
        derived = {}
        if self.seconds:
            derived = {
                "seconds_quartiles": self.quartiles,
                "gb_per_s": self.bytes_per_s / 1e9,
                "fraction_of_copy": self.fraction_of_copy,
                "fraction_of_gemm": self.fraction_of_gemm,
                "device_median": self.device,
            }
        return dataclasses.asdict(self) | derived

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """The inverse; derived figures are dropped, and formed again where they are asked for."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})


def results_folder() -> Path:
    """bench/results of the checkout; from an installed wheel, under the current directory."""
    root = Path(__file__).resolve().parent.parent
    return (root if (root / "pyproject.toml").exists() else Path.cwd()) / "bench" / "results"


def new_path(folder: Path, device: str, names: Collection[str]) -> Path:
    """A file by device, date and time, and by grid and suites where they are few."""
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    name = "+".join(names if len(names) <= 4 else [*names][:1])
    return folder / slug(device) / f"{stamp}_{name}.json"


def write(path: Path, results: list[Result]) -> None:
    """Write all results; a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    data = {"schema": SCHEMA, "results": [result.as_dict() for result in results]}
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


def read(path: Path) -> list[Result]:
    """Results of a file, or of the files of every device in a folder, oldest first.

    A folder may hold sweeps (see sweep.py) too; they are passed over.

    Raises:
        ValueError: the file is none of this schema.
    """
    if path.is_dir():
        files = [(file, json.loads(file.read_text())) for file in sorted(path.glob("*/*.json"))]
        found = [_results(file, data) for file, data in files if not _is_sweep(data)]
        # A day's files in the order of their names.
        return [r for one in sorted(found, key=_date) for r in one]
    return _results(path, json.loads(path.read_text()))


def _is_sweep(data: Any) -> bool:
    return isinstance(data, dict) and "schema" not in data and "machine" in data


def _date(results: list[Result]) -> str:
    return max((r.machine["date"] for r in results), default="")


def _results(path: Path, data: Any) -> list[Result]:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} holds no benchmark results of schema {SCHEMA}")
    return [Result.from_dict(result) for result in data["results"]]
