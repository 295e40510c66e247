"""`record_calls`: what a trainer asks of the losses, for `drift-gate bench --recorded FILE`.

While nobody records, a call asks one module variable, and that is all.
"""

import atexit
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from ..measure import device_name
from ..parallel.scope import Collector
from ..passes.rules import TOKENS

VARIABLE = "DRIFT_GATE_RECORD"
BATCH = 256  # calls between two writes
PLAIN = int, float, str, bool, type(None)

active: "record_calls | None" = None
"""Who records, which the losses ask for before they return."""


class Noted(NamedTuple):
    """One call, until it is written."""

    at: float  # seconds since the recording began
    function: str
    tensors: dict[str, Any]  # name -> (shape, dtype, whether it requires a gradient)
    options: dict[str, Any]  # those that are not the default
    rows: int
    metrics: Tensor  # of the call, on its device: the count of valid rows is not read yet


class record_calls:
    """Record shapes, dtypes, options and the share of valid rows of each loss call; no data.

        with record_calls("calls.jsonl"):
            trainer.train()

    or `recorder = record_calls(path)` and `recorder.stop()`; or the environment variable
    DRIFT_GATE_RECORD=path, from the import of drift_gate to the end of the process. `drift-gate
    bench --recorded calls.jsonl` replays the calls with drawn data, beside eager losses.

    Of `opd_loss`, `topk_loss`, `full_loss` and their `linear_` forms each call is a line of JSON
    (the first line says where it ran): "at", seconds since the start; "function"; "tensors", the
    shape, dtype and whether a gradient is asked for, by argument; "options" other than the default;
    "rows", and "valid", the share of them. A call takes 7 microseconds longer, and nothing waits
    for a GPU: counts stay on the device, are copied 256 calls later, and written when they have
    arrived, or when the recording stops. Where torch.compile traces the call, and with
    backend="reference", nothing is recorded; a compiled function is compiled again when a recording
    starts or stops.

    Args:
        path: of the file, which the first call creates, or overwrites. Of several ranks (RANK and
            WORLD_SIZE, as torchrun sets them) each has its own: calls.rank3.jsonl.

    Raises:
        TypeError: path is no path.
        RuntimeError: calls are being recorded already.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        global active
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path must be a str or os.PathLike; got {type(path).__name__}")
        if active is not None:
            raise RuntimeError(f"calls are being recorded already, to {active.path}")
        self.path: Path = _of_rank(Path(path))
        self._begun = time.perf_counter()
        self._pending: list[Noted] = []
        self._copied: list[tuple[list[Noted], Tensor, torch.cuda.Event | None]] = []
        self._alike: dict[Any, str] = {}
        self._file: TextIO | None = None
        atexit.register(self.stop)
        active = self

    def __enter__(self) -> "record_calls":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Write what is left, and end the recording. A second call does nothing."""
        global active
        if active is not self:
            return
        active = None
        atexit.unregister(self.stop)
        self._copy_counts()
        for _, _, event in self._copied:
            if event is not None:
                event.synchronize()
        self._write_copied()
        if self._file is not None:
            self._file.close()

    def note(self, function: Callable[..., Any], given: dict[str, Any]) -> None:
        """Take note of one call; `given`: what its function calls its arguments, and `found`."""
        at = time.perf_counter() - self._begun
        tensors: dict[str, Any] = {}
        options: dict[str, Any] = {}
        code, defaults = function.__code__, function.__kwdefaults__ or {}
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            value, default = given[name], defaults.get(name)
            if value is default:
                continue
            if isinstance(value, Tensor):
                tensors[name] = value.shape, value.dtype, value.requires_grad
            elif not isinstance(value, PLAIN):
                options[name] = _described(value)
            elif value != default:
                options[name] = value
        found = given["found"]
        if self._pending and found.metrics.device != self._pending[0].metrics.device:
            self._copy_counts()
        noted = Noted(at, function.__name__, tensors, options, found.valid.numel(), found.metrics)
        self._pending.append(noted)
        if len(self._pending) >= BATCH and not _captures(found.metrics):
            self._write_copied()
            self._copy_counts()

    def _copy_counts(self) -> None:
        """Send the counts of the pending calls to the host, without waiting for them."""
        if not self._pending:
            return
        with torch.no_grad():
            counts = torch.stack([noted.metrics for noted in self._pending])[:, TOKENS]
            event = None
            if counts.is_cuda:
                counts = counts.to("cpu", non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        self._copied.append((self._pending, counts, event))
        self._pending = []

    def _write_copied(self) -> None:
        """Write the calls whose counts have arrived, in their order."""
        while self._copied:
            calls, counts, event = self._copied[0]
            if event is not None and not event.query():  # type: ignore[no-untyped-call]
                return
            if self._file is None:
                self._file = self.path.open("w")
                self._file.write(json.dumps(_header(calls[0].metrics.device)) + "\n")
            for noted, count in zip(calls, counts.tolist(), strict=True):
                self._file.write(self._line(noted, count))
            self._file.flush()
            del self._copied[0]

    def _line(self, noted: Noted, count: float) -> str:
        """A call in JSON. Of calls alike all but time and count is made once."""
        options = json.dumps(noted.options) if noted.options else "{}"
        key = noted.function, noted.rows, options, *noted.tensors.items()
        if key not in self._alike:
            tensors = {name: _tensor(*one) for name, one in noted.tensors.items()}
            self._alike[key] = (
                f'"function": "{noted.function}", "tensors": {json.dumps(tensors)}, '
                f'"options": {options}, "rows": {noted.rows}'
            )
        valid = count / max(noted.rows, 1)
        return f'{{"at": {noted.at:.6f}, {self._alike[key]}, "valid": {valid:.6f}}}\n'


def start_from_environment() -> None:
    """Record where DRIFT_GATE_RECORD says so."""
    if path := os.environ.get(VARIABLE):
        record_calls(path)


def _of_rank(path: Path) -> Path:
    """The file of this rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return path
    return path.with_name(f"{path.stem}.rank{os.environ.get('RANK', '0')}{path.suffix}")


def _captures(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured, which nothing else may join."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _described(value: Any) -> Any:
    """An option in JSON's types."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return _tensor(value.shape, value.dtype, value.requires_grad)
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    named = {"type": type(value).__name__}
    if isinstance(value, Collector):
        return named | {"gate": _described(value.gate)}
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if getattr(value, field.name) is not field.default
        }
        return named | {name: _described(one) for name, one in fields.items()}
    if callable(size := getattr(value, "size", None)):  # a process group
        return named | {"size": size()}
    return named


def _tensor(shape: torch.Size, dtype: torch.dtype, grad: bool) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "grad": grad}


def _header(device: torch.device) -> dict[str, Any]:
    """Where the calls ran."""
    return {
        "recorded": "drift_gate loss calls",
        "schema": 1,
        "device": device_name(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
