"""`token_log_probs` and `gather_lse`: log-probs and logsumexp of logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments
from ..call.gradients import expand, expand_labels
from ..call.logits import as_batch, empty_scan, logits_like, writable
from ..call.op import Op, Tensors
from ..call.rows import NEVER
from ..options import Parallel, check_groups, refuse
from ..parallel.agreement import meeting
from ..parallel.words import Shard, local_words, scan
from ..passes.backends import passes_of, resolve
from .by_reference import by_reference


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    parallel: Parallel | None = None,
    backend: str = "auto",
    **removed: Any,
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each label under softmax(logits / temperature), without a [tokens, V] temporary.

    Args:
        logits: [..., V]; bfloat16, float16, float32 (float64 with the PyTorch backend). The last
            dimension is contiguous; outer strides are free, so that `logits[:, :-1]` is not copied
            (logits of four and more dimensions are, where they cannot be viewed as rows).
        labels: [...] int64 or int32, aligned: row t of the logits predicts labels[t].
        temperature: divides the logits; greater than 0.
        ignore_index: rows with this label are not read and give 0. None: no label is ignored.
        return_entropy: also return the entropy of each row's distribution.
        inplace_backward: let the backward overwrite `logits` with their gradient. Saves a [tokens,
            V] tensor; the logits are lost, and autograd refuses whatever still needs them, a second
            backward included. Where `torch.compile` traces the call, the compiler decides where the
            gradient goes.
        parallel: its `vocab_parallel_group` is the process group over which the words are sharded:
            `logits` are this rank's, [..., V_r], in the order of the ranks; everything else is the
            same on all of them, and labels and ids count from the first word of all.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        log_probs [...] in nats, differentiable in the logits, and entropy [...] in nats, detached,
        or None. float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit. A label outside the
            vocabulary raises ValueError on the CPU; on a GPU its log-prob is NaN, and nothing
            outside the row is read.
    """
    if removed:
        refuse("token_log_probs", removed)
    check_groups("token_log_probs", parallel, "vocab_parallel_group")
    logits, shard = local_words("logits", logits, parallel, -1)
    with meeting(parallel, None, "" if shard is None else shard.group) as ranks:
        ranks.expect(logits)
        logits_like("logits", logits, any_rank=True)
        if inplace_backward:
            writable("logits", logits)
        arguments.integer("labels", labels)
        shape = logits.shape[:-1]
        if labels.shape != shape or labels.device != logits.device:
            arguments.like("labels", labels, shape, logits.device, "logits without V")
        arguments.number("temperature", temperature, 0)
        chosen = resolve(backend, logits, sharded=shard is not None)
        if ranks.any:
            ranks.tell(
                labels.shape,
                temperature=temperature,
                ignore_index=ignore_index,
                entropy=return_entropy,
            )
    if chosen == "reference":
        return by_reference(token_log_probs, locals())
    ignored = NEVER if ignore_index is None else ignore_index
    if shard is None:
        shard = Shard(logits.shape[-1])
    log_probs, entropy, *_ = LOG_PROBS(
        LogProbs(
            as_batch(logits),
            labels,
            ignored,
            1 / float(temperature),
            return_entropy,
            inplace_backward,
            shard,
            chosen,
        )
    )
    return log_probs, entropy.view(shape) if return_entropy else None


class LogProbs(NamedTuple):
    """Of the op."""

    logits: Tensor  # [B, T, V]
    labels: Tensor  # [...]
    ignore_index: int
    scale: float
    entropy: bool
    inplace: bool
    shard: Shard
    backend: str


def _forward(x: LogProbs) -> Tensors:
    run, labels = passes_of(x.backend), arguments.flat(x.labels)
    check = labels.device.type == "cpu"
    valid = run.valid_rows(
        labels, None, x.ignore_index, x.shard.total, None, len(labels), labels.device, check
    )
    gathered, log_probs, maximum, log_sum, entropy = scan(
        run, x.logits, labels[:, None], valid, x.scale, x.entropy, x.shard
    )
    return log_probs.view(x.labels.shape), entropy, valid, gathered, maximum, log_sum


