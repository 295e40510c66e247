"""`scan` of the logits that a head makes, a chunk of rows at a time, and its backward.

The backward makes the logits again: four products of the size N V H in all. Where only the listed
entries have a gradient (alpha = 0) it is sparse: see `sparse`.
"""

from typing import Any

from torch import Tensor

from .check import HeadInputs
from .chunk_losses import Chunk, Common, Results
from .chunks import Rows, all_rows, chunks, chunks_of_most, longest, take
from .logits import Room
from .sums import Needs, Sums


def scan_head(
    run: Any,
    head: HeadInputs,
    ids: Tensor,
    valid: Tensor | None,
    with_entropy: bool,
    size: int,
    most: int | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """gathered and log_probs [N, K], maximum and log_sum [N], entropy [N] or [0], and the labels'
    log-probs [N] or None; valid None: all.

    size: rows whose logits exist at a time. most: how many rows are valid at most, if that is
    known: then nothing is read, and rows that are not valid may have results as well.
    """
    common = Common(run, head, None, size, with_entropy)
    (n, k) = ids.shape
    rows = parts_of(valid, n, size, most)
    room = Room(head, longest(rows))
    if len(rows) == 1 and isinstance(rows[0], slice):  # all of them
        return Chunk(common, rows[0], ids, room, labels).found
    shapes = (n, k), (n, k), (n,), (n,), (n if with_entropy else 0,)
    results = Results(head.hidden, *shapes, (0 if labels is None else n,))
    for at in rows:
        *parts, of_labels = Chunk(common, at, ids, room, labels).found
        results.keep(at, *parts, parts[2] if of_labels is None else of_labels)
    gathered, log_probs, maximum, log_sum, entropy, kept = results.all()
    return gathered, log_probs, maximum, log_sum, entropy, None if labels is None else kept


def expand_head(
    run: Any,
    backend: str,
    head: HeadInputs,
    ids: Tensor,
    valid: Tensor | None,
    alpha: Tensor,
    beta: Tensor,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of the gradients of hidden, weight and bias from alpha [N] and beta [N, K]."""
    size = head.rule.chunk_size
    common = Common(run, head, None, size, False)
    sums = Sums(head, needs, False, backend)
    parts = parts_of(valid, len(ids), size)
    room = Room(head, longest(parts))
    for rows in parts:
        chunk = Chunk(common, rows, ids, room)
        gradient = chunk.gradient(take(alpha, rows), take(beta, rows))
        sums.add(rows, take(head.hidden, rows), gradient)
    return sums.finish()


def check_ids(ids: Tensor, valid: Tensor | None, vocab: int) -> None:
    """Raise for ids that are no words, which a chunk would name by its own rows; on a CPU."""
    if ids.device.type != "cpu":
        return
    bad = (ids < 0) | (ids >= vocab)
    if valid is not None:
        bad &= valid[:, None]
    if bad.any():
        row, k = bad.nonzero()[0].tolist()
        raise ValueError(
            f"ids must lie in [0, {vocab}); got {int(ids[row, k])} at row {row}, entry {k}"
        )


def parts_of(valid: Tensor | None, n: int, size: int, most: int | None = None) -> list[Rows]:
    """Chunks of the valid rows; None: of all. most: as in `scan_head`."""
    if valid is not None and most is not None:
        return chunks_of_most(valid, most, size)
    return (all_rows(n, size) if valid is None else chunks(valid, size)) or []
