"""`linear_token_log_probs` and `linear_gather_lse`: from hidden states and LM head."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments
from ..call.logits import empty_scan
from ..call.op import Op, Tensors
from ..call.rows import NEVER
from ..head import sparse
from ..head.check import HeadRule, head_facts, local_head, take_head
from ..head.scan import check_ids, expand_head, scan_head
from ..head.sums import Needs
from ..options import Head, Parallel, check_groups, refuse
from ..parallel.agreement import meeting
from ..parallel.words import Shard
from ..passes.backends import passes_of
from . import log_probs
from .by_reference import by_reference
from .handing import LEAVES, hand_out, head_inputs, sum_over_shards


def linear_token_log_probs(
    hidden_states: Tensor,
    head: Head | Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    parallel: Parallel | None = None,
    backend: str = "auto",
    **removed: Any,
) -> tuple[Tensor, Tensor | None]:
    """`token_log_probs` of the logits that a head makes, a chunk of rows at a time.

        z = logit_scale * cap(hidden_states W^T + bias) / temperature
        cap(x) = softcap * tanh(x / softcap), or x without a softcap

    The backward makes the logits again (four products of N V H multiplications in all). Nothing
    [tokens, V] is kept.

    Args:
        hidden_states: [B, T, H] or [N, H]; bfloat16, float16, float32 (float64 with the PyTorch
            backend). Under `torch.autocast` both they and the head are cast to its dtype.
        head: the weight [V, H], in the same dtype, or a `Head`. Any strides. A DTensor is gathered
            once, and its gradient, averaged over the ranks, is sharded again. The softcap comes
            before the scale (TRL's chunked losses scale first).
        labels: the leading shape of hidden_states, int64 or int32, aligned: row t predicts
            labels[t].
        temperature: divides the logits; greater than 0.
        ignore_index: rows with this label are not read and give 0. None: no label is ignored.
        return_entropy: also return the entropy of each row's distribution.
        parallel: its `vocab_parallel_group` is the process group over which the words are sharded:
            the head [V_r, H] is this rank's, in the order of the ranks; everything else is the same
            on all of them, and labels count from the first word of all. The gradient of the head is
            local, that of the hidden states is summed over the ranks (N H numbers). A DTensor head,
            its first dimension sharded, needs no argument beside DTensor hidden states, replicated.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        log_probs in nats, differentiable in hidden_states and head, and entropy in nats, detached,
        or None: the shape of labels, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; a label outside the
            vocabulary on the CPU (on a GPU its log-prob is NaN).
    """
    if removed:
        refuse("linear_token_log_probs", removed)
    check_groups("linear_token_log_probs", parallel, "vocab_parallel_group")
    hidden_states, head, shard = local_head(hidden_states, head, parallel)
    with meeting(parallel, None, "" if shard is None else shard.group) as ranks:
        ranks.expect(hidden_states)
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend, shard)
        arguments.integer("labels", labels)
        arguments.like("labels", labels, student.shape, student.device, student.of)
        if ranks.any:
            ranks.tell(
                labels.shape,
                temperature=temperature,
                ignore_index=ignore_index,
                entropy=return_entropy,
                **head_facts("head", head, inputs.rule),
            )
    if chosen == "reference":
        return by_reference(linear_token_log_probs, locals())
    ignored = NEVER if ignore_index is None else ignore_index
    found, entropy, *_ = LINEAR_LOG_PROBS(
        LogProbs(*inputs[:3], labels, ignored, inputs.rule, inputs.shard, return_entropy, chosen)
    )
    return found, entropy.view(labels.shape) if return_entropy else None


class LogProbs(NamedTuple):
    """Of the op."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [...]
    ignore_index: int
    rule: HeadRule
    shard: Shard
    entropy: bool
    backend: str


def _forward(x: LogProbs) -> Tensors:
    run, labels = passes_of(x.backend), arguments.flat(x.labels)
    check = labels.device.type == "cpu"
    valid = run.valid_rows(
        labels, None, x.ignore_index, x.shard.total, None, len(labels), labels.device, check
    )
    _, found, _, _, entropy, _ = scan_head(
        run, head_inputs(x), labels[:, None], _left_out(x, valid), x.entropy, x.rule.scan_size
    )
    return found.view(x.labels.shape), entropy, valid


def _left_out(x: LogProbs, valid: Tensor) -> Tensor | None:
    """The valid rows; None where all are, which need not be read."""
    return None if x.ignore_index == NEVER else valid


def _backward(
    x: LogProbs, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    if grads[0] is None:
        return [None, None, None]
    beta = grads[0].reshape(-1, 1).contiguous()
    words = arguments.flat(x.labels)[:, None]
    sums = expand_head(
        passes_of(x.backend), x.backend, head_inputs(x), words, _left_out(x, outputs[2]),
        -beta[:, 0], beta, Needs(*needs),
    )  # fmt: skip
    return hand_out(x, sums, None, None, needs)


def _empty(x: LogProbs) -> Tensors:
    n = x.labels.numel()
    _, found, _, _, entropy = empty_scan(x.hidden, n, 1, x.entropy)
    return found.view(x.labels.shape), entropy, x.labels.new_empty(n, dtype=torch.bool)


LINEAR_LOG_PROBS = Op(
    "linear_log_probs",
    LogProbs,
    _forward,
    _backward,
    _empty,
    outputs=("log_probs", "entropy", "valid"),
    grads=1,
    differentiable=LEAVES,
    keep=(*LEAVES, "labels", "valid"),
)


def linear_gather_lse(
    hidden_states: Tensor,
    head: Head | Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    parallel: Parallel | None = None,
    backend: str = "auto",
    **removed: Any,
) -> tuple[Tensor, Tensor]:
    """`gather_lse` of the logits that a head makes: for losses of one's own.

    A loss over `z_ids` alone has a sparse gradient: K rows of the head for each row, and no dense
    product. One that uses `lse` has its logits made again in the backward.

    Args:
        hidden_states: [B, T, H] or [N, H]; bfloat16, float16, float32 (float64 with the PyTorch
            backend). Under `torch.autocast` both they and the head are cast to its dtype.
        head: the weight [V, H], in the same dtype, or a `Head`. Any strides. A DTensor is gathered
            once, and its gradient, averaged over the ranks, is sharded again. The softcap comes
            before the scale (TRL's chunked losses scale first).
        ids: [..., K] int64 or int32 of the leading shape of hidden_states, 1 <= K <= V; listing an
            id twice is allowed.
        temperature: divides the logits; greater than 0.
        parallel: its `vocab_parallel_group` is the process group over which the words are sharded:
            the head [V_r, H] is this rank's, in the order of the ranks; everything else is the same
            on all of them, and ids count from the first word of all. The gradient of the head is
            local, that of the hidden states is summed over the ranks (N H numbers). A DTensor head,
            its first dimension sharded, needs no argument beside DTensor hidden states, replicated.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        z_ids [..., K] and lse [...], float32 (float64 for float64), both differentiable in
        hidden_states and head.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; K exceeds V.
    """
    if removed:
        refuse("linear_gather_lse", removed)
    check_groups("linear_gather_lse", parallel, "vocab_parallel_group")
    hidden_states, head, shard = local_head(hidden_states, head, parallel)
    with meeting(parallel, None, "" if shard is None else shard.group) as ranks:
        ranks.expect(hidden_states)
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend, shard)
        log_probs.check_ids(
            ids, student.shape, student.device, student.vocab, "hidden_states with K for H"
        )
        if ranks.any:
            ranks.tell(ids.shape, temperature=temperature, **head_facts("head", head, inputs.rule))
    if chosen == "reference":
        return by_reference(linear_gather_lse, locals())
    z, lse, *_ = LINEAR_GATHER_LSE(
        Listed(*inputs[:3], ids.contiguous(), inputs.rule, inputs.shard, chosen)
    )
    return z, lse


class Listed(NamedTuple):
    """Of the op."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    ids: Tensor  # [..., K], contiguous
    rule: HeadRule
    shard: Shard
    backend: str


def _forward_lse(x: Listed) -> Tensors:
    shape = x.ids.shape
    ids = x.ids.view(-1, shape[-1])
    check_ids(ids, None, x.shard.total)
    z, _, maximum, log_sum, *_ = scan_head(
        passes_of(x.backend), head_inputs(x), ids, None, False, x.rule.scan_size
    )
    return z.view(shape), (maximum + log_sum).view(shape[:-1])


def _backward_lse(
    x: Listed, outputs: list[Any], grads: list[Tensor | None], needs: list[bool]
) -> list[Tensor | None]:
    of_z, of_lse = grads
    run, ids = passes_of(x.backend), x.ids.view(-1, x.ids.shape[-1])
    beta = None if of_z is None else of_z.reshape(ids.shape).contiguous()
    if of_lse is None:
        if beta is None:
            return [None, None, None]
        valid = (beta != 0).any(-1)
        z = outputs[0].view(ids.shape)
        found = sparse.scatter(run, x.backend, head_inputs(x), ids, valid, z, beta, Needs(*needs))
        return sum_over_shards(x, found, needs)
    alpha = of_lse.reshape(-1).contiguous()
    if beta is None:
        beta = alpha.new_zeros(ids.shape)
    sums = expand_head(run, x.backend, head_inputs(x), ids, None, alpha, beta, Needs(*needs))
    return hand_out(x, sums, None, None, needs)


def _empty_lse(x: Listed) -> Tensors:
    shape = x.ids.shape
    z, _, maximum, _, _ = empty_scan(x.hidden, x.ids.numel() // shape[-1], shape[-1], False)
    return z.view(shape), maximum.view(shape[:-1])


LINEAR_GATHER_LSE = Op(
    "linear_gather_lse",
    Listed,
    _forward_lse,
    _backward_lse,
    _empty_lse,
    outputs=("z", "lse"),
    grads=2,
    differentiable=LEAVES,
    keep=(*LEAVES, "ids", "z"),
)
