"""Who else computes divergences over the whole vocabulary, from logits or through both heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .guard import load, on_gpu_only

# Weight of the teacher in Liger's and TRL's mixtures; their ends are the two KLs.
BETA = {"forward": 0.0, "jsd": 0.5, "reverse": 1.0}


def liger(device: torch.device) -> Callable[[Tensor, Tensor, str], Tensor]:
    """Liger's JSD of log-probs, mean over rows; the log-probs are formed eagerly."""
    function = load("liger_kernel.transformers.functional", "liger_jsd")
    on_gpu_only(device)

    def run(logits: Tensor, teacher: Tensor, direction: str) -> Tensor:
        log_p, log_q = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return function(log_p, log_q, beta=BETA[direction])

    return run


def liger_linear(device: torch.device) -> Callable[..., Tensor]:
    """Liger's chunked fused linear JSD, mean over rows."""
    module = load("liger_kernel.chunked_loss", "LigerFusedLinearJSDLoss")
    compiled = device.type == "cuda"

    def run(
        hidden: Tensor,
        weight: Tensor,
        teacher: Tensor,
        head: Tensor,
        labels: Tensor,
        direction: str,
    ) -> Tensor:
        options = dict(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[direction])
        return module(**options, compiled=compiled)(hidden, weight, teacher, head, labels)

    return run


def trl_linear(device: torch.device) -> Callable[..., Tensor]:
    """TRL's chunked divergence, [N]."""
    function = load("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction")

    def run(
        hidden: Tensor, weight: Tensor, teacher: Tensor, head: Tensor, direction: str
    ) -> Tensor:
        return function.apply(hidden, weight, None, teacher, head, None, BETA[direction])[0]

    return run
