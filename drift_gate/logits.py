"""Frontend `logits`: log-probs and logsumexp of logits that the model has produced."""

from typing import Any

from torch import Tensor

from . import vocab_parallel
from .agreement import Meeting
from .arguments import (
    as_batch,
    check_integer,
    check_like,
    check_logits,
    check_number,
    flat,
)
from .rows import valid_rows
from .vocab_parallel import Shard, local_words, named_group, resolve_for


def token_log_probs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
    vocab_parallel_group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each label under softmax(logits / temperature), without a [tokens, V] temporary.

    Args:
        logits: [..., V], [N, V] or [B, T, V]; bfloat16, float16, float32 (float64 with the
            PyTorch backend). The last dimension is contiguous; outer strides are free, so that
            `logits[:, :-1]` is not copied.
        labels: [...] int64 or int32, aligned: row t of the logits predicts labels[t].
        temperature: divides the logits; greater than 0.
        ignore_index: rows with this label are not read and give 0.
        return_entropy: also return the entropy of each row's distribution.
        inplace_backward: let the backward overwrite `logits` with their gradient. Saves a
            [tokens, V] tensor; the logits are lost, and autograd refuses whatever still needs
            them, a second backward included. Where `torch.compile` traces the call, the compiler
            decides whether to reuse the memory.
        vocab_parallel_group: process group over which the words are sharded, see `opd_loss`.
        backend: "auto" (Triton on a GPU, else PyTorch), "triton", "torch" or "reference".

    Returns:
        log_probs [...] in nats, differentiable in the logits, and entropy [...] in nats, detached,
        or None. float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit. A label outside the
            vocabulary raises ValueError on the CPU; on a GPU its log-prob is NaN, and nothing
            outside the row is read.
    """
    logits, shard = local_words("logits", logits, vocab_parallel_group, -1)
    with Meeting(vocab=named_group(shard)) as ranks:
        ranks.expect(logits)
        check_logits(logits)
        check_integer("labels", labels)
        check_like("labels", labels, logits.shape[:-1], logits.device, "logits without V")
        check_number("temperature", temperature, above=0)
        chosen = resolve_for(backend, logits, shard)
        ids = flat(labels)
        on_cpu = logits.device.type == "cpu"
        vocab = logits.shape[-1] if shard is None else shard.total
        valid = valid_rows(ids, None, None, ignore_index, vocab, on_cpu)
        ranks.tell(labels.shape, temperature=temperature, entropy=return_entropy)
    if chosen == "reference":
        from . import reference

        rows = logits.reshape(-1, logits.shape[-1])
        log_probs, all_entropy = reference.token_log_probs(rows, ids, valid, temperature)
        entropy = all_entropy.detach() if return_entropy else None
    else:
        log_probs, entropy = label_log_probs(
            logits, ids, valid, temperature, return_entropy, inplace_backward, chosen, shard
        )
    shape = labels.shape
    return log_probs.view(shape), None if entropy is None else entropy.view(shape)


def label_log_probs(
    logits: Tensor,
    ids: Tensor,
    valid: Tensor,
    temperature: float,
    with_entropy: bool,
    inplace_backward: bool,
    backend: str,
    shard: Shard | None,
) -> tuple[Tensor, Tensor | None]:
    """`token_log_probs` on checked arguments: ids [N], valid [N] -> [N], and [N] or None."""
    _, log_probs, _, _, entropy = vocab_parallel.scan(
        as_batch(logits), ids[:, None], valid, 1 / temperature,
        with_entropy, inplace_backward, backend, shard,
    )  # fmt: skip
    return log_probs[:, 0], entropy.detach() if with_entropy else None


def gather_lse(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_parallel_group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Listed logits and logsumexp of each row: what any loss on a few words needs.

    With z = logits / temperature, a loss written over `(z_ids, lse)` in ordinary PyTorch gets the
    package's memory savings: its gradient is alpha * softmax(z) + sum_k beta_k onehot(ids_k),
    formed in one pass from the derivatives alpha in lse and beta in z_ids.

    Args:
        logits: [..., V], [N, V] or [B, T, V], as in `token_log_probs`.
        ids: [..., K] int64 or int32, 1 <= K <= V; listing an id twice is allowed.
        temperature: divides the logits; greater than 0.
        vocab_parallel_group: process group over which the words are sharded, see `opd_loss`: all
            of its ranks are to compute one and the same loss of z_ids and lse.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        z_ids [..., K] and lse [...], float32 (float64 for float64 logits), both differentiable in
        the logits. A row with a NaN or +inf has lse NaN; one that is all -inf, -inf.

    Raises:
        ValueError, TypeError: as in `token_log_probs`; K exceeds V.
    """
    logits, shard = local_words("logits", logits, vocab_parallel_group, -1)
    with Meeting(vocab=named_group(shard)) as ranks:
        ranks.expect(logits)
        check_logits(logits)
        check_integer("ids", ids)
        k, vocab = ids.shape[-1] if ids.dim() else 0, logits.shape[-1]
        vocab = vocab if shard is None else shard.total
        check_like("ids", ids, (*logits.shape[:-1], k), logits.device, "logits with K for V")
        if not 1 <= k <= vocab:
            raise ValueError(f"ids must list between 1 and V = {vocab} words a row; got K = {k}")
        check_number("temperature", temperature, above=0)
        chosen = resolve_for(backend, logits, shard)
        ranks.tell(ids.shape, temperature=temperature)
    rows = ids.reshape(-1, k).contiguous()
    if chosen == "reference":
        from . import reference

        z, lse = reference.gather_lse(logits.reshape(-1, vocab), rows, temperature)
    else:
        z, _, maximum, log_sum, _ = vocab_parallel.scan(
            as_batch(logits), rows, None, 1 / temperature, False, False, chosen, shard
        )
        lse = maximum.detach() + log_sum
    return z.view(ids.shape), lse.view(ids.shape[:-1])