def _backward(
    x: LogProbs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    _, _, valid, gathered, maximum, log_sum = outputs
    if grads[0] is None:
        return [None]
    return [
        expand_labels(
            x.backend,
            x.logits,
            arguments.flat(x.labels),
            maximum,
            log_sum,
            gathered,
            valid,
            grads[0].reshape(-1),
            x.scale,
            x.shard,
            x.inplace,
        )
    ]


def _empty(x: LogProbs) -> Tensors:
    found = empty_scan(x.logits, x.labels.numel(), 1, x.entropy)
    gathered, log_probs, maximum, log_sum, entropy = found
    valid = torch.empty_like(maximum, dtype=torch.bool)
    return log_probs.view(x.labels.shape), entropy, valid, gathered, maximum, log_sum


LOG_PROBS = Op(
    "log_probs",
    LogProbs,
    _forward,
    _backward,
    _empty,
    outputs=("log_probs", "entropy", "valid", "gathered", "maximum", "log_sum"),
    grads=1,
    differentiable=("logits",),
    keep=("logits", "labels", "valid", "gathered", "maximum", "log_sum"),
)


def gather_lse(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    parallel: Parallel | None = None,
    backend: str = "auto",
    **removed: Any,
) -> tuple[Tensor, Tensor]:
    """Listed logits and logsumexp of each row: what any loss on a few words needs.

    With z = logits / temperature, a loss written over `(z_ids, lse)` in ordinary PyTorch gets the
    package's memory savings: its gradient is alpha * softmax(z) + sum_k beta_k onehot(ids_k),
    formed in one pass from the derivatives alpha in lse and beta in z_ids.

    Args:
        logits: [..., V]; bfloat16, float16, float32 (float64 with the PyTorch backend). The last
            dimension is contiguous; outer strides are free, so that `logits[:, :-1]` is not copied
            (logits of four and more dimensions are, where they cannot be viewed as rows).
        ids: [..., K] int64 or int32, 1 <= K <= V; listing an id twice is allowed.
        temperature: divides the logits; greater than 0.
        parallel: its `vocab_parallel_group` is the process group over which the words are sharded:
            `logits` are this rank's, [..., V_r], in the order of the ranks; everything else is the
            same on all of them, and labels and ids count from the first word of all. All of them
            are to compute one and the same loss of z_ids and lse.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        z_ids [..., K] and lse [...], float32 (float64 for float64 logits), both differentiable in
        the logits. A row with a NaN or +inf has lse NaN; one that is all -inf, -inf.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; K exceeds V.
    """
    if removed:
        refuse("gather_lse", removed)
    check_groups("gather_lse", parallel, "vocab_parallel_group")
    logits, shard = local_words("logits", logits, parallel, -1)
    with meeting(parallel, None, "" if shard is None else shard.group) as ranks:
        ranks.expect(logits)
        logits_like("logits", logits, any_rank=True)
        if shard is None:
            shard = Shard(logits.shape[-1])
        check_ids(ids, logits.shape[:-1], logits.device, shard.total, "logits with K for V")
        arguments.number("temperature", temperature, 0)
        chosen = resolve(backend, logits, sharded=bool(shard.group))
        if ranks.any:
            ranks.tell(ids.shape, temperature=temperature)
    if chosen == "reference":
        return by_reference(gather_lse, locals())
    z, lse, *_ = GATHER_LSE(
        Listed(as_batch(logits), ids.contiguous(), 1 / float(temperature), shard, chosen)
    )
    return z, lse


def check_ids(ids: Tensor, shape: Sequence[int], device: torch.device, vocab: int, of: str) -> None:
    """Raise unless ids are [..., K] words of a row each, 1 <= K <= vocab."""
    arguments.integer("ids", ids)
    k = ids.shape[-1] if ids.dim() else 0
    arguments.like("ids", ids, (*shape, k), device, of)
    if not 1 <= k <= vocab:
        raise ValueError(f"ids must list between 1 and V = {vocab} words a row; got K = {k}")


class Listed(NamedTuple):
    """Of the op."""

    logits: Tensor  # [B, T, V]
    ids: Tensor  # [..., K], contiguous
    scale: float
    shard: Shard
    backend: str


def _forward_lse(x: Listed) -> Tensors:
    k = x.ids.shape[-1]
    gathered, _, maximum, log_sum, _ = scan(
        passes_of(x.backend), x.logits, x.ids.view(-1, k), None, x.scale, False, x.shard
    )
    lse = (maximum + log_sum).view(x.ids.shape[:-1])
    return gathered.view(x.ids.shape), lse, maximum, log_sum


def _backward_lse(
    x: Listed, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    of_z, of_lse = grads
    gathered, _, maximum, log_sum = outputs
    k = x.ids.shape[-1]
    gathered = gathered.view(-1, k)
    alpha = torch.zeros_like(maximum) if of_lse is None else of_lse.reshape(-1)
    beta = torch.zeros_like(gathered) if of_z is None else of_z.reshape(-1, k)
    return [
        expand(
            x.backend,
            x.logits,
            x.ids.view(-1, k),
            maximum,
            log_sum,
            gathered,
            None,
            alpha.contiguous(),
            beta.contiguous(),
            x.scale,
            x.shard,
            False,
        )
    ]


def _empty_lse(x: Listed) -> Tensors:
    shape = x.ids.shape
    n = x.ids.numel() // shape[-1]
    gathered, _, maximum, log_sum, _ = empty_scan(x.logits, n, shape[-1], False)
    return gathered.view(shape), torch.empty_like(maximum).view(shape[:-1]), maximum, log_sum


GATHER_LSE = Op(
    "gather_lse",
    Listed,
    _forward_lse,
    _backward_lse,
    _empty_lse,
    outputs=("z", "lse", "maximum", "log_sum"),
    grads=2,
    differentiable=("logits",),
    keep=("logits", "ids", "z", "maximum", "log_sum"),
)
