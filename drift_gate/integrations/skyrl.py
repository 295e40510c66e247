"""SkyRL: gated policy losses in its registry.

Import this module in the script that starts the training, before Ray, and choose one of the names
that `register` has bound below as `trainer.algorithm.policy_loss_type`. SkyRL's registry carries
them to its workers.

SkyRL's losses are homogeneous in the advantage, by which it also reduces them: it scales the
advantages of a mini-batch and sums. So its own functions are called, with gated advantages.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import DriftGate, gate_weights
from ..call.arguments import option
from . import check_policy_gate, check_version, unusable

WANTED = "0.4"

try:
    from skyrl import __version__ as found_version
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, register_policy_loss

    check_version("skyrl", WANTED, found_version)
except (ImportError, AttributeError, RuntimeError) as reason:  # pydantic raises the last
    raise unusable("skyrl", WANTED, reason) from reason

LOSSES = ("regular", "dual_clip", "gspo", "cispo")


def register(name: str, loss: str, *, gate: DriftGate = DriftGate()) -> None:  # noqa: B008
    """Bind a gated policy loss to a `trainer.algorithm.policy_loss_type`.

    It is SkyRL's own function of that loss, called with the advantages times the gate's weights.

    Args:
        name: the type; SkyRL must not have it.
        loss: "regular" (PPO), "dual_clip", "gspo" or "cispo", as SkyRL has them.
        gate: of each micro-batch, whose weights have unit mean. Not of granularity "span": policy
            losses see no words.

    Raises:
        ValueError, TypeError: an option is unknown, or the name is taken.
    """
    option("loss", loss, LOSSES)
    check_policy_gate("SkyRL", loss, gate)
    register_policy_loss(name)(_gated(loss, PolicyLossRegistry.get(loss), gate))


def _gated(loss: str, stock: Callable[..., Any], gate: DriftGate) -> Callable[..., Any]:
    """One of SkyRL's policy losses, its positions weighed by the gate."""

    def policy_loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = None if loss_mask is None else loss_mask > 0
        gated = gate_weights(log_probs.detach(), old_log_probs, gate, response_mask=mask)
        own = copy.copy(config)
        own.policy_loss_type = loss  # SkyRL's function chooses its dual clip by it
        total, metrics = stock(
            log_probs,
            old_log_probs,
            advantages * gated.weights,
            config=own,
            loss_mask=loss_mask,
            rollout_logprobs=rollout_logprobs,
        )
        values = torch.stack(list(gated.metrics.values())).tolist()
        return total, metrics | dict(zip(gated.metrics, values, strict=True))

    return policy_loss


for each in LOSSES:
    register(f"gated_{each}", each)
