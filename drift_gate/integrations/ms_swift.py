"""ms-swift: its GKD loss from this package's passes, and a GKD trainer with a drift gate.

A plugin of two lines, `--external_plugins plugin.py` of `swift rlhf --rlhf_type gkd`, calls
`install`. ms-swift then trains with `GatedGKDTrainer`, which differs from its own trainer in this:
the loss is `gkd_loss` below; and where a gate is wanted, the model scores a buffer of its own
completions once, before the first step over it.
"""

from typing import Any

import torch
from torch import Tensor

from .. import (
    DriftGate,
    LossOutput,
    Reduction,
    full_loss,
    gate_weights,
    token_log_probs,
    topk_loss,
)
from ..call.arguments import wrong_type
from . import check_version, unusable

WANTED = "4.6"

try:
    from swift.rlhf_trainers.gkd_loss import DataSource, TeacherOutput
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer
    from swift.trainers.trainer_factory import TrainerFactory
    from swift.version import __version__ as found_version

    check_version("ms-swift", WANTED, found_version)
except (ImportError, AttributeError, RuntimeError) as reason:  # its lazy modules raise the last
    raise unusable("ms-swift", WANTED, reason) from reason


def install(gate: DriftGate | None = DriftGate()) -> None:  # noqa: B008  (frozen)
    """Have `swift rlhf --rlhf_type gkd` train with `GatedGKDTrainer`.

    Args:
        gate: of each micro-batch of the student's own completions, whose weights have unit mean;
            None leaves the loss ms-swift's. Not of granularity "span".

    Raises:
        ValueError, TypeError: the gate is none, or of spans.
    """
    if gate is not None and not isinstance(gate, DriftGate):
        wrong_type("gate", gate, "a DriftGate or None")
    if gate is not None and gate.granularity == "span":
        raise ValueError(
            'gate granularity must be one of block, token, sequence in ms-swift; got "span"'
        )
    GatedGKDTrainer.gate = gate
    TrainerFactory.TRAINER_MAPPING["gkd"] = f"{__name__}.{GatedGKDTrainer.__name__}"


def gkd_loss(
    student_logits: Tensor,
    teacher_output: Any,
    labels: Tensor,
    beta: float,
    temperature: float,
    *,
    old_log_probs: Tensor | None = None,
    gate: DriftGate | None = None,
) -> tuple[Tensor, Tensor]:
    """ms-swift's function of this name: `full_loss` or, of a teacher's top K, `topk_loss`.

    Args:
        student_logits: [B, S, V], any float dtype.
        teacher_output: a `TeacherOutput`: full_logits [B, S', U]; or topk_logprobs (or logits)
            and topk_indices [B, S', K], which are renormalised; and labels [B, S'] with as many
            trained positions as the student's, in the same order (None: at the same places).
            Where V and U differ, the leading words that both have are compared.
        labels: [B, S], aligned (ms-swift shifts them before), -100 where not trained.
        beta: 0 forward KL, 1 reverse KL, between them the generalised JSD.
        temperature: divides the logits of both.
        old_log_probs: the shape of labels, nats; those of the policy that sampled, at this
            temperature. Needed for a gate.
        gate: weighs the positions; each row is a sequence.

    Returns:
        The sum over the trained positions and their number (those whose lists are empty are none).

    Raises:
        ValueError: the two have different numbers of trained positions, or K = 1; as `full_loss`.
    """
    result, count = _loss(
        student_logits, teacher_output, labels, beta, temperature, old_log_probs, gate
    )
    return result.loss, count


def _loss(
    logits: Tensor,
    teacher: Any,
    labels: Tensor,
    beta: float,
    temperature: float,
    old: Tensor | None,
    gate: DriftGate | None,
) -> tuple[LossOutput, Tensor]:
    """The package's result, its loss a sum, and the number of its positions."""
    teacher.validate()
    theirs = _aligned(teacher, labels)
    trained = labels != -100
    options: dict[str, Any] = {
        "direction": "jsd",  # at 0 and 1 the KLs, as ms-swift has them
        "beta": beta,
        "temperature": temperature,
        "reduction": Reduction("token-sum"),
        "response_mask": trained,
    }
    if teacher.is_topk_mode:
        ids, log_probs = theirs
        if ids.shape[-1] < 2:
            raise ValueError(f"gkd_logits_topk must be at least 2; got {ids.shape[-1]}")
        options |= _gated(logits, labels, old, gate, temperature, logits.shape[-1])
        options |= {"teacher_temperature": temperature, "support": "renormalized"}
        listed = trained & ~torch.isneginf(log_probs).all(-1)
        ours = topk_loss(logits, teacher_topk_ids=ids, teacher_topk_log_probs=log_probs, **options)
        return ours, listed.sum()
    (full,) = theirs
    shared = min(logits.shape[-1], full.shape[-1])
    options |= _gated(logits, labels, old, gate, temperature, shared)
    return full_loss(logits, teacher_logits=full, vocab_size=shared, **options), trained.sum()


