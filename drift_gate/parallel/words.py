"""Words spread over ranks: every rank holds the logits of some of the vocabulary.

With m_r, s_r a rank's maximum and sum of exp(z - m_r) over its own words,

    m = max_r m_r      s = sum_r s_r exp(m_r - m)      z[ids] = the entry of the rank that has it

so two small all-reduces, O(N) and O(N K), make every rank's `scan` that of the whole row. All ranks
then compute one loss, and alpha and beta with it; `expand` writes each rank's part of the gradient
from its own logits, and nothing is sent.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import as_parallel
from .ranks import gather_ranks, max_ranks, name_of, rank_in, sum_ranks


class Shard(NamedTuple):
    """Which words of the vocabulary a rank has; `Shard(V)`: all V of them."""

    total: int  # words of all ranks
    first: int = 0
    largest: int = 0  # words of the rank that has most, where there are several
    group: str = ""  # named, see `ranks`; "" where this rank has all


def local_words(name: str, x: Any, parallel: Any, dim: int) -> tuple[Any, Shard | None]:
    """This rank's part of x, whose words lie in a dimension; and which they are, or None for all.

    A DTensor sharded over its words is recognised. Anything that is no tensor is returned as it is,
    for the checks that follow.
    """
    asked = None if parallel is None else as_parallel(parallel).vocab_parallel_group
    if asked is None and not hasattr(x, "device_mesh"):
        return x, None
    x, own_group = unwrap_words(name, x, dim)
    group = name_of("parallel.vocab_parallel_group", own_group if asked is None else asked)
    if not group:
        return x, None
    words = x.shape[dim] if isinstance(x, Tensor) and x.dim() > 1 else 0
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    sizes = _shard_sizes(words, group, str(device))
    return x, Shard(sum(sizes), sum(sizes[: rank_in(group)]), max(sizes), group)


def _shard_sizes(size: int, group: str, device: str) -> list[int]:
    """Words of every rank's shard: the ranks are asked each time, as none knows alone whether a
    vocabulary is new to the others."""
    mine = torch.tensor([size], device=device)
    found: list[int] = gather_ranks(mine, group).flatten().tolist()
    return found


# As torch.compiler.assume_constant_result does, which also loads torch._dynamo, for seconds.
_shard_sizes._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


def own(shard: Shard, ids: Tensor, words: int) -> Tensor:
    """ids counted from this rank's first word; -1 where another rank has them."""
    local = ids - shard.first
    return torch.where((local >= 0) & (local < words), local, -1)


def is_bad(ids: Tensor, total: int) -> Tensor:
    """Where ids are no words."""
    return (ids < 0) | (ids >= total)


