"""Frontend `vocab-parallel`: every rank holds the logits of some of the words.

With m_r, s_r a rank's maximum and sum of exp(z - m_r) over its own words,

    m = max_r m_r      s = sum_r s_r exp(m_r - m)      z[ids] = the entry of the rank that has it

so two small all-reduces, O(N) and O(N K), make every rank's `scan` that of the whole row. All ranks
then compute one loss, and alpha and beta with it; `expand` writes each rank's part of the gradient
from its own logits, and nothing is sent.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import gradients, vocabulary
from .agreement import shard_sizes
from .backends import resolve
from .ranks import max_ranks, name_of, rank_in, sum_ranks
from .vocabulary import Scan


class Shard(NamedTuple):
    """Which words of the vocabulary a rank has."""

    first: int
    total: int  # words of all ranks
    largest: int  # words of the rank that has most
    group: str

    def own(self, ids: Tensor, words: int) -> Tensor:
        """ids [N, K] counted from this rank's first word; -1 where another rank has them."""
        local = ids - self.first
        return torch.where((local >= 0) & (local < words), local, -1)


def local_words(name: str, x: Any, group: Any, dim: int) -> tuple[Any, Shard | None]:
    """This rank's part of x, whose words lie in a dimension; and which they are, or None for all.

    A DTensor sharded over its words is recognised. Anything that is no tensor is returned as it is,
    for the checks that follow.
    """
    x, own_group = unwrap_words(name, x, dim)
    name_or_empty = name_of("vocab_parallel_group", group if group is not None else own_group)
    if not name_or_empty:
        return x, None
    words = x.shape[dim] if isinstance(x, Tensor) and x.dim() > 1 else 0
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    sizes = shard_sizes(words, name_or_empty, device)
    first = sum(sizes[: rank_in(name_or_empty)])
    return x, Shard(first, sum(sizes), max(sizes), name_or_empty)


def named_group(shard: Shard | None) -> str:
    """The group over which the words are sharded, "" for none."""
    return "" if shard is None else shard.group


def resolve_for(backend: str, x: Tensor, shard: Shard | None) -> str:
    """`backends.resolve`; the reference takes whole rows alone."""
    chosen = resolve(backend, x)
    if shard is not None and chosen == "reference":
        raise ValueError('backend "reference" takes whole rows of logits; got vocab_parallel_group')
    return chosen


def unwrap_words(name: str, x: Any, dim: int) -> tuple[Any, Any]:
    """The local part of a DTensor, and the group over which its words are sharded, or None."""
    if not (hasattr(x, "device_mesh") and hasattr(x, "to_local")):
        return x, None
    group = None
    for axis, placement in enumerate(x.placements):
        if placement.is_shard(dim % x.ndim):
            if group is not None:
                raise ValueError(f"{name} must have its words sharded over one dimension of a mesh")
            group = x.device_mesh.get_group(axis)
        elif placement.is_partial():
            raise ValueError(f"{name} must be sharded or replicated; got {x.placements}")
    return x.to_local(), group


def combine(parts: Scan, local: Tensor, bad: Tensor, group: str) -> Scan:
    """What `scan` gives of whole rows, from each rank's [N, K] and [N] statistics of its words.

    local: [N, K], -1 where another rank has the word; bad: [N, K], where none has. Every rank gets
    the same bits.
    """
    gathered, _, maximum, log_sum, entropy = parts
    top = max_ranks(maximum, group)
    shift = torch.where(top == -torch.inf, 0, top)
    share = torch.exp((maximum - shift) + log_sum)
    mine = torch.where(local < 0, 0, gathered)
    columns = [share[:, None], mine]
    if entropy.numel():
        # The sum of exp(z - m) (z - m), which is 0 where there is nothing.
        moment = share * ((log_sum - entropy) + (maximum - shift))
        columns.append(torch.where(share == 0, 0, moment)[:, None])
    sums = sum_ranks(torch.cat(columns, 1), group)
    total, found = sums[:, 0], sums[:, 1 : 1 + local.shape[1]]
    found = found.masked_fill(bad, torch.nan)
    log_sum = total.log()
    log_probs = (found - top[:, None]) - log_sum[:, None]
    if entropy.numel():
        entropy = log_sum - sums[:, -1] / total
    return found.contiguous(), log_probs, top, log_sum, entropy


