"""The passes over two vocabularies in C, as `torch_divergence` has them."""

import torch
from torch import Tensor

from . import errors
from .jobs import DIVERGENCE, DIVERGENCE_GRAD
from .library import CPU, FLOAT32, INT64, booleans, choice, floats, listed, rows_of, run

LIMITS: dict[float, str] = {0: "forward", 1: "reverse"}
"""KL(teacher || student) and KL(student || teacher): JSD at the ends of beta, as in TRL. It becomes
them towards the ends, divided by beta or by 1 - beta."""


def jsd_or_limit(direction: str, beta: float) -> str:
    """The direction, or the KL that JSD is at the end of beta."""
    return LIMITS.get(beta, direction) if direction == "jsd" else direction


def divergence(
    logits: Tensor,  # [B, T, V] of KINDS, last dimension contiguous, any outer strides
    teacher: Tensor,  # [B, T, U], U <= V, likewise
    labels: Tensor | None,  # [N] int64 or int32, N = B * T
    valid: Tensor,  # [N] bool
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,  # "reverse", "forward" or "jsd"
    beta: float,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (loss [N], log_probs [N], statistics [5, N], entropy [N] or [0]), float32.

    Rows that are not valid give 0. A row with a NaN or +inf, or all -inf, gives NaN. Logits of
    -1e30 and less count as -inf.

    Raises ValueError for a label outside [0, U) in a valid row, and for an unknown direction.
    """
    n, vocab = valid.numel(), teacher.shape[2]
    loss = torch.empty(n, dtype=FLOAT32, device=CPU)
    log_probs = torch.empty(n, dtype=FLOAT32, device=CPU)
    statistics = torch.empty(5, n, dtype=FLOAT32, device=CPU)
    entropy = torch.empty(n if with_entropy else 0, dtype=FLOAT32, device=CPU)
    _mask, mask_at = booleans(valid, n)
    labels = None if labels is None else listed(labels)
    wide = labels is not None and labels.dtype is INT64
    job = DIVERGENCE.pack(
        *_models(logits, teacher, n), n, vocab, scale, teacher_scale, beta,
        _number(direction, beta), mask_at, 0 if labels is None else labels.data_ptr(), wide,
        loss.data_ptr(), log_probs.data_ptr(), statistics.data_ptr(),
        entropy.data_ptr() if with_entropy else 0,
    )  # fmt: skip
    bad = run("divergence", job, n, 2 * vocab)
    if bad:
        assert labels is not None
        raise errors.id_outside(labels[:, None], bad - 1, vocab)
    return loss, log_probs, statistics, entropy


def divergence_grad(
    logits: Tensor,  # [B, T, V], as given to divergence
    teacher: Tensor,  # [B, T, U]
    statistics: Tensor,  # [5, N], from divergence
    valid: Tensor,  # [N] bool
    upstream: Tensor,  # [N]
    scale: float,  # 1 / temperature
    teacher_scale: float,
    direction: str,
    beta: float,
    out: Tensor,  # [B, T, V], of KINDS, any outer strides; may be the logits
) -> None:
    """Write upstream * d loss / d logits into `out`, computed in float32, rounded once.

    Rows that are not valid, or whose upstream is 0, become 0 and are not read; so do the words
    that the teacher lacks. The version counter of `out` does not move.
    """
    n, vocab = valid.numel(), teacher.shape[2]
    _mask, mask_at = booleans(valid, n)
    _statistics, statistics_at = floats(5 * n, statistics)
    _upstream, upstream_at = floats(n, upstream)
    job = DIVERGENCE_GRAD.pack(
        *_models(logits, teacher, n), *rows_of(out, n), n, vocab, logits.shape[2], scale,
        teacher_scale, beta, _number(direction, beta), mask_at, *statistics_at, *upstream_at,
    )  # fmt: skip
    run("divergence_grad", job, n, vocab + logits.shape[2])


def _models(logits: Tensor, teacher: Tensor, rows: int) -> tuple[int, ...]:
    if teacher.shape[2] > logits.shape[2]:
        raise TypeError(f"the teacher has {teacher.shape[2]} words, the student {logits.shape[2]}")
    return *rows_of(logits, rows), *rows_of(teacher, rows)


def _number(direction: str, beta: float) -> int:
    number = choice("direction", jsd_or_limit(direction, beta))
    if number > 2:
        raise ValueError(f"direction {direction!r} is one of lists, not of a whole vocabulary")
    return number
