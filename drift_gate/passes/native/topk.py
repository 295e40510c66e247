"""The teacher's lists in C: which entries count, and the divergence over them."""

import ctypes

import torch
from torch import Tensor

from . import errors
from .divergence import jsd_or_limit
from .jobs import SUPPORT, TOPK
from .library import BOOL, CPU, FLOAT32, INT64, booleans, choice, floats, listed, run

NEVER = 2**62
Tally = ctypes.c_int64 * 3
"""Valid rows without support, entries listed again, and the first row with one."""


def topk_support(
    ids: Tensor,  # [N, K] int32 or int64
    teacher: Tensor,  # [N, K] float32
    valid: Tensor,  # [N] bool
    vocab: int,
    check: bool,
    check_duplicates: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (words [N, K] as ids, present [N, K] bool, supported [N] bool, counts [2] float32).

    An entry is missing where its id is -1 or its log-prob -inf. Of entries with the same id the
    first counts. `present`: entries of valid rows that count; `words`: their ids, 0 elsewhere;
    `supported`: valid rows with any;
    `counts`: valid rows without any, and entries of valid rows that repeat one.

    Raises ValueError with `check` for an id outside [0, vocab), and with `check_duplicates` for one
    that a row lists twice, of entries of valid rows that are not missing.
    """
    n, k = ids.shape
    ids = listed(ids)
    _teacher, (teacher_at,) = floats(n * k, teacher)
    _mask, mask_at = booleans(valid, n)
    words = torch.empty(n, k, dtype=ids.dtype, device=CPU)
    present = torch.empty(n, k, dtype=BOOL, device=CPU)
    supported = torch.empty(n, dtype=BOOL, device=CPU)
    counts = torch.empty(2, dtype=FLOAT32, device=CPU)
    tally = Tally(0, 0, NEVER)
    at = ctypes.addressof(tally)
    job = SUPPORT.pack(
        vocab, k, ids.data_ptr(), ids.dtype is INT64, teacher_at, mask_at, check,
        check_duplicates, words.data_ptr(), present.data_ptr(), supported.data_ptr(), at, at + 16,
    )  # fmt: skip
    bad = run("support", job, n, 4 * k, for_set=False)
    without, again, twice = tally
    if bad:
        raise errors.listed_outside(ids, bad - 1, vocab)
    if twice != NEVER:
        raise errors.listed_twice(ids, teacher, twice)
    (ctypes.c_float * 2).from_address(counts.data_ptr())[:] = [without, again]
    return words, present, supported, counts


def topk_rows(
    scores: Tensor,  # [N, K] float32: logits with support "renormalized", else log-probs
    log_probs: Tensor | None,  # [N, K] float32, for the student's mass; None: that is 0
    teacher: Tensor,  # [N, K] float32 log-probs (with "renormalized" any logits)
    present: Tensor,  # [N, K] bool
    valid: Tensor,  # [N] bool
    direction: str,  # "reverse", "forward", "jsd" or "mixed"
    support: str,  # "renormalized", "truncated" or "tail"
    beta: float,  # of "jsd" and "mixed", in [0, 1]
) -> tuple[Tensor, Tensor]:
    """Return (rows [4, N]: loss, student mass, teacher mass, overlap; slope [N, K]), float32.

    The slope is that of the loss in the scores. 0 where not valid, or not present. "mixed" is
    beta * forward + (1 - beta) * reverse. Raises ValueError for unknown options.
    """
    n, k = scores.shape
    direction = jsd_or_limit(direction, beta)
    _words, words_at = floats(n * k, scores, log_probs, teacher)
    _present, here_at = booleans(present, n * k)
    _mask, mask_at = booleans(valid, n)
    rows = torch.empty(4, n, dtype=FLOAT32, device=CPU)
    slope = torch.empty(n, k, dtype=FLOAT32, device=CPU)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1]; got {beta}")
    job = TOPK.pack(
        n, k, *words_at, here_at, mask_at, rows.data_ptr(), slope.data_ptr(),
        choice("direction", direction), choice("support", support), beta,
    )  # fmt: skip
    run("topk", job, n, 4 * k)
    return rows, slope
