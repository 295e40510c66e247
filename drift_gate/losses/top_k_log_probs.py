"""`top_k_log_probs`: the likeliest words of logits, and their log-probs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import arguments
from ..call.logits import as_batch, logits_like
from ..call.op import Op, Tensors
from ..call.rows import NEVER, mask_of
from ..options import Parallel, check_groups
from ..outputs import TopKOutput
from ..parallel.agreement import Meeting, meeting
from ..parallel.words import Shard, likeliest, local_words
from ..passes.backends import passes_of, resolve
from .by_reference import by_reference


def top_k_log_probs(
    logits: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    response_mask: Tensor | None = None,
    parallel: Parallel | None = None,
    backend: str = "auto",
) -> TopKOutput:
    """The K likeliest words of each row under softmax(logits / temperature), and their log-probs.

    How a teacher is scored for `topk_loss`, and how the student's own top K is taken. No log-probs
    [tokens, V] are made: on a CPU the logits are read once.

    Args:
        logits: [..., V]; bfloat16, float16, float32 (float64 with the PyTorch backend). The last
            dimension is contiguous; outer strides are free, so that `logits[:, :-1]` is not copied
            (logits of four and more dimensions are, where they cannot be viewed as rows). They get
            no gradient.
        k: words of a row, at least 1. Where it exceeds V the lists are padded.
        temperature: divides the logits; greater than 0.
        response_mask: [...] bool, integer or float, 1 where a row is wanted; the others may hold
            anything. None: all are.
        parallel: its `vocab_parallel_group` is the process group over which the words are sharded:
            `logits` are this rank's, [..., V_r], in the order of the ranks; everything else is the
            same on all of them, and labels and ids count from the first word of all. All of them
            get the lists of whole rows.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        TopKOutput: ids and log-probs [..., K], the likeliest word first, of equal logits the
        smaller id: the same ids on every backend. Entries without a word have the id -1 and the
        log-prob -inf, which `topk_loss` leaves out.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; on a CPU a mask with
            other values than 0 and 1.
    """
    check_groups("top_k_log_probs", parallel, "vocab_parallel_group")
    logits, shard = local_words("logits", logits, parallel, -1)
    with meeting(parallel, None, "" if shard is None else shard.group) as ranks:
        ranks.expect(logits)
        logits_like("logits", logits, any_rank=True)
        arguments.number("temperature", temperature, 0)
        chosen = resolve(backend, logits, sharded=shard is not None)
        shape = logits.shape[:-1]
        k, mask = take_rows(
            k, response_mask, shape, logits.device, "logits without V", ranks, chosen
        )
        if ranks.any:
            ranks.tell(shape, temperature=temperature, k=k)
    if chosen == "reference":
        return by_reference(top_k_log_probs, locals())
    if shard is None:
        shard = Shard(logits.shape[-1])
    rows, scale = as_batch(logits.detach()), 1 / float(temperature)
    ids, log_probs = TOP_K(Listing(rows, mask, k, scale, shard, chosen))
    return TopKOutput(ids.view(*shape, k), log_probs.view(*shape, k))


def take_rows(
    k: int,
    response_mask: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    of: str,
    ranks: Meeting,
    backend: str,
) -> tuple[int, Tensor | None]:
    """k and the mask [N], checked."""
    k = arguments.whole("k", k, 1)
    if response_mask is None:
        return k, None
    mask = mask_of(response_mask, shape, device, of)
    if ranks.reads:  # what the pass would find wrong on one rank while the others wait for it
        valid_of(backend, mask)
    return k, mask


def valid_of(backend: str, mask: Tensor | None) -> Tensor | None:
    """The rows that are wanted [N] bool; None for all."""
    if mask is None:
        return None
    check = mask.device.type == "cpu"
    valid: Tensor = passes_of(backend).valid_rows(
        None, mask, NEVER, 0, None, len(mask), mask.device, check
    )
    return valid


class Listing(NamedTuple):
    """Of the op."""

    logits: Tensor  # [B, T, V], this rank's words
    mask: Tensor | None  # [N]
    k: int
    scale: float
    shard: Shard
    backend: str


def _forward(x: Listing) -> Tensors:
    valid = valid_of(x.backend, x.mask)
    found = passes_of(x.backend).select(x.logits, x.k, valid, x.scale)
    return likeliest(found, x.scale, x.shard)


def no_gradients(x: object, *rest: Any) -> list[Tensor | None]:
    """The backward of an op whose results have none."""
    return []


def _empty(x: Listing) -> Tensors:
    return empty_lists(x.logits, x.logits.shape[0] * x.logits.shape[1], x.k)


def empty_lists(like: Tensor, n: int, k: int) -> Tensors:
    """ids and log-probs [N, K], empty."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(n, k, dtype=torch.int64), like.new_empty(n, k, dtype=dtype)


TOP_K = Op(
    "top_k",
    Listing,
    _forward,
    no_gradients,
    _empty,
    outputs=("ids", "log_probs"),
    grads=0,
    differentiable=(),
    keep=(),
)
