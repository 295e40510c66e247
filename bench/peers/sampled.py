"""Who else computes the log-prob of one label a row, from logits or through the head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .guard import LeftOut, OtherWork, Peer, load, on_gpu_only

FromLogits = Callable[[Tensor, Tensor], Tensor]  # logits [N, V], labels [N] -> [N] (or [] : mean)
FromHidden = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], weight [V, H], labels

TRL_CHUNK = 32_768  # words, as its trainers pass


def _cross_entropy(device: torch.device) -> FromLogits:
    return lambda logits, labels: -functional.cross_entropy(logits, labels, reduction="none")


def _trl(device: torch.device) -> FromLogits:
    function = load("trl.trainer.utils", "selective_log_softmax")
    return lambda logits, labels: function(logits[None], labels[None])[0]  # [B, T, V]


def _verl(device: torch.device) -> FromLogits:
    function = load("verl.utils.torch_functional", "logprobs_from_logits")
    return lambda logits, labels: function(logits[None], labels[None], inplace_backward=False)[0]


def _liger(reduction: str) -> Callable[[torch.device], FromLogits]:
    def found(device: torch.device) -> FromLogits:
        function = load("liger_kernel.transformers.functional", "liger_cross_entropy")
        on_gpu_only(device)
        return lambda logits, labels: -function(logits, labels, reduction=reduction)

    return found


def _quack(reduction: str, inplace: bool) -> Callable[[torch.device], FromLogits]:
    def found(device: torch.device) -> FromLogits:
        function = load("quack.cross_entropy", "cross_entropy")
        hopper_only(device)
        options = dict(reduction=reduction, inplace_backward=inplace)
        return lambda logits, labels: -function(logits, labels, **options)

    return found


def hopper_only(device: torch.device) -> None:
    """Raise LeftOut where quack's kernels do not run."""
    on_gpu_only(device, "its kernels are CuTe's")
    if torch.cuda.get_device_capability(device)[0] < 9:
        raise LeftOut("quack needs compute capability 9.0 (Hopper) or later")


# Log-probs of the labels. What is missing to the loss, clip and gate, is done eagerly.
FROM_LOGITS = (
    Peer("torch cross_entropy", _cross_entropy),
    Peer("TRL selective_log_softmax", _trl),
    Peer("verl logprobs_from_logits", _verl),
    Peer("Liger cross_entropy", _liger("none"), overwrites=True),
    Peer("quack cross_entropy", _quack("none", inplace=False), temporaries=4),
    Peer("quack cross_entropy, in place", _quack("none", inplace=True), 2, overwrites=True),
)

# Mean log-prob in one call: cross entropy alone, at its best.
MEANS_FROM_LOGITS = (
    Peer("Liger cross_entropy", _liger("mean"), temporaries=2, overwrites=True),
    Peer("quack cross_entropy", _quack("mean", inplace=True), 2, overwrites=True),
)


def _trl_linear(device: torch.device) -> FromHidden:
    function = load("trl.kernels", "ChunkedLogProbFunction")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function.apply(hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    return run


def _veomni_linear(device: torch.device) -> FromHidden:
    function = load("veomni.ops.kernels.cross_entropy.chunk_logprobs", "chunk_logprobs_function")

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return function(hidden, weight, labels, shift_labels=labels)[0]

    return run


def _verl_linear(device: torch.device) -> FromHidden:
    head = load("verl.utils.experimental.torch_functional", "FusedLinearForPPO")()
    return lambda hidden, weight, labels: head(hidden, weight, labels)[0]


def _cce(reduction: str) -> Callable[[torch.device], FromHidden]:
    def found(device: torch.device) -> FromHidden:
        function = load("cut_cross_entropy", "linear_cross_entropy")
        kernel = "cce" if device.type == "cuda" else "torch_compile"
        options = dict(reduction=reduction, impl=kernel)
        return lambda hidden, weight, labels: -function(hidden, weight, labels, **options)

    return found


def _liger_linear(reduction: str) -> Callable[[torch.device], FromHidden]:
    def found(device: torch.device) -> FromHidden:
        function = load("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        on_gpu_only(device)
        return lambda hidden, weight, labels: -function(hidden, weight, labels, reduction=reduction)

    return found


def _liger_scaled(device: torch.device) -> FromHidden:
    function = load("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")
    on_gpu_only(device)
    return lambda hidden, weight, labels: -function.apply(hidden, weight, labels)


def _verl_fused(device: torch.device) -> FromHidden:
    function = load("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")
    on_gpu_only(device)
    return lambda hidden, weight, labels: function(hidden, weight, labels, 1.0, "none")[0]


def _torch_linear(reduction: str, *, tuned: bool) -> Callable[[torch.device], FromHidden]:
    """In chunks: its own choice, or on a CPU, where that is a few rows, 256 at a time."""

    def found(device: torch.device) -> FromHidden:
        function = load("torch.nn.functional", "linear_cross_entropy")
        make = load("torch.nn", "LinearCrossEntropyOptions")
        on_cpu = device.type == "cpu"
        if not (tuned or on_cpu):
            raise OtherWork("chosen by itself is how it is tuned")
        own = dict(batch_chunk_size=256, chunking_method=None) if tuned and on_cpu else {}
        given = dict(reduction=reduction, options=make(**own))
        return lambda hidden, weight, labels: -function(hidden, weight, labels, **given)

    return found


def _quack_linear(device: torch.device) -> FromHidden:
    function = load("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    hopper_only(device)
    return lambda hidden, weight, labels: -function(hidden, weight, labels)


FROM_HIDDEN = (
    Peer("TRL ChunkedLogProbFunction", _trl_linear, 4, compiles=True),  # imports, in fact
    Peer("VeOmni chunk_logprobs", _veomni_linear, temporaries=4),
    Peer("verl FusedLinearForPPO", _verl_linear, temporaries=4),
    Peer("verl linear_cross_entropy", _verl_fused, temporaries=4),
    Peer("cut-cross-entropy", _cce("none"), temporaries=8, compiles=True),
    Peer("torch linear_cross_entropy", _torch_linear("none", tuned=True), temporaries=4),
    Peer("Liger fused linear CE", _liger_linear("none"), temporaries=4),
    Peer("Liger fused linear scaled CE", _liger_scaled, temporaries=4),
)

MEANS_FROM_HIDDEN = (
    Peer("torch linear_cross_entropy", _torch_linear("mean", tuned=True), temporaries=4),
    Peer("cut-cross-entropy", _cce("mean"), temporaries=8, compiles=True),
    Peer("Liger fused linear CE", _liger_linear("mean"), temporaries=4),
    Peer("quack linear CE", _quack_linear, temporaries=4),
    Peer("torch linear_cross_entropy, as it comes", _torch_linear("mean", tuned=False), 4),
)


def liger_grpo(device: torch.device) -> Callable[..., Tensor]:
    """Liger's fused linear GRPO loss: PPO's clip, no dual clip, no gate.

    Its advantages are those of sequences, so every token is passed as a sequence of one.
    """
    module = load("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    compiled = device.type == "cuda"
    loss = module(beta=0.0, use_ref_model=False, chunk_size=1024, compiled=compiled)

    def run(hidden: Tensor, weight: Tensor, labels: Tensor, advantage: Tensor, old: Tensor):
        mask = torch.ones_like(labels[:, None])
        result = loss(
            hidden[:, None], weight, labels[:, None], mask, advantage,
            old_per_token_logps=old[:, None],
        )  # fmt: skip
        return result[0]

    return run