def is_bad(ids: Tensor, total: int) -> Tensor:
    """Where ids are no words."""
    return (ids < 0) | (ids >= total)


@custom_op("drift_gate::sharded_scan", mutates_args=())
def sharded_scan(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
    first: int,
    total: int,
    group: str,
) -> Scan:
    """`vocabulary.scan` of rows whose words are spread over the ranks of a group.

    logits [B, T, V_r] are this rank's, from the word `first` of `total` on; ids [N, K] count from
    the first of all. Differentiable as `scan` is; the backward is local.
    """
    shard = Shard(first, total, 0, group)
    local = shard.own(ids, logits.shape[2])
    parts = vocabulary.scan(logits, local.clamp(min=0), valid, scale, with_entropy, False, backend)
    results = combine(parts, local, is_bad(ids, total), group)
    if valid is not None:
        for x in results:
            if x.numel():
                x.masked_fill_(~valid if x.dim() == 1 else ~valid[:, None], 0)
    gathered, log_probs, maximum, log_sum, entropy = results
    return gathered, log_probs, maximum, log_sum, entropy


@sharded_scan.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
    first: int,
    total: int,
    group: str,
) -> Scan:
    return vocabulary.empty_scan(logits, ids, with_entropy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Scan) -> None:
    logits, ids, valid, ctx.scale, _, ctx.inplace, ctx.backend, first, total, group = inputs
    gathered, _, maximum, log_sum, _ = output
    ctx.shard = Shard(first, total, 0, group)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ids, valid, gathered, maximum, log_sum)


def _backward(
    ctx: Any,
    grad_gathered: Tensor | None,
    grad_log_probs: Tensor | None,
    grad_maximum: Tensor | None,
    grad_log_sum: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 9
    if not ctx.needs_input_grad[0]:
        return None, *nothing
    logits, ids, valid, gathered, maximum, log_sum = ctx.saved_tensors
    alpha, beta = vocabulary.coefficients(gathered, grad_gathered, grad_log_probs, grad_log_sum)
    local = ctx.shard.own(ids, logits.shape[2])
    row_data = local, maximum, log_sum, gathered, valid, alpha, beta, ctx.scale, ctx.backend
    grad = gradients.write(vocabulary.expand, vocabulary.expand_, logits, row_data, ctx.inplace)
    return grad, *nothing


sharded_scan.register_autograd(_backward, setup_context=_setup_context)


def scan(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
    shard: Shard | None,
) -> Scan:
    """`vocabulary.scan`, over the ranks where the words are sharded."""
    arguments = logits, ids, valid, scale, with_entropy, inplace_backward, backend
    if shard is None:
        return vocabulary.scan(*arguments)
    return sharded_scan(*arguments, shard.first, shard.total, shard.group)


def gather(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    inplace_backward: bool,
    backend: str,
    shard: Shard | None,
) -> Tensor:
    """`vocabulary.gather`, over the ranks where the words are sharded."""
    rest = valid, scale, inplace_backward, backend
    if shard is None:
        return vocabulary.gather(logits, ids, *rest)
    local = shard.own(ids, logits.shape[2])
    found = vocabulary.gather(logits, local.clamp(min=0), *rest)
    return from_owners(found, ids, local, shard)


def from_owners(found: Tensor, ids: Tensor, local: Tensor, shard: Shard) -> Tensor:
    """Entries [N, K] of the ranks that have their words, NaN where none has; differentiable."""
    whole = sum_ranks(torch.where(local < 0, 0, found), shard.group)
    return whole.masked_fill(is_bad(ids, shard.total), torch.nan)
