"""Tensors as functions in C take them: checked, for they are read by address."""

import torch
from torch import Tensor

CPU = torch.device("cpu")
FLOAT32, INT32, INT64, BOOL = torch.float32, torch.int32, torch.int64, torch.bool
KINDS = {torch.bfloat16: 0, torch.float16: 1, FLOAT32: 2}  # as rows.c numbers them


def rows_of(x: Tensor, rows: int) -> tuple[int, int, int, int, int]:
    """`struct rows` of [B, T, V], B * T rows."""
    batch, length, vocab = x.shape
    of_batch, of_row, of_word = x.stride()
    if batch * length != rows or not (of_word == 1 or vocab < 2):
        raise _unfit("logits", x, f"[B, T, V], {rows} rows that are contiguous")
    return x.data_ptr(), of_batch, of_row, length or 1, KINDS[x.dtype]


def floats(count: int, *tensors: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Row data of so many elements: contiguous, to be kept, and their addresses, 0 for None."""
    kept, places = [], []
    for x in tensors:
        if x is None:
            places.append(0)
            continue
        if x.dtype is not FLOAT32 or x.numel() != count:
            raise _unfit("row data", x, f"float32 of {count} elements")
        x = x.contiguous()
        kept.append(x)
        places.append(x.data_ptr())
    return kept, places


def booleans(x: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """A mask of so many elements, contiguous, to be kept; and its address, 0 for None."""
    if x is None:
        return None, 0
    if x.dtype is not BOOL or x.numel() != count:
        raise _unfit("masks", x, f"bool of {count} elements")
    x = x.contiguous()
    return x, x.data_ptr()


def listed(ids: Tensor, count: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """int32 or int64 (or this one alone), contiguous, of so many elements."""
    kind = ids.dtype
    if (kind is not INT64 and kind is not INT32) or (dtype is not None and kind is not dtype):
        raise _unfit("ids", ids, str(dtype or "int32 or int64"))
    if count is not None and ids.numel() != count:
        raise _unfit("ids", ids, f"of {count} elements")
    return ids.contiguous()


# As valid.h numbers them: bytes of an integer, or floats.
MASKS = {torch.bfloat16: 16, torch.float16: 17, FLOAT32: 18, torch.float64: 19}


def mask_kind(x: Tensor, count: int) -> int:
    """How the elements of a mask of any dtype are read."""
    kind = MASKS.get(x.dtype, x.element_size())
    if x.numel() != count or x.is_complex() or (x.is_floating_point() and kind < 16):
        raise _unfit("response_mask", x, f"bool, integer or float of {count} elements")
    return kind


def _unfit(name: str, x: Tensor, wanted: str) -> TypeError:
    return TypeError(f"{name} must be {wanted}; got {x.dtype} {list(x.shape)}")
