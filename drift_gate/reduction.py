"""`loss_agg_mode`: how per-token losses become one."""

from typing import NamedTuple

from torch import Tensor

from .arguments import check_number, check_option

LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
    "none",
)


class Reduction(NamedTuple):
    """`loss_agg_mode` as the row functions take it: see `rows.sampled_token`."""

    factor: float
    denominator: str
    token_mean: bool
    divisor: Tensor | None = None
    """A denominator that lives on the device; it divides the finished loss."""
    none: bool = False
    """The caller reduces: the loss is the per-token losses."""


def reduction(
    mode: str,
    *,
    batch_num_tokens: float | Tensor | None,
    dp_size: int,
    global_batch_size: float | Tensor | None,
    loss_scale_factor: float | None,
    length: int | None,
    ranks_along: int,
    single: bool,
) -> Reduction:
    """Translate verl's `agg_loss` arguments; raises ValueError where they do not fit.

    `length`: T of a padded batch, of which so many ranks along the sequence have a part each.
    `single`: the call sees all of the batch, nothing else counts what it does not see.
    """
    check_option("loss_agg_mode", mode, LOSS_AGG_MODES)
    check_number("dp_size", dp_size, above=0)
    by_sequence = mode.startswith("seq-")
    name = "global_batch_size" if by_sequence else "batch_num_tokens"
    size = global_batch_size if by_sequence else batch_num_tokens
    factor, divisor = float(dp_size), None
    if mode == "none":
        return Reduction(1.0, "given", False, none=True)
    if mode == "token-sum":
        return Reduction(factor, "given", False)
    if size is None:
        if dp_size > 1 and single:
            raise ValueError(
                f"{name} must be given where dp_size > 1 and there is no group (it is {dp_size})"
            )
        denominator = "sequences" if by_sequence else "tokens"
    elif isinstance(size, Tensor):
        if size.numel() != 1:
            raise ValueError(f"{name} must be one number; got shape {list(size.shape)}")
        denominator, divisor = "given", size.detach().reshape(())
    else:
        check_number(name, size, above=0)
        denominator, factor = "given", factor / size
    if mode == "seq-mean-token-sum-norm":
        if loss_scale_factor is not None:
            check_number("loss_scale_factor", loss_scale_factor, above=0)
        elif length is not None:
            loss_scale_factor = max(length * ranks_along, 1)
        else:
            raise ValueError(
                'loss_scale_factor must be given with "seq-mean-token-sum-norm" in a packed '
                "batch (a padded one takes T)"
            )
        factor = factor / loss_scale_factor
    return Reduction(factor, denominator, mode == "seq-mean-token-mean", divisor)
