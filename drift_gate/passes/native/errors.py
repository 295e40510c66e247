"""What is wrong with the values of tensors, said in the words of every backend."""

import torch
from torch import Tensor


def id_outside(ids: Tensor, at: int, vocab: int) -> ValueError:
    """ids [N, K], of which the element `at` of the flat tensor is the first outside [0, vocab)."""
    row, k = divmod(at, ids.shape[1])
    got = int(ids[row, k])
    return ValueError(f"ids must lie in [0, {vocab}); got {got} at row {row}, entry {k}")


def invalid_rows(
    problem: int,  # that valid_rows found, as valid.h numbers it
    labels: Tensor | None,
    response_mask: Tensor | None,
    ignore_index: int,
    vocab: int,
    cu_seqlens: Tensor | None,
    n_rows: int,
) -> ValueError:
    """What is wrong with a call's labels, mask or borders."""
    at, kind = divmod(problem, 4)
    if kind == 1:
        assert response_mask is not None
        return ValueError(
            f"response_mask must hold 0 and 1 alone; got {response_mask.flatten()[at].item()} at "
            f"index [{at}] (row_weights take weights between)"
        )
    if kind == 2:
        assert labels is not None
        return ValueError(
            f"labels must lie in [0, {vocab}) or equal ignore_index ({ignore_index}); "
            f"got {labels.flatten()[at].item()} at index [{at}]"
        )
    assert cu_seqlens is not None
    shown = cu_seqlens.tolist()
    shown = shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]
    return ValueError(f"cu_seqlens must rise from 0 to {n_rows}, the number of rows; got {shown}")


def listed_outside(ids: Tensor, at: int, vocab: int) -> ValueError:
    """ids [N, K] of teachers' words: as `id_outside`."""
    row, k = divmod(at, ids.shape[1])
    word = int(ids[row, k])
    remedy = " (ignore_unknown_ids=True leaves such words out)" if word >= vocab else ""
    return ValueError(
        f"teacher_topk_ids must lie in [0, {vocab}) or be -1 where missing; "
        f"got {word} at row {row}, entry {k}{remedy}"
    )


def listed_twice(ids: Tensor, teacher: Tensor, row: int) -> ValueError:
    """The first word of the row that is listed already."""
    counted = ids[row][(ids[row] != -1) & (teacher[row] != -torch.inf)].tolist()
    word = next(word for i, word in enumerate(counted) if word in counted[:i])
    return ValueError(
        f"teacher_topk_ids must not list a word twice in a row; got {word} twice in row {row}"
    )
