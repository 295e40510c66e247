"""Frontend `linear`: log-probs and logsumexp from hidden states and LM head, logits never whole."""

from typing import Any

import torch
from torch import Tensor

from .agreement import Meeting
from .arguments import check_integer, check_like, flat
from .head import Inputs, check_head, encode, local_head
from .head_scan import head_scan
from .rows import valid_rows
from .vocab_parallel import named_group


def linear_token_log_probs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    chunk_size: int | None = None,
    vocab_parallel_group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """`token_log_probs` of the logits that a head makes, a chunk of rows at a time.

        z = logit_scale * cap(hidden_states W^T + bias) / temperature
        cap(x) = softcap * tanh(x / softcap), or x without a softcap

    The backward makes the logits again (four products of N V H multiplications in all). Nothing
    [tokens, V] is kept.

    Args:
        hidden_states: [B, T, H] or [N, H]; bfloat16, float16, float32 (float64 with the PyTorch
            backend). Under `torch.autocast` both they and the head are cast to its dtype.
        weight: [V, H] of the head, in the same dtype; any strides. A DTensor is gathered once, and
            its gradient, averaged over the ranks, is sharded again.
        labels: the leading shape of hidden_states, int64 or int32, aligned: row t predicts
            labels[t].
        bias: [V], or None.
        softcap, logit_scale: as above; greater than 0. Gemma caps, Cohere scales.
        temperature: divides the logits; greater than 0.
        ignore_index: rows with this label are not read and give 0.
        return_entropy: also return the entropy of each row's distribution.
        chunk_size: rows whose logits exist at a time; None chooses by V and device.
        vocab_parallel_group: process group over which the words are sharded: weight [V_r, H] and
            bias are this rank's, in the order of the ranks; everything else is the same on all of
            them, and labels count from the first word of all. The gradient of the head is local,
            that of the hidden states is summed over the ranks (N H numbers). A DTensor head, its
            first dimension sharded, needs no argument beside DTensor hidden states, replicated.
        backend: "auto" (Triton on a GPU, else PyTorch), "triton", "torch" or "reference".

    Returns:
        log_probs in nats, differentiable in hidden_states, weight and bias, and entropy in nats,
        detached, or None: the shape of labels, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; a label outside the
            vocabulary on the CPU (on a GPU its log-prob is NaN).
    """
    hidden_states, weight, bias, shard = local_head(
        hidden_states, weight, bias, vocab_parallel_group
    )
    with Meeting(vocab=named_group(shard)) as ranks:
        ranks.expect(hidden_states)
        inputs = check_head(
            hidden_states, weight, bias, softcap, logit_scale, temperature, chunk_size, backend,
            shard=shard,
        )  # fmt: skip
        student = inputs.student
        check_integer("labels", labels)
        check_like("labels", labels, student.shape, student.device, "hidden_states without H")
        ids = flat(labels)
        on_cpu = student.device.type == "cpu"
        valid = valid_rows(ids, None, None, ignore_index, student.vocab, on_cpu)
        ranks.tell(
            labels.shape, scale=inputs.head.scale, softcap=softcap, entropy=return_entropy,
            chunk_size=chunk_size,
        )  # fmt: skip
    if inputs.backend == "reference":
        from . import reference

        rows = eager_logits(inputs)
        log_probs, all_entropy = reference.token_log_probs(rows, ids, valid, 1 / inputs.head.scale)
        entropy = all_entropy.detach() if return_entropy else None
    else:
        scanned = scan_head(inputs, ids[:, None], valid, return_entropy)
        log_probs, entropy = scanned[1][:, 0], scanned[4].detach() if return_entropy else None
    return log_probs.view(labels.shape), None if entropy is None else entropy.view(labels.shape)


def linear_gather_lse(
    hidden_states: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    vocab_parallel_group: Any = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`gather_lse` of the logits that a head makes: for losses of one's own.

    A loss over `z_ids` alone has a sparse gradient: K rows of the head for each row, and no dense
    product. One that uses `lse` has its logits made again in the backward.

    Args:
        ids: [..., K] int64 or int32 of the leading shape of hidden_states, 1 <= K <= V; listing an
            id twice is allowed.
        others: as in `linear_token_log_probs`.

    Returns:
        z_ids [..., K] and lse [...], float32 (float64 for float64), both differentiable in
        hidden_states, weight and bias.

    Raises:
        ValueError, TypeError: as in `linear_token_log_probs`; K exceeds V.
    """
    hidden_states, weight, bias, shard = local_head(
        hidden_states, weight, bias, vocab_parallel_group
    )
    with Meeting(vocab=named_group(shard)) as ranks:
        ranks.expect(hidden_states)
        inputs = check_head(
            hidden_states, weight, bias, softcap, logit_scale, temperature, chunk_size, backend,
            shard=shard,
        )  # fmt: skip
        student = inputs.student
        check_integer("ids", ids)
        k, vocab = ids.shape[-1] if ids.dim() else 0, student.vocab
        check_like("ids", ids, (*student.shape, k), student.device, "hidden_states with K for H")
        if not 1 <= k <= vocab:
            raise ValueError(f"ids must list between 1 and V = {vocab} words a row; got K = {k}")
        ranks.tell(ids.shape, scale=inputs.head.scale, softcap=softcap, chunk_size=chunk_size)
    rows = ids.reshape(-1, k).contiguous()
    if inputs.backend == "reference":
        from . import reference

        z, lse = reference.gather_lse(eager_logits(inputs), rows, 1 / inputs.head.scale)
    else:
        valid = torch.ones_like(rows[:, 0], dtype=torch.bool)
        z, _, maximum, log_sum, _ = scan_head(inputs, rows, valid, False)
        lse = maximum.detach() + log_sum
    return z.view(ids.shape), lse.view(student.shape)


def scan_head(
    inputs: Inputs, ids: Tensor, valid: Tensor, with_entropy: bool, *, dense: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`head_scan` of checked arguments; `dense` where its gradient is."""
    size = inputs.chunk_size if dense else inputs.scan_size
    weight, bias, softcap, scale, shard = inputs.head
    return head_scan(
        inputs.hidden, weight, bias, ids, valid, softcap, scale, with_entropy, size,
        inputs.backend, encode(shard),
    )  # fmt: skip


def eager_logits(inputs: Inputs) -> Tensor:
    """Differentiable logits [N, V] before the scale, as eager code makes them: the reference."""
    weight, bias, softcap, *_ = inputs.head
    z = torch.nn.functional.linear(inputs.hidden, weight, bias)
    return softcap * torch.tanh(z / softcap) if softcap else z
