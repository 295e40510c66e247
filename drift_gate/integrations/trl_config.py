"""TRL: the options of `drift_gate.integrations.trl.GatedDistillationTrainer`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from .. import Clip, DriftGate
from ..call.arguments import number, option
from ..call.lists import kind_of
from ..choices import ADVANTAGES, ESTIMATORS, Advantage, Aggregate, Support
from . import check_version, unusable

WANTED = "1.16"

try:
    from trl import DistillationConfig
    from trl import __version__ as found_version

    check_version("trl", WANTED, found_version)
except (ImportError, AttributeError, RuntimeError) as reason:  # TRL's lazy modules raise the last
    raise unusable("trl", WANTED, reason) from reason

LOSSES = ("sampled", "topk", "full")
DIRECTIONS = ("jsd", "mixed")
LOGITS_DTYPES = {"float32": torch.float32}
if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal[tuple(ESTIMATORS)]  # choices of a command line


@dataclass
class GatedDistillationConfig(DistillationConfig):
    """`trl.DistillationConfig` with the gate's options.

    TRL's `beta` chooses the divergence of "topk" and "full": 0 forward, 1 reverse, between them the
    generalised JSD. TRL's `temperature` divides both models' logits, as it does when sampling.

    Args:
        num_iterations: optimiser epochs over each buffer of rollouts (paper: 2).
        steps_per_generation: micro-batches in a buffer, a multiple of gradient_accumulation_steps.
            None: one optimiser step's.
        loss: "sampled" (`linear_opd_loss`), "topk" (`linear_topk_loss`), "full"
            (`linear_full_loss`).
        advantage: of "sampled": "old" (the paper's) or "current", refreshed in each step.
        estimator: of "sampled": the position loss, as `opd_loss` names them.
        clip_ratio_low: of "sampled": `Clip.low`.
        clip_ratio_high: of "sampled": `Clip.high`.
        clip_ratio_c: of "sampled": `Clip.dual`.
        advantage_clip: of "sampled": `Clip.advantage`.
        teacher_top_k: of "topk": words that the teacher lists.
        support: of "topk": "renormalized" (with beta = 1 it is LSM), "truncated" or "tail".
        direction: of "topk": "jsd", or "mixed", beta forward KL + (1 - beta) reverse (NeMo-RL's
            default, at 0.5).
        vllm_importance_sampling_clip_max: weighs each token by the ratio of the old policy and of
            what vLLM sampled from, at most this (TRL's GRPO: "token_truncate"). None: no weights.
        gate_granularity: "block", "span" (lines of the response), "token", "sequence", or "off".
        gate_block_size: positions of a "block".
        gate_tau: inverse temperature of the gate; 0 makes every weight 1.
        gate_aggregate: a block's drift from its positions': "mean", "mean_abs", "rms", "max_abs".
        gate_sample_every: every how many positions of a block the drift is measured.
        logits_dtype: None, or "float32" as TRL's own loss has them: `Head.logits_dtype` of student
            and teacher, for the old log-probs, too.
    """

    num_iterations: int = field(
        default=2, metadata={"help": "Optimiser epochs over each buffer of rollouts."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Micro-batches in a buffer; None: one optimiser step's."}
    )
    loss: Literal["sampled", "topk", "full"] = field(
        default="sampled", metadata={"help": "What the teacher is asked for."}
    )
    estimator: EstimatorName = field(
        default="ppo", metadata={"help": "Position loss of the sampled-token loss."}
    )
    advantage: Advantage = field(
        default="old", metadata={"help": "Whose log-prob the teacher's is compared with."}
    )
    clip_ratio_low: float = field(default=0.2, metadata={"help": "PPO's clip below 1."})
    clip_ratio_high: float = field(default=0.2, metadata={"help": "PPO's clip above 1."})
    clip_ratio_c: float = field(default=3.0, metadata={"help": "PPO's dual clip."})
    advantage_clip: float | None = field(
        default=None, metadata={"help": "Bound of the advantage's magnitude."}
    )
    teacher_top_k: int = field(default=32, metadata={"help": "Words the teacher lists."})
    support: Support = field(
        default="renormalized", metadata={"help": "Support of the top-K divergence."}
    )
    direction: Literal["jsd", "mixed"] = field(
        default="jsd", metadata={"help": "Divergence of the top-K loss, by beta."}
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=None,
        metadata={"help": "Bound of vLLM's importance ratios as weights; None: no weights."},
    )
    gate_granularity: Literal["block", "span", "token", "sequence", "off"] = field(
        default="block", metadata={"help": "What a block of the gate is; off trains ungated."}
    )
    gate_block_size: int = field(default=64, metadata={"help": "Positions of a block."})
    gate_tau: float = field(default=1.0, metadata={"help": "Inverse temperature of the gate."})
    gate_aggregate: Aggregate = field(
        default="mean", metadata={"help": "A block's drift from its positions'."}
    )
    gate_sample_every: int = field(
        default=1,
        metadata={"help": "Measure a block's drift at every such position; 1: at all."},
    )
    logits_dtype: str | None = field(
        default=None, metadata={"help": "float32 keeps the sums of the heads' products."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        option("loss", self.loss, LOSSES)
        option("estimator", self.estimator, ESTIMATORS)
        option("advantage", self.advantage, ADVANTAGES)
        option("direction", self.direction, DIRECTIONS)
        if self.direction == "mixed" and self.loss != "topk":
            raise ValueError(f'direction "mixed" needs loss "topk"; got loss {self.loss!r}')
        if self.vllm_importance_sampling_clip_max is not None:
            number(
                "vllm_importance_sampling_clip_max", self.vllm_importance_sampling_clip_max, above=0
            )
            if not self.use_vllm:
                raise ValueError(
                    "use_vllm must be True with vllm_importance_sampling_clip_max; got False"
                )
        if self.logits_dtype is not None:
            option("logits_dtype", self.logits_dtype, LOGITS_DTYPES)
        for name in ("num_iterations", "teacher_top_k"):
            number(name, getattr(self, name), above=0)
        if self.loss == "topk":
            kind_of("jsd", self.support, self.beta, None)
            if self.support == "renormalized" and self.teacher_top_k < 2:
                raise ValueError(
                    'teacher_top_k must be at least 2 with support "renormalized"; got '
                    f"{self.teacher_top_k}"
                )
        accumulate = self.gradient_accumulation_steps
        if self.steps_per_generation is None:
            self.steps_per_generation = accumulate
        if self.steps_per_generation < 1 or self.steps_per_generation % accumulate:
            raise ValueError(
                "steps_per_generation must be a multiple of gradient_accumulation_steps, "
                f"{accumulate}; got {self.steps_per_generation}"
            )
        self.drift_gate()

    def drift_gate(self) -> DriftGate | None:
        """The gate of these options."""
        if self.gate_granularity == "off":
            return None
        return DriftGate(
            granularity=self.gate_granularity,
            block_size=self.gate_block_size,
            tau=self.gate_tau,
            aggregate=self.gate_aggregate,
            sample_every=self.gate_sample_every,
        )

    def clip(self) -> Clip:
        """The clips of "sampled"."""
        return Clip(
            self.clip_ratio_low, self.clip_ratio_high, self.clip_ratio_c, self.advantage_clip
        )
