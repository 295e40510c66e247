"""What all losses share: which rows count, how they weigh, and what is returned.

    token_loss_t = v_t w_t L_t        v: the caller's row weights, w: the gate
    loss = sum_t token_loss_t / D     D counts rows, see `reduction`

A row is valid where the response mask has it and its label is not `ignore_index`, and live where
besides v is not 0. Rows that are not live contribute exactly 0, whatever L is; they count in D,
and for the gate and its metrics.
"""

import dataclasses

import torch
from torch import Tensor

from ..gate import DriftGate
from ..options import Reduction, as_reduction
from ..outputs import LossOutput, Metrics
from .gate import block_ids, gate_metrics, mean, measured_rows, sequences_of, weigh
from .noise import noise
from .reduction import aggregate_loss
from .vocabulary import Student, entropy, labelled, scaled


@dataclasses.dataclass
class Batch:
    """The arguments that all losses share; see `drift_gate.opd_loss`."""

    student: Student
    labels: Tensor | None
    old_log_probs: Tensor | None
    gate: DriftGate | Tensor | None = dataclasses.field(default_factory=DriftGate)
    response_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    span_ids: Tensor | None = None
    temperature: float = 1.0
    ignore_index: int | None = -100
    reduction: Reduction | str = "token-mean"
    return_entropy: bool = False
    row_weights: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.student.shape
        self.valid = torch.ones(shape, dtype=torch.bool, device=self.student.device)
        if self.response_mask is not None:
            self.valid = self.valid & self.response_mask.bool()
        if self.labels is not None:
            self.valid = self.valid & labelled(self.labels, self.ignore_index)
        self.sequences = sequences_of(shape, self.cu_seqlens)

    @property
    def live(self) -> Tensor:
        """Rows that contribute."""
        return self.valid if self.row_weights is None else self.valid & (self.row_weights != 0)

    @property
    def measured(self) -> Tensor:
        """Valid rows at which the drift is."""
        gate = self.gate
        if not isinstance(gate, DriftGate):
            return self.valid
        units = gate.granularity, gate.block_size
        ids = block_ids(self.valid, self.sequences, *units, self.span_ids)
        return measured_rows(ids, gate.sample_every)

    def rows(self, x: Tensor) -> Tensor:
        """A number for each position, as the caller has it: detached, 0 where not valid."""
        return torch.where(self.valid, x.detach().to(self.student.dtype), 0)

    def scaled_logits(self) -> Tensor:
        """The student's z [..., V], differentiable on the live rows; 0 where not valid."""
        self.z = scaled(self.student.logits(self.valid, self.live), self.temperature)
        return self.z

    def drift_noise(self, log_p: Tensor) -> Tensor:
        """The mean |drift| that rounding of the logits alone would show: see `noise`."""
        if self.old_log_probs is None or self.labels is None:
            return log_p.new_zeros(())
        z = self.z.detach()[..., : log_p.shape[-1]]
        dtype, scale = self.student.rounded, 1 / self.temperature
        rows = noise(z, log_p.detach(), self.labels, self.measured, dtype, scale)
        return mean(rows, self.measured)

    def weigh(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Metrics]:
        """w and drift of each row, and the gate's metrics, from the current log-probs."""
        drift = torch.zeros_like(log_probs)
        if self.old_log_probs is not None:
            drift = self.rows(self.old_log_probs) - log_probs
        if isinstance(self.gate, DriftGate):
            assert self.old_log_probs is not None
            out = weigh(self.gate, drift, self.valid, self.sequences, self.span_ids)
            return out.weights, out.drift, out.metrics
        w = self.rows(torch.ones_like(log_probs) if self.gate is None else self.gate)
        return w, drift, gate_metrics(w, w, drift, self.valid, self.valid)

    def finish(
        self, losses: Tensor, log_p: Tensor, log_probs: Tensor, known: Tensor | None = None
    ) -> LossOutput:
        """Weigh and reduce the losses L of the positions.

        log_p [..., V] is the student's, and its entropy that of the rows in `known` (None: all);
        log_probs are the labels', in which the gate sees drift.
        """
        valid, log_probs = self.valid, log_probs.detach()
        w, drift, metrics = self.weigh(log_probs)
        metrics["ppo_kl"] = mean(drift.clamp(-20, 20), self.measured)
        metrics["drift_noise"] = self.drift_noise(log_p)
        shown = entropy(log_p, valid) if self.return_entropy else None
        if shown is not None:
            known = valid if known is None else known
            metrics["entropy"] = mean(shown, known)
            shown = shown.masked_fill(valid & ~known, torch.nan)
        if self.row_weights is not None:
            losses = self.rows(self.row_weights) * losses
        token_loss = torch.where(self.live, w * losses, 0)
        loss = aggregate_loss(token_loss, valid, self.sequences, as_reduction(self.reduction))
        return LossOutput(loss, token_loss, log_probs, w, drift, shown, metrics)
