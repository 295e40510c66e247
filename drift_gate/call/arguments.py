"""Checks of single arguments: metadata alone, and text only where something is wrong.

Every message names the argument, what it was and what it should be. Values of tensors are read in
the passes: that would synchronise a GPU here, and break a traced graph.
"""

import functools
import math
import numbers
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


Found = TypeVar("Found")


def remembered(check: Callable[..., Found]) -> Callable[..., Found]:
    """A check of options alone, whose results are kept: 256 of them, by values and types.

    Not kept is what raises, what is of a tuple (1 and True in it are one key), and anything where
    `torch.compile` traces.
    """
    kept = functools.lru_cache(maxsize=256, typed=True)(check)

    @functools.wraps(check)
    def found(*options: Any) -> Found:
        if not torch.compiler.is_compiling() and tuple not in map(type, options):
            try:
                return kept(*options)
            except TypeError:  # perhaps not hashable: what is wrong is said below
                pass
        return check(*options)

    return found


def wrong_type(name: str, x: object, wanted: str) -> NoReturn:
    raise TypeError(f"{name} must be {wanted}; got {type(x).__name__}")


def floating(name: str, x: Any) -> None:
    """Raise unless x is a floating-point tensor."""
    if not isinstance(x, Tensor):
        wrong_type(name, x, "a torch.Tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {x.dtype}")


def integer(name: str, x: Any) -> None:
    """Raise unless x is an int64 or int32 tensor."""
    if not isinstance(x, Tensor):
        wrong_type(name, x, "a torch.Tensor")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int64 or int32; got {x.dtype}")


def like(name: str, x: Tensor, shape: Sequence[int], device: torch.device, of: str) -> None:
    """Raise unless x has this shape and lies on this device, both of the argument named `of`."""
    if x.shape != shape:
        raise ValueError(f"{name} must have the shape of {of}, {list(shape)}; got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}; got {x.device}")


def option(name: str, value: object, options: Collection[str]) -> None:
    """Raise unless the value is one of the options."""
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")


def number(name: str, value: Any, above: float, inclusive: bool = False) -> None:
    """Raise unless the value is a finite number greater than (or equal to) `above`."""
    if type(value) not in NUMBERS and (
        isinstance(value, bool) or not isinstance(value, numbers.Real)
    ):
        wrong_type(name, value, "a number")
    if not (value < math.inf and (value >= above if inclusive else value > above)):
        relation = "at least" if inclusive else "greater than"
        raise ValueError(f"{name} must be finite and {relation} {above:g}; got {value}")


def whole(name: str, value: Any, least: int) -> int:
    """The value as an int, at least this."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, (numbers.Integral, torch.SymInt)):
            wrong_type(name, value, "an int")
        value = value if isinstance(value, torch.SymInt) else int(value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def flat(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Row data as [N], detached and contiguous: a copy of at most N elements."""
    x = x.detach().reshape(-1)
    if dtype is not None and x.dtype != dtype:
        return x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def row_data(
    name: str, x: Any, shape: Sequence[int], device: torch.device, of: str, dtype: torch.dtype
) -> Tensor:
    """Floating-point data of each row as [N] in this dtype."""
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        floating(name, x)
    if x.shape != shape or x.device != device:
        like(name, x, shape, device, of)
    return flat(x, dtype)
