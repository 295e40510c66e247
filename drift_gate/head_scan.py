"""`scan` and `expand` of logits that a head makes, a chunk of rows at a time, as ops.

The backward of `head_scan` makes the logits again: four products of the size N V H in all. Where
only the listed entries have a gradient (alpha = 0) it is sparse: see `sparse`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import vocabulary
from .chunks import chunks, put, take
from .head import Head, decode, logits_of, slices
from .head_gradients import Needs, Sums, as_gradients, empty_gradients, finish_sums, needed
from .sparse import head_scatter
from .torch_passes import bad_ids
from .vocab_parallel import combine, is_bad
from .vocabulary import Scan


class Chunk:
    """Logits of a few rows in a buffer, their statistics, and then their gradient in its place."""

    def __init__(
        self, head: Head, hidden: Tensor, ids: Tensor, out: Tensor, entropy: bool, backend: str
    ) -> None:
        self.head, self.ids, self.backend = head, ids, backend
        self.logits = logits_of(head, hidden, out)
        shard = head.shard
        if shard is not None:
            self.ids = shard.own(ids, self.logits.shape[1])
        statistics = vocabulary.scan(
            self.logits[None], ids if shard is None else self.ids.clamp(min=0), None, head.scale,
            entropy, False, backend,
        )  # fmt: skip
        if shard is not None:
            bad = is_bad(ids, shard.total)
            statistics = combine(statistics, self.ids, bad, shard.group)
        self.gathered, self.log_probs, self.maximum, self.log_sum, self.entropy = statistics

    def gradient(self, alpha: Tensor, beta: Tensor) -> Tensor:
        """[C, V]: d loss / d (hidden W^T + bias), over the logits, from alpha [C], beta [C, K]."""
        z, cap = self.logits, self.head.softcap
        parts = slices(z) if cap else [slice(0, len(z))]
        for rows in parts:
            kept = z[rows].to(alpha.dtype, copy=True) if cap else None
            vocabulary.expand_(
                z[None, rows], self.ids[rows], self.maximum[rows], self.log_sum[rows],
                self.gathered[rows], None, alpha[rows], beta[rows], self.head.scale, self.backend,
            )  # fmt: skip
            if kept is not None:
                uncap(z[rows], kept, cap)
        return z


def uncap(gradient: Tensor, capped: Tensor, softcap: float) -> None:
    """gradient *= 1 - (capped / softcap)^2, the slope of the cap; overwrites `capped`."""
    slope = capped.div_(softcap).square_().neg_().add_(1)
    gradient.copy_(slope.mul_(gradient))


def new_buffer(head: Head, n_rows: int, chunk_size: int) -> Tensor:
    """Room for the logits of a chunk."""
    return head.weight.new_empty(min(n_rows, chunk_size), head.weight.shape[0])


@custom_op("drift_gate::head_scan", mutates_args=())
def head_scan(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    softcap: float,
    scale: float,
    with_entropy: bool,
    chunk_size: int,
    backend: str,
    shard: str,
) -> Scan:
    """`vocabulary.scan` of the logits of hidden [N, H]; ids [N, K], valid [N] bool.

    shard: which words the weight holds, see `head.encode`; ids count from the first of all.
    Differentiable in `gathered`, `log_probs` and `log_sum`.
    """
    head = Head(weight, bias, softcap, scale, decode(shard))
    # Raises on a CPU, with the row's own number.
    bad_ids(ids, valid, weight.shape[0] if head.shard is None else head.shard.total)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    (n, k) = ids.shape
    shapes = (n, k), (n, k), (n,), (n,), (n * with_entropy,)
    results = tuple(hidden.new_zeros(shape, dtype=dtype) for shape in shapes)
    buffer = new_buffer(head, n, chunk_size)
    for rows in chunks(valid, chunk_size) or []:
        chunk = Chunk(head, take(hidden, rows), take(ids, rows), buffer, with_entropy, backend)
        parts = chunk.gathered, chunk.log_probs, chunk.maximum, chunk.log_sum, chunk.entropy
        for result, part in zip(results[: 4 + with_entropy], parts, strict=False):
            put(result, rows, part)
    gathered, log_probs, maximum, log_sum, entropy = results
    return gathered, log_probs, maximum, log_sum, entropy


@head_scan.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    softcap: float,
    scale: float,
    with_entropy: bool,
    chunk_size: int,
    backend: str,
    shard: str,
) -> Scan:
    return vocabulary.empty_scan(hidden, ids, with_entropy)


@custom_op("drift_gate::head_expand", mutates_args=())
def head_expand(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    alpha: Tensor,
    beta: Tensor,
    softcap: float,
    scale: float,
    needs: list[bool],
    chunk_size: int,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias ([0] where not needed) from alpha [N], beta [N, K]."""
    head, wanted = Head(weight, bias, softcap, scale, decode(shard)), Needs(*needs)
    sums = Sums(hidden, head, wanted, chunk_size)
    buffer = new_buffer(head, len(hidden), chunk_size)
    for rows in chunks(valid, chunk_size) or []:
        h = take(hidden, rows)
        chunk = Chunk(head, h, take(ids, rows), buffer, False, backend)
        sums.add(rows, h, chunk.gradient(take(alpha, rows), take(beta, rows)))
    grads = finish_sums(sums.finish(), sums.tensors[3].new_ones(()), weight.dtype)
    return grads[0], grads[1], grads[2]


@head_expand.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    valid: Tensor,
    alpha: Tensor,
    beta: Tensor,
    softcap: float,
    scale: float,
    needs: list[bool],
    chunk_size: int,
    backend: str,
    shard: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(hidden, weight, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Scan) -> None:
    *tensors, ctx.softcap, ctx.scale, _, ctx.chunk_size, ctx.backend, ctx.shard = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[0])


def _backward(
    ctx: Any,
    grad_gathered: Tensor | None,
    grad_log_probs: Tensor | None,
    grad_maximum: Tensor | None,
    grad_log_sum: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, ids, valid, gathered = ctx.saved_tensors
    needs, nothing = needed(ctx), (None,) * 8
    if grad_log_probs is None and grad_log_sum is None:
        if grad_gathered is None:
            return None, None, None, *nothing
        shard = decode(ctx.shard)
        if shard is not None:
            ids = shard.own(ids, weight.shape[0])
        sparse = head_scatter(
            hidden, weight, bias, ids, valid, gathered, grad_gathered, ctx.softcap, ctx.scale,
            needs, ctx.backend,
        )  # fmt: skip
        return *as_gradients(sparse, needs), *nothing
    alpha, beta = vocabulary.coefficients(gathered, grad_gathered, grad_log_probs, grad_log_sum)
    dense = head_expand(
        hidden, weight, bias, ids, valid, alpha, beta, ctx.softcap, ctx.scale, needs,
        ctx.chunk_size, ctx.backend, ctx.shard,
    )  # fmt: skip
    return *as_gradients(dense, needs), *nothing


head_scan.register_autograd(_backward, setup_context=_setup_context)
