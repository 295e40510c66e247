"""What each work must move and compute, from its sizes and the rows that are live.

Bytes are those of tensors of the vocabulary's (or of the head's) size that are read or written once
each, and of the row data beside them; for the passes they are what the kernels declare. A backward
need not read a row whose gradient is 0 (a clipped row of sampled tokens): a floor that counted it
would flatter whoever leaves it out. Operations count one for an exponential, as for an addition:
they place a work on the roofline, no more.
"""

from __future__ import annotations

from typing import NamedTuple

from .cases import Case

SCAN_FLOPS = 5  # a logit: scale, shift, exp, add, maximum
EXPAND_FLOPS = 4  # scale, shift, exp, multiply
DIVERGENCE_FLOPS = 14


class Floor(NamedTuple):
    """The least that a work costs on any machine."""

    bytes: int  # with every row live
    flops: int
    unread: int = 0  # bytes that need not be read for a row whose gradient is 0

    def __add__(self, other: tuple) -> Floor:
        return Floor(*(a + b for a, b in zip(self, other, strict=True)))

    def with_dead(self, rows: int) -> Floor:
        """The same where so many rows have a gradient of 0."""
        return self._replace(bytes=self.bytes - rows * self.unread)


def scan(case: Case, k: int, *, with_entropy: bool = False) -> Floor:
    """One read of the logits; ids (int64) read, two entries an id and two statistics written."""
    logits = case.rows * case.vocab
    row = k * (8 + 4 + 4) + 8 + 4 * with_entropy
    return Floor(logits * case.itemsize + case.rows * row, SCAN_FLOPS * logits)


def top_k(case: Case) -> Floor:
    """One read of the logits; an id (int64) and a log-prob written for each listed word."""
    logits = case.rows * case.vocab
    return Floor(logits * case.itemsize + case.rows * case.k * (8 + 4), SCAN_FLOPS * logits)


def expand(case: Case, k: int, *, read: bool = True) -> Floor:
    """One write of the gradient, and one read of the logits unless alpha is 0."""
    logits = case.rows * case.vocab
    row, width = 12 + k * (8 + 4 + 4), case.vocab * case.itemsize
    bytes_ = case.rows * (width * (1 + read) + row)
    return Floor(bytes_, EXPAND_FLOPS * logits, width if read else 0)


def rows(case: Case) -> Floor:
    """Drift of the blocks, gate and loss: some 40 bytes a row."""
    blocks = 4 + 4 + 1 + 8 + 4  # log-probs, old, valid; drift and block drift, first row
    token = 3 * 4 + 1 + 8 + 16  # log-probs, old, teacher, valid, blocks; four numbers
    return Floor(case.rows * (blocks + token), 60 * case.rows)


def topk_rows(case: Case) -> Floor:
    """Scores and the teacher's log-probs read, the slope written, a mask, four numbers a row."""
    words = case.rows * case.k
    return Floor(words * (4 + 4 + 1 + 4) + case.rows * (1 + 16), 12 * words)


def divergence(case: Case, direction: str = "reverse") -> Floor:
    """One read of both logits; row data as the kernel declares it.

    Two reads for the JSD: the mixture is not known before both logsumexps are.
    """
    logits, reads = case.rows * case.vocab, 1 + (direction == "jsd")
    bytes_ = reads * 2 * logits * case.itemsize + case.rows * (8 + 1 + 28)
    return Floor(bytes_, DIVERGENCE_FLOPS * logits)


def divergence_grad(case: Case) -> Floor:
    """Both logits read, the student's gradient written."""
    logits = case.rows * case.vocab
    bytes_ = 3 * logits * case.itemsize + case.rows * (1 + 24)
    return Floor(bytes_, DIVERGENCE_FLOPS * logits)


def sparse(case: Case) -> Floor:
    """K rows of the head weighed for each row, and the head's gradient from those rows.

    Each row of the head and of the hidden states is read once, as if caches held it from then on.
    """
    one = (case.rows + min(case.vocab, case.rows * case.k)) * case.hidden * case.itemsize
    written = (case.rows + case.vocab) * case.hidden * case.itemsize
    entries = 2 * case.rows * case.k * (8 + 4)
    return Floor(one + written + entries, 4 * case.rows * case.k * case.hidden)


def linear(case: Case, gemms: float, *, teacher: bool = False) -> Floor:
    """`gemms` products of hidden states and head: the loss (1), grad_hidden (2), grad_weight (3).

    Logits need not be moved at all; hidden states and head are read, and each gradient written. A
    sparse backward writes the gradients too, and its products over K words are not counted.
    """
    one = (case.rows + case.vocab) * case.hidden * case.itemsize
    flops = 2 * case.rows * case.vocab * case.hidden
    return Floor(one * (2 + teacher), int(flops * (gemms + teacher)))