def _gated(
    logits: Tensor,
    labels: Tensor,
    old: Tensor | None,
    gate: DriftGate | None,
    temperature: float,
    words: int,
) -> dict[str, Any]:
    """What the losses take for the gate; the labels are only needed for the drift."""
    if gate is None:
        return {"labels": None, "old_log_probs": None, "gate": None}
    if words == logits.shape[-1] or old is None:
        return {"labels": labels, "old_log_probs": old, "gate": gate}
    # The loss would take the log-probs over the words that are compared, the old ones are of all.
    now, _ = token_log_probs(logits.detach(), labels, temperature=temperature)
    weights = gate_weights(now, old, gate, response_mask=labels != -100).weights
    return {"labels": None, "old_log_probs": None, "gate": weights}


def _aligned(teacher: Any, labels: Tensor) -> tuple[Tensor, ...]:
    """The teacher's logits, or ids and log-probs of its lists, in the student's rows.

    They are there already but where the teacher has a prompt of its own.
    """
    listed = teacher.is_topk_mode
    theirs = (teacher.topk_indices, teacher.topk_logprobs) if listed else (teacher.full_logits,)
    mask = labels != -100
    other = mask if teacher.labels is None else teacher.labels != -100
    if other is mask or (other.shape == mask.shape and torch.equal(other, mask)):
        return theirs
    if mask.sum() != other.sum():
        raise ValueError(
            "teacher_output.labels must have as many trained positions as labels, "
            f"{int(mask.sum())}; got {int(other.sum())}"
        )
    placed = []
    for x in theirs:
        moved = x.new_zeros(*labels.shape, x.shape[-1])
        moved[mask] = x[other]
        placed.append(moved)
    return tuple(placed)


class GatedGKDTrainer(GKDTrainer):
    """ms-swift's `GKDTrainer`; takes the same arguments."""

    gate: DriftGate | None = DriftGate()
    """Set by `install`."""

    _old_log_probs: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.use_liger_gkd_loss:
            raise ValueError("use_liger_kernel must be False with GatedGKDTrainer; got True")
        if self.gate is None:
            return
        if self.template.padding_free:
            raise ValueError(
                "padding_free must be False with a gate, for which each row is a sequence; got True"
            )
        if self.template.sequence_parallel_size > 1:
            raise ValueError(
                "sequence_parallel_size must be 1 with a gate, which needs whole sequences; got "
                f"{self.template.sequence_parallel_size}"
            )

    def _postprocess_batch(self, samples: Any, batch_encoded_inputs: list[dict[str, Any]]) -> None:
        """ms-swift's; the model's own completions are scored, before it is trained on them."""
        super()._postprocess_batch(samples, batch_encoded_inputs)
        if self.gate is None or not self.model.training:
            return
        for inputs in batch_encoded_inputs:
            batch = inputs["gkd_batch"]
            if batch.data_source == DataSource.STUDENT:
                batch.old_log_probs = self._score(dict(inputs["model_inputs"]))

    @torch.no_grad()
    def _score(self, model_inputs: dict[str, Any]) -> Tensor:
        """Log-probs [B, S] of the labels that `_compute_jsd_loss` will see."""
        if self.get_use_logits_to_keep(self.template.sequence_parallel_size == 1):
            self.prepare_logits_to_keep(model_inputs)
        labels = model_inputs.pop("labels")
        self.model.eval()  # dropout would count as drift
        with self.compute_loss_context_manager():
            logits = self.model(**model_inputs).logits
        self.model.train()
        shifted = torch.roll(labels, -1, 1)
        return token_log_probs(logits, shifted, temperature=self.temperature)[0]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._old_log_probs = getattr(inputs["gkd_batch"], "old_log_probs", None)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _compute_jsd_loss(self, student_logits: Tensor, teacher_output: Any, labels: Tensor) -> Any:
        """ms-swift's, by `gkd_loss`; gated where the old log-probs are known."""
        old = self._old_log_probs
        teacher_output.labels = torch.roll(teacher_output.labels, -1, 1)
        if self.gkd_logits_topk is not None:
            teacher_output = teacher_output.to_topk(self.gkd_logits_topk)
        result, count = _loss(
            student_logits,
            teacher_output,
            torch.roll(labels, -1, 1),
            self.beta,
            self.temperature,
            old,
            None if old is None else self.gate,
        )
        if old is not None:
            mode = "train" if self.model.training else "eval"
            for name, value in result.metrics.items():
                self.custom_metrics[mode][f"drift_gate/{name}"].update(value)
        return result.loss / count.clamp(min=1)


__all__ = ["GatedGKDTrainer", "TeacherOutput", "gkd_loss", "install"]
