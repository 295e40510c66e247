"""Who else computes log-probs of the teacher's top K, from logits or through the head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .guard import Peer, load


def _trl(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    function = load("trl.trainer.utils", "selective_log_softmax")
    return lambda logits, ids: function(logits[None], ids[None])[0]  # [B, T, V]


def _verl(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    function = load("verl.trainer.distillation.fsdp.losses", "_chunked_topk_log_probs")
    return lambda logits, ids: function(logits[None], ids[None])[0]


# logits [N, V], ids [N, K] -> log-probs [N, K] of the full softmax
FROM_LOGITS = (
    Peer("TRL selective_log_softmax", _trl),
    Peer("verl _chunked_topk_log_probs", _verl),
)


def veomni(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """VeOmni's chunked top-K distillation: truncated forward KL and label log-probs, [N] each.

    run(hidden, weight, labels, ids, log_q)
    """
    module = "veomni.ops.kernels.cross_entropy.chunk_topk_distill"
    function = load(module, "chunk_topk_distill_function")

    def run(
        hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = function(hidden, weight, labels, ids, log_q, shift_labels=labels)
        return result[2], result[0]

    return run
