"""Log-probs of the words that vLLM samples, which TRL's distillation trainer discards."""

from typing import Any

import torch
from torch import Tensor


class Recording:
    """TRL's `VLLMGeneration`, the log-probs of its last call kept."""

    def __init__(self, generation: Any, from_server: bool) -> None:
        generation.logprobs = 0  # the sampled word's alone; TRL's trainer asks for none
        self._generation = generation
        self._log_probs: list[list[list[float | None]]] = []
        if not from_server:
            return
        mode = generation.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise ValueError(
                "the vLLM server's --logprobs-mode must be processed_logprobs with "
                f"vllm_importance_sampling_clip_max; got {mode}"
            )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL calls it."""
        found = self._generation.generate(*args, **kwargs)
        self._log_probs = found[2]
        return found

    def padded(self, like: Tensor) -> Tensor:
        """Log-probs [B, T] of the last call's completions, like [B, T]; NaN where vLLM has none."""
        out = torch.zeros(like.shape, dtype=torch.float32)
        for row, words in zip(out, self._log_probs, strict=True):
            row[: len(words)] = torch.tensor([float("nan") if x is None else x for x, *_ in words])
        return out.to(like.device)


def importance_weights(old: Tensor, sampled: Tensor, largest: float) -> Tensor:
    """exp(old - sampled), at most `largest`; 0 for a word whose log-prob is not known."""
    return (old - sampled).exp().clamp(max=largest).nan_to_num(0.0)
