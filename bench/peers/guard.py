"""Import guards of the peers: what is missing is left out, with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class LeftOut(Exception):
    """An implementation cannot be measured here; the message says why."""


class OtherWork(LeftOut):
    """An implementation has nothing to do in this work of its suite: no result at all."""


def load(module: str, name: str) -> Any:
    """An attribute of a module of a package that may not be here.

    Raises:
        LeftOut: it cannot be imported.
    """
    package = module.split(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        absent = missing.name or package
        if absent.split(".")[0] == package:
            raise LeftOut(f"{package} is not installed") from None
        raise LeftOut(f"{package} needs {absent}, which is not installed") from None
    except AttributeError:
        raise LeftOut(f"this version of {package} has no {name}") from None
    except Exception as error:  # what an import may raise is not known
        first = (str(error).strip().splitlines() or [""])[0].split(" (/")[0]  # less the path
        raise LeftOut(f"{package} fails to import: {type(error).__name__}: {first}") from None


def on_gpu_only(device: torch.device, why: str = "its kernels are Triton's") -> None:
    """Raise LeftOut on a CPU."""
    if device.type != "cuda":
        raise LeftOut(f"needs a GPU: {why}")


class Peer(NamedTuple):
    """A function of somebody else, under the name that tables show."""

    name: str
    load: Callable[[torch.device], Callable[..., Any]]  # raises LeftOut
    temporaries: float = 14  # bytes beside each logit, for the memory guard
    overwrites: bool = False  # the logits become their gradient
    compiles: bool = False  # in its first call, on a CPU
