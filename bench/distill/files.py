"""Files that are whole or not there."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch


class CannotWrite(Exception):
    """A file that could not be written; nothing of it is left. The message names it and why."""


def write(contents: dict[Path, bytes]) -> None:
    """Replace the files: all of them are written before the first takes its name.

    Raises:
        CannotWrite: no space, no permission, or another reason that the system gives.
    """
    parts = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with parts[path].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None


def as_json(data: Any) -> bytes:
    """For `write`."""
    return (json.dumps(data, indent=1) + "\n").encode()


def as_lines(data: dict[str, Any]) -> bytes:
    """The same with a line for each entry, and for each element of a list among them."""
    entries = []
    for name, value in data.items():
        if isinstance(value, list) and value:
            elements = ",\n".join(f"  {json.dumps(element)}" for element in value)
            entries.append(f" {json.dumps(name)}: [\n{elements}\n ]")
        else:
            entries.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(entries) + "\n}\n").encode()


def write_json(path: Path, data: Any) -> None:
    """As `write`."""
    write({path: as_json(data)})


def write_tensors(path: Path, data: dict[str, Any]) -> None:
    """As `write`, for `torch.load(path, weights_only=True)`."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write({path: buffer.getvalue()})


def check_space(folder: Path, needed: int) -> None:
    """Raise CannotWrite unless the disk that will hold the folder has so many bytes left."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CannotWrite(
            f"cannot write to {folder}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.1f} MB free"
        )
