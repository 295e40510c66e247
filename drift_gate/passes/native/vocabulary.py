"""The passes over one vocabulary in C: `scan`, `scan_lists`, `gather`, `select`, `expand`."""

import torch
from torch import Tensor

from ..torch.select import select as by_sorting
from . import errors
from .jobs import EXPAND, SCAN, SELECT
from .library import CPU, FLOAT32, INT64, booleans, floats, listed, rows_of, run

NO_LABELS = 0, 0, 0
LABELS = 1 << 62  # as jobs.h has it
LARGEST_VOCABULARY = (1 << 32) - 1  # whose ids `select` can compare


def scan(
    logits: Tensor,  # [B, T, V] of KINDS, last dimension contiguous, any outer strides
    ids: Tensor,  # [N, K] int64 or int32, N = B * T
    valid: Tensor | None,  # [N] bool; None: all rows
    scale: float,  # 1 / temperature
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (gathered [N, K], log_probs [N, K], maximum [N], log_sum [N], entropy [N] or [0]).

    All are float32. Invalid rows are not read, nor their ids, and give 0. A row with a NaN or +inf
    gives NaN (its maximum may be inf); one that is all -inf has -inf for maximum and log_sum.

    Raises ValueError for an id outside [0, V) in a valid row.
    """
    return _read(logits, ids, None, valid, scale, with_entropy)[:5]


def scan_lists(
    logits: Tensor,
    labels: Tensor,  # [N] int64 or int32
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan`, and the labels' log-probs [N]. Raises ValueError for a label as for an id."""
    return _read(logits, ids, labels, valid, scale, with_entropy)


def _read(
    logits: Tensor,
    ids: Tensor,
    labels: Tensor | None,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, k = ids.shape
    gathered = torch.empty(n, k, dtype=FLOAT32, device=CPU)
    log_probs = torch.empty(n, k, dtype=FLOAT32, device=CPU)
    maximum = torch.empty(n, dtype=FLOAT32, device=CPU)
    log_sum = torch.empty(n, dtype=FLOAT32, device=CPU)
    entropy = torch.empty(n if with_entropy else 0, dtype=FLOAT32, device=CPU)
    of_labels, theirs = maximum, NO_LABELS
    if labels is not None:
        labels = listed(labels, n)
        of_labels = torch.empty(n, dtype=FLOAT32, device=CPU)
        theirs = labels.data_ptr(), labels.dtype is INT64, of_labels.data_ptr()
    of_words = log_probs.data_ptr(), maximum.data_ptr(), log_sum.data_ptr()
    wanted = *of_words, entropy.data_ptr() if with_entropy else 0, *theirs
    bad = _run(logits, ids, valid, scale, gathered, wanted, logits.shape[2])
    if bad > LABELS:
        assert labels is not None
        raise errors.id_outside(labels[:, None], bad - 1 - LABELS, logits.shape[2])
    if bad:
        raise errors.id_outside(ids, bad - 1, logits.shape[2])
    return gathered, log_probs, maximum, log_sum, entropy, of_labels


def gather(logits: Tensor, ids: Tensor, valid: Tensor | None, scale: float) -> Tensor:
    """`scan`'s gathered [N, K] = scale * logits[ids] alone; arguments as there."""
    gathered = torch.empty(*ids.shape, dtype=FLOAT32, device=CPU)
    bad = _run(logits, ids, valid, scale, gathered, (0, 0, 0, 0, *NO_LABELS), 0)
    if bad:
        raise errors.id_outside(ids, bad - 1, logits.shape[2])
    return gathered


def _run(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    gathered: Tensor,
    others: tuple[int, ...],
    words: int,  # that are read of a row, beside those listed
) -> int:
    """0, or what is outside the vocabulary, as scan.h numbers it."""
    n, k = ids.shape
    ids = listed(ids)
    _mask, mask_at = booleans(valid, n)
    job = SCAN.pack(
        *rows_of(logits, n), logits.shape[2], scale, mask_at, ids.data_ptr(), ids.dtype is INT64, k,
        gathered.data_ptr(), *others,
    )  # fmt: skip
    return run("scan", job, n, words + k)


def select(
    logits: Tensor, k: int, valid: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, K] int64, logits [N, K] and log_sum [N]: see `torch.select`; one read."""
    n, vocab = logits.shape[0] * logits.shape[1], logits.shape[2]
    if vocab > LARGEST_VOCABULARY:
        return by_sorting(logits, k, valid, scale)
    ids = torch.empty(n, k, dtype=INT64, device=CPU)
    chosen = torch.empty(n, k, dtype=FLOAT32, device=CPU)
    log_sum = torch.empty(n, dtype=FLOAT32, device=CPU)
    _mask, mask_at = booleans(valid, n)
    job = SELECT.pack(
        *rows_of(logits, n), vocab, scale, mask_at, k, ids.data_ptr(), chosen.data_ptr(),
        log_sum.data_ptr(),
    )  # fmt: skip
    run("select", job, n, vocab + k)
    return ids, chosen, log_sum


def expand(
    logits: Tensor,  # [B, T, V], as given to scan
    ids: Tensor,  # [N, K]
    maximum: Tensor | None,  # [N], from scan, as the next two; None where alpha is
    log_sum: Tensor | None,  # [N]
    gathered: Tensor | None,  # [N, K]
    valid: Tensor | None,  # [N] bool; None: all rows
    alpha: Tensor | None,  # [N]: d loss / d logsumexp; None: 0, and so is gamma
    beta: Tensor,  # [N, K]: d loss / d z[ids]
    scale: float,  # 1 / temperature
    out: Tensor,  # [B, T, V], of KINDS, any outer strides; may be the logits
    gamma: Tensor | None = None,  # [N]: d loss / d (minus the entropy); None: 0
) -> None:
    """Write d loss / d logits into `out`: scale * (alpha softmax(z) + sum_k beta_k onehot(ids_k)),
    with gamma log softmax(z) added to alpha.

    Rows that are not valid become 0 and are not read; nor are rows whose alpha (and gamma) is 0. An
    id outside [0, V) writes nothing; ids listed twice in a row receive both betas. A NaN alpha
    gives NaN. The version counter of `out` does not move.
    """
    n, k = ids.shape
    ids = listed(ids)
    _mask, mask_at = booleans(valid, n)
    _row_data, at = floats(n, maximum, log_sum, alpha, gamma)
    _word_data, words_at = floats(n * k, gathered, beta)
    job = EXPAND.pack(
        *rows_of(logits, n), *rows_of(out, n), logits.shape[2], scale, mask_at, ids.data_ptr(),
        ids.dtype is INT64, k, *at[:3], *words_at, at[3],
    )  # fmt: skip
    run("expand", job, n, logits.shape[2] + k)


def expand_labels(
    logits: Tensor,
    labels: Tensor,  # [N]
    maximum: Tensor,
    log_sum: Tensor,
    gathered: Tensor,  # [N, 1]
    valid: Tensor | None,
    slope: Tensor,  # [N]: d loss / d log p[label]
    scale: float,
    out: Tensor,
) -> None:
    """`expand` of a loss that is a function of the labels' log-probs: alpha = -beta."""
    expand(
        logits, labels[:, None], maximum, log_sum, gathered, valid, -slope, slope[:, None], scale,
        out,
    )  # fmt: skip
