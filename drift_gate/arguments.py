"""Checks of what callers pass, and its reduction to flat rows.

Every message names the argument, what it was and what it should be. Only shapes, dtypes, devices
and Python values are read here: checks of tensors' values would synchronise a GPU and break a
traced graph, and live in the ops.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64)


class Layout(NamedTuple):
    """How rows form sequences."""

    shape: torch.Size
    """[B, T], or [N] (one sequence, or several with cu_seqlens)."""
    cu_seqlens: Tensor | None

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    @property
    def length(self) -> int:
        """Rows of a sequence where there are no cu_seqlens."""
        return self.shape[-1]


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(x).__name__}")


def check_floating(name: str, x: object) -> None:
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {x.dtype}")


def check_integer(name: str, x: object) -> None:
    check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must be int64 or int32; got {x.dtype}")


def check_like(name: str, x: Tensor, shape: Sequence[int], device: torch.device, of: str) -> None:
    """`x` has this shape and lies on this device, both of the argument named `of`."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape of {of}, {list(shape)}; got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on the device of {of}, {device}; got {x.device}")


def check_option(name: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}; got {value!r}")


def check_number(name: str, value: object, *, above: float, inclusive: bool = False) -> None:
    """`value` is a finite Python number greater than (or equal to) `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not (value < math.inf and (value >= above if inclusive else value > above)):
        relation = "at least" if inclusive else "greater than"
        raise ValueError(f"{name} must be finite and {relation} {above:g}; got {value}")


def check_logits(logits: Tensor) -> None:
    check_floating("logits", logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must be [N, V] or [B, T, V]; got shape {list(logits.shape)}")
    vocab = logits.shape[-1]
    if vocab == 0:
        raise ValueError(f"logits must have at least one word; got shape {list(logits.shape)}")
    if logits.stride(-1) != 1 and vocab > 1 and logits.numel() > 0:
        raise ValueError(
            "logits must be contiguous in their last dimension; got strides "
            f"{list(logits.stride())}. logits.contiguous() copies them once"
        )


def as_batch(logits: Tensor) -> Tensor:
    """View [N, V] as [1, N, V]; [B, T, V] stays, whatever its outer strides."""
    return logits if logits.dim() == 3 else logits[None]


def layout_of(name: str, x: Tensor, cu_seqlens: Tensor | None) -> Layout:
    """Read the layout off `x`, the argument `name`: [B, T] or [N], or [1, N] with cu_seqlens."""
    if x.dim() not in (1, 2):
        raise ValueError(f"{name} must be [B, T] or [N]; got shape {list(x.shape)}")
    if cu_seqlens is None:
        return Layout(x.shape, None)
    check_integer("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be [B + 1], B >= 1; got shape {list(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens must be on the device of {name}, {x.device}; got {cu_seqlens.device}"
        )
    if x.dim() == 2 and x.shape[0] != 1:
        raise ValueError(
            f"{name} must be packed, [N] or [1, N], where cu_seqlens is given; "
            f"got shape {list(x.shape)}"
        )
    return Layout(x.shape, cu_seqlens.contiguous())


def flat(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Row data as [N], detached and contiguous (a copy of at most N elements)."""
    x = x.detach().reshape(-1).contiguous()  # a column of a matrix is [N] as it is
    return x if dtype is None else x.to(dtype)


def flat_mask(
    response_mask: Tensor | None, layout: Layout, device: torch.device, of: str
) -> Tensor | None:
    """The response mask as [N]; bool, integer or float, not 0 where valid."""
    if response_mask is None:
        return None
    check_tensor("response_mask", response_mask)
    check_like("response_mask", response_mask, layout.shape, device, of)
    return flat(response_mask)


def flat_row_data(
    name: str, x: Tensor, layout: Layout, device: torch.device, of: str, dtype: torch.dtype
) -> Tensor:
    """Floating-point row data (log-probs) as [N] in the accumulation dtype."""
    check_floating(name, x)
    check_like(name, x, layout.shape, device, of)
    return flat(x, dtype)


def flat_span_ids(
    span_ids: Tensor | None, needed: bool, layout: Layout, device: torch.device, of: str
) -> Tensor | None:
    """Span ids as [N] int64, present exactly where the gate's granularity is "span"."""
    if not needed:
        if span_ids is not None:
            raise ValueError(
                'span_ids are used with gate granularity "span" alone; leave them out, or pass '
                'gate=DriftGate(granularity="span")'
            )
        return None
    if span_ids is None:
        raise ValueError(
            'span_ids must be given with gate granularity "span" (newline_spans makes them)'
        )
    check_integer("span_ids", span_ids)
    check_like("span_ids", span_ids, layout.shape, device, of)
    return flat(span_ids, torch.int64)
