"""How the losses of the positions become one: verl's `agg_loss` (verl/trainer/ppo/core_algos.py).

    token-mean               sum of all positions / tokens
    token-sum                sum of all positions
    seq-mean-token-sum       sum over the sequences of their sums / sequences
    seq-mean-token-sum-norm  the same / loss_scale_factor (T)
    seq-mean-token-mean      sum over the sequences of their means / sequences
    none                     the losses as they are

times dp_size. Tokens are the valid ones and sequences those with any, unless the caller counts.
"""

from torch import Tensor

from ..options import Reduction
from .gate import Sequences


def aggregate_loss(
    token_loss: Tensor, valid: Tensor, sequences: Sequences, reduction: Reduction
) -> Tensor:
    """The loss from w L of every row, 0 where not valid."""
    mode = reduction.mode
    if mode == "none":
        return token_loss
    total = token_loss[valid].sum()
    if not valid.any():
        return total  # 0, whatever the denominators are
    if mode == "token-mean":
        given = reduction.batch_num_tokens
        total = total / (valid.sum() if given is None else number(given))
    elif mode != "token-sum":
        total = over_sequences(token_loss, valid, sequences, reduction)
    return total * reduction.dp_size


def over_sequences(
    token_loss: Tensor, valid: Tensor, sequences: Sequences, reduction: Reduction
) -> Tensor:
    """The modes that count sequences, before dp_size."""
    total = token_loss.new_zeros(())
    count = 0
    for where in sequences:
        tokens = int(valid[where].sum())
        if not tokens:
            continue
        one = token_loss[where][valid[where]].sum()
        total = total + (one / (tokens + 1e-8) if reduction.mode == "seq-mean-token-mean" else one)
        count += 1
    given = reduction.global_batch_size
    total = total / (count if given is None else number(given))
    if reduction.mode == "seq-mean-token-sum-norm":
        total = total / (reduction.loss_scale_factor or token_loss.shape[-1])
    return total


def number(size: float | Tensor) -> float | Tensor:
    """A denominator that may be a tensor of one element, of inference mode too."""
    return size.detach().reshape(()).clone() if isinstance(size, Tensor) else size