def scan(
    run: Any,
    logits: Tensor,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backend's `scan` of rows whose words may be spread over ranks; ids count all words."""
    if not shard.group:
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = run.scan(
            logits, ids, valid, scale, with_entropy
        )
        return found
    local = own(shard, ids, logits.shape[2])
    parts = run.scan(logits, local.clamp(min=0), valid, scale, with_entropy)
    return _combine(parts, local, is_bad(ids, shard.total), valid, shard.group)


def scan_lists(
    run: Any,
    logits: Tensor,
    labels: Tensor | None,
    ids: Tensor,
    valid: Tensor | None,
    scale: float,
    with_entropy: bool,
    shard: Shard,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """`scan`, and the log-probs of the labels [N]; None without labels."""
    if labels is None:
        return *scan(run, logits, ids, valid, scale, with_entropy, shard), None
    if not shard.group:
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = run.scan_lists(
            logits, labels, ids, valid, scale, with_entropy
        )
        return found
    both = torch.cat([labels[:, None].to(ids.dtype), ids], 1)
    gathered, log_probs, *others = scan(run, logits, both, valid, scale, with_entropy, shard)
    maximum, log_sum, entropy = others
    listed = gathered[:, 1:].contiguous(), log_probs[:, 1:].contiguous()
    return *listed, maximum, log_sum, entropy, log_probs[:, 0].contiguous()


def _combine(
    parts: tuple[Tensor, ...], local: Tensor, bad: Tensor, valid: Tensor | None, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `scan` gives of whole rows, from each rank's statistics of its words.

    local: [N, K], -1 where another rank has the word; bad: [N, K], where none has. Every rank gets
    the same bits.
    """
    gathered, _, maximum, log_sum, entropy = parts
    top = max_ranks(maximum, group)
    shift = torch.where(top == -torch.inf, 0, top)
    share = torch.exp((maximum - shift) + log_sum)
    columns = [share[:, None], torch.where(local < 0, 0, gathered)]
    if entropy.numel():
        # The sum of exp(z - m) (z - m), which is 0 where there is nothing.
        moment = share * ((log_sum - entropy) + (maximum - shift))
        columns.append(torch.where(share == 0, 0, moment)[:, None])
    sums = sum_ranks(torch.cat(columns, 1), group)
    total, found = sums[:, 0], sums[:, 1 : 1 + local.shape[1]].masked_fill(bad, torch.nan)
    log_sum = total.log()
    log_probs = (found - top[:, None]) - log_sum[:, None]
    if entropy.numel():
        entropy = log_sum - sums[:, -1] / total
    results = found.contiguous(), log_probs, top, log_sum, entropy
    if valid is not None:
        for x in results:
            if x.numel():
                x.masked_fill_(~valid if x.dim() == 1 else ~valid[:, None], 0)
    return results


def from_owners(found: Tensor, ids: Tensor, shard: Shard, words: int) -> Tensor:
    """Entries [N, K] of the ranks that have their words, NaN where none has."""
    theirs = own(shard, ids, words) < 0
    everyones = sum_ranks(torch.where(theirs, 0, found), shard.group)
    return everyones.masked_fill(is_bad(ids, shard.total), torch.nan)


def likeliest(
    found: tuple[Tensor, Tensor, Tensor], scale: float, shard: Shard
) -> tuple[Tensor, Tensor]:
    """ids and log-probs [N, K] as `TopKOutput` has them, from each rank's `select`."""
    ids, logits, log_sum = _joined_lists(found, scale, shard) if shard.group else found
    log_probs = (logits - logits[:, :1]).mul_(scale).sub_(log_sum[:, None])
    log_probs.masked_fill_(ids < 0, -torch.inf)
    undefined = ~log_sum.isfinite()[:, None]
    first = torch.arange(ids.shape[1], device=ids.device)
    first = torch.where(first < shard.total, first, -1)
    ids = torch.where(undefined, first, ids)
    return ids, log_probs.masked_fill_(undefined & (ids >= 0), torch.nan)


def _joined_lists(
    found: tuple[Tensor, Tensor, Tensor], scale: float, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """The lists of whole rows: two collectives, of 12 K + 4 bytes a row and rank."""
    ids, logits, log_sum = found
    ids = torch.where(ids < 0, ids, ids + shard.first)
    every = gather_ranks(torch.cat([logits, log_sum[:, None]], 1), shard.group)
    ids = gather_ranks(ids, shard.group).transpose(0, 1).flatten(1)
    top = every[:, :, 0].amax(0)
    shift = torch.where(top == -torch.inf, 0, top)
    share = torch.exp((every[:, :, 0] - shift) * scale + every[:, :, -1])
    # Ranks come in the order of their words, so that equal ones stay in that of their ids.
    logits = every[:, :, :-1].transpose(0, 1).flatten(1)
    logits, place = logits.sort(descending=True, stable=True)
    k = found[0].shape[1]
    # Rows that are not valid have no word, and every log_sum is 0; those all -inf have it so.
    total = torch.where(top == -torch.inf, every[:, :, -1].sum(0), share.sum(0).log())
    return ids.gather(1, place[:, :k]), logits[:, :k], total
