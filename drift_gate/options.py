"""What the losses take beside tensors: clips, reduction, process groups, the LM head."""

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Clip:
    """How far the sampled-token losses follow the ratio r = pi / pi_old and the advantage A.

    Args:
        low: PPO holds r at 1 - low at least (Schulman et al. 2017); 0 or more.
        high: PPO holds r at 1 + high at most; 0 or more.
        dual: for A < 0 the loss is at most -dual * A (dual clip, arXiv 1912.09729); above 1. None
            leaves it off.
        advantage: bounds A to [-advantage, advantage], or to [low, high] where two numbers are
            given; None for no bound.
        kl: the estimator "k3" is held at 10 nats, with no gradient beyond; False leaves it free.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = 3.0
    advantage: float | tuple[float, float] | None = None
    kl: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """How per-token losses become one: verl's `agg_loss`.

    Args:
        mode: "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
            "seq-mean-token-mean"; or "none": the loss is the per-token losses.
        batch_num_tokens: tokens of the whole batch, where this call sees a part of it; a number or
            a tensor of one element. Divides "token-mean".
        dp_size: ranks over which an engine averages gradients (DDP, FSDP); multiplies the loss.
        global_batch_size: sequences of the whole batch, as batch_num_tokens; for "seq-" modes.
        loss_scale_factor: what "seq-mean-token-sum-norm" divides by; None for T.
    """

    mode: str = "token-mean"
    batch_num_tokens: float | Tensor | None = None
    dp_size: int = 1
    global_batch_size: float | Tensor | None = None
    loss_scale_factor: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Parallel:
    """Process groups (torch.distributed) over which a batch, its sequences or words are spread.

    Args:
        group: ranks that share the batch (data parallel, context parallel).
        context_parallel_group: ranks over which sequences are cut; part of `group`.
        vocab_parallel_group: ranks over which the vocabulary is sharded.
    """

    group: Any = None
    context_parallel_group: Any = None
    vocab_parallel_group: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """An LM head: z = logit_scale * cap(hidden W^T + bias), cap(x) = softcap * tanh(x / softcap).

    The cap comes first. TRL and transformers scale first: their cap(s x) is this with a softcap of
    cap / s and a logit_scale of s, as `integrations.teacher.head_of` makes it.

    Args:
        weight: [V, H].
        bias: [V], or None.
        softcap: as above, greater than 0; None for none.
        logit_scale: as above, greater than 0.
        chunk_size: rows whose logits exist at a time; None chooses by V, H, dtype and device.
        logits_dtype: None or torch.float32. The product sums in float32. With None the sums are
            rounded to the head's dtype, as eager code rounds them: bfloat16 logits of size 16 lie
            0.125 apart, which log-probs and drift then show. With torch.float32 the sums are read
            as they are, and the gradient of the logits is rounded once, for its two products. Old
            log-probs must be made with the same setting. A chunk's logits take 6 bytes a word in
            place of 2. Nothing changes for heads in float32 and float64.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    chunk_size: int | None = None
    logits_dtype: torch.dtype | None = None


def as_reduction(reduction: object) -> Reduction:
    """A `Reduction`, or its mode as a string."""
    if isinstance(reduction, str):
        return Reduction(reduction)
    if not isinstance(reduction, Reduction):
        raise TypeError(
            f"reduction must be a Reduction or its mode as a string; got {type(reduction).__name__}"
        )
    return reduction


def as_head(head: object, name: str = "head") -> Head:
    """A `Head`, or its weight."""
    if isinstance(head, Head):
        return head
    if not isinstance(head, Tensor):
        raise TypeError(f"{name} must be a Head or its weight [V, H]; got {type(head).__name__}")
    return Head(head)


def as_parallel(parallel: object) -> Parallel:
    """A `Parallel`; None for this rank alone."""
    if parallel is None:
        return Parallel()
    if not isinstance(parallel, Parallel):
        raise TypeError(f"parallel must be a Parallel or None; got {type(parallel).__name__}")
    return parallel


def check_groups(function: str, parallel: object, *taken: str) -> None:
    """Raise where a group is given that the function would ignore."""
    if parallel is None:
        return
    groups = as_parallel(parallel)
    for name in ("group", "context_parallel_group", "vocab_parallel_group"):
        if name not in taken and getattr(groups, name) is not None:
            fields = " and ".join(f"parallel.{each}" for each in taken)
            raise ValueError(f"{function} takes {fields} alone; got parallel.{name}")


def as_clip(clip: object) -> Clip:
    if not isinstance(clip, Clip):
        raise TypeError(f"clip must be a Clip; got {type(clip).__name__}")
    return clip


RENAMED = {
    "clip_ratio_low": "clip=Clip(low=...)",
    "clip_ratio_high": "clip=Clip(high=...)",
    "clip_ratio_c": "clip=Clip(dual=...)",
    "advantage_clip": "clip=Clip(advantage=...)",
    "loss_agg_mode": 'reduction="..." or reduction=Reduction(mode=...)',
    "batch_num_tokens": "reduction=Reduction(batch_num_tokens=...)",
    "dp_size": "reduction=Reduction(dp_size=...)",
    "global_batch_size": "reduction=Reduction(global_batch_size=...)",
    "loss_scale_factor": "reduction=Reduction(loss_scale_factor=...)",
    "group": "parallel=Parallel(group=...)",
    "context_parallel_group": "parallel=Parallel(context_parallel_group=...)",
    "vocab_parallel_group": "parallel=Parallel(vocab_parallel_group=...)",
    "weight": "head=Head(weight)",
    "bias": "head=Head(weight, bias=...)",
    "softcap": "head=Head(weight, softcap=...)",
    "logit_scale": "head=Head(weight, logit_scale=...)",
    "chunk_size": "head=Head(weight, chunk_size=...)",
    "teacher_weight": "teacher_head=Head(weight)",
    "teacher_bias": "teacher_head=Head(weight, bias=...)",
    "teacher_softcap": "teacher_head=Head(weight, softcap=...)",
    "teacher_logit_scale": "teacher_head=Head(weight, logit_scale=...)",
}
"""Arguments of version 0.1, and where they went."""


def refuse(function: str, unknown: dict[str, Any]) -> None:
    """Raise for keyword arguments that a public function does not have."""
    name = next(iter(unknown))
    message = f"{function}() got an unexpected keyword argument {name!r}"
    if name in RENAMED:
        message += f"; since version 0.2 it is {RENAMED[name]}"
    raise TypeError(message)
