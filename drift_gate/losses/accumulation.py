"""`GateNormalizer`: one unit mean and one denominator for the micro-batches of a step."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gate import DriftGate
from ..options import Parallel, as_parallel, check_groups
from ..parallel.ranks import name_of
from ..parallel.scope import (
    Collector,
    Scales,
    Totals,
    at_least_one,
    joined,
    over_ranks,
    rescaled,
)
from .watch import Watch
from .weights import weights_and_totals

FURTHEST = 80.0  # nats by which a mean gate may exceed the first; float32 ends at 88


class GateNormalizer(Collector):
    """Gradient accumulation that gives the gradients of the undivided batch (arXiv 2606.24084).

    Passed to the losses as their `gate`. Each call is weighed as a part of the step's batch, up to
    one number that only the last micro-batch completes, and by which the gradients are multiplied
    once, before clipping and before the optimiser's step. So the gradients must be those of these
    losses alone: what another loss adds to them (a router's auxiliary loss, a KL term, a penalty on
    weights) would be multiplied, too, and `scale_gradients` refuses it. Run the backward of other
    losses after it, or use `weights`, which need no factor and are exact beside any loss. Calls
    that take no part in the training (under `no_grad`, or of tensors without gradients) are not
    collected.

        normalizer = GateNormalizer(DriftGate())
        for part in micro_batches:
            result = opd_loss(..., gate=normalizer)
            result.loss.backward()
        loss = normalizer.scale_gradients(model.parameters())
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    Where a loss counts its own denominator (no `batch_num_tokens`, no `global_batch_size`), that
    too becomes the step's. Until then losses, weights and gradients stand in the proportion of the
    first micro-batch: the first loss is what it would be by itself. A gradient scaler's factor may
    be on the gradients or not; sharded gradients (FSDP2, DTensor) are multiplied where they are.
    With DDP or FSDP pass `group` and `dp_size` to the losses, as without micro-batches. A loss
    inside a checkpointed region would be collected twice: keep it outside. A micro-batch whose mean
    gate is over e^80 times that of the first would overflow: on a CPU the loss raises ValueError,
    on a GPU it becomes NaN. Such steps want `weights`.

    Args:
        gate: as the losses take it; None to accumulate without a gate.

    Raises:
        TypeError: gate is neither.
    """

    def __init__(self, gate: DriftGate | None = DriftGate()) -> None:  # noqa: B008  (frozen)
        if gate is not None and not isinstance(gate, DriftGate):
            raise TypeError(f"gate must be a DriftGate or None; got {type(gate).__name__}")
        self.gate = gate
        self._watch = Watch()
        self.reset()

    def reset(self) -> None:
        """Forget what was collected; `scale_gradients` ends with it."""
        self._reference: Totals | None = None
        self._counted: bool | None = None
        self._gates = self._tokens = self._size = self._loss = torch.zeros(())
        self._calls = 0
        self._watch.close()
        self._watch = Watch()

    def collect(self, call: Totals, everyone: Totals, counted: bool) -> Scales:
        """Used by the losses: take a call's totals; what its results are to be multiplied by."""
        if self._counted not in (None, counted):
            raise ValueError(
                "the micro-batches of a GateNormalizer must agree: some losses got their "
                "denominator (batch_num_tokens, global_batch_size, token-sum), others counted it"
            )
        if self._reference is None or self._counted is None:
            zero = torch.zeros_like(everyone.peak)
            self._counted, self._reference = counted, everyone
            self._gates = self._tokens = self._size = self._loss = zero
        first = self._reference
        # Until a micro-batch has valid rows that weigh, the first is no measure.
        measures = (first.tokens > 0) & (first.peak != -torch.inf)
        self._reference = first = Totals(
            *(torch.where(measures, a, b) for a, b in zip(first, everyone, strict=True))
        )
        _check_distance(everyone, first)
        self._gates = self._gates + everyone.tokens * _quotient(everyone, first)
        self._tokens = self._tokens + everyone.tokens
        self._size = self._size + everyone.size
        self._calls += 1
        one = torch.ones_like(call.size)
        return Scales(
            _quotient(call, first),
            at_least_one(call.size) / at_least_one(first.size) if counted else one,
        )

    def follow(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Used by the losses: what a call returns, so that its backward is seen."""
        return self._watch.follow(losses)

    def record(self, loss: Tensor) -> None:
        """Used by the losses: add a call's loss."""
        self._loss = self._loss + loss.detach().sum()

    def gate_factor(self) -> Tensor:
        """The number that completes weights and per-token losses, a scalar tensor.

        Raises ValueError where nothing was collected.
        """
        if self._reference is None:
            raise ValueError("no loss was called with this GateNormalizer since the last step")
        return torch.where(self._tokens > 0, self._tokens / self._gates, 1)

    def factor(self) -> Tensor:
        """The number that completes losses and gradients collected so far, a scalar tensor.

        Raises ValueError where nothing was collected.
        """
        gate = self.gate_factor()
        if self._reference is None or not self._counted:
            return gate
        return gate * torch.where(self._tokens > 0, self._reference.size / self._size, 1)

    @torch.no_grad()
    def scale_gradients(self, parameters: Iterable[Tensor] | Tensor) -> Tensor:
        """Complete the gradients of these parameters in place, and begin the next step.

        Returns the step's loss, a detached scalar (this rank's part of it, as the losses').

        Raises ValueError where nothing was collected, and, where the factor may not be 1, for a
        parameter whose gradient is not that of the collected losses alone: none of them reaches it,
        or another loss does, in a sum with them, in a backward of its own, or before the step. Not
        seen: several losses given to `torch.autograd.backward`; of DTensors, under torch.compile
        and where reentrant checkpoints hide what is reached, all but sums; on a GPU, what was there
        before.
        """
        factor = self.factor()
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        completes = self._counted or (self.gate is not None and self.gate.normalize == "batch")
        if self._calls == 1 or not completes:  # the factor is 1
            tensors = []
        self._watch.check(tensors)
        for parameter in tensors:
            grad: Any = parameter.grad
            if grad is not None:
                part = grad.to_local() if hasattr(grad, "to_local") else grad
                part.mul_(factor.to(part.device))
        loss = self._loss * factor
        self.reset()
        return loss

    def weights(
        self, micro_batches: Sequence[Mapping[str, Any]], *, parallel: Parallel | None = None
    ) -> list[Tensor]:
        """Weights of each micro-batch, for callers who have all log-probs beforehand.

        Nothing is collected: pass a micro-batch's weights to the losses as their `gate`, and no
        gradient needs to be scaled for the gate's sake.

        Args:
            micro_batches: of each the arguments of `gate_weights` by name: log_probs,
                old_log_probs, and response_mask, cu_seqlens, span_ids where there are any.
            parallel: its `group` shares the unit mean as well.

        Returns:
            detached weights of the shape of each log_probs.

        Raises:
            ValueError, TypeError: as `gate_weights`; without a gate, or without micro-batches.
        """
        if self.gate is None or not micro_batches:
            raise ValueError("weights need a gate and at least one micro-batch")
        check_groups("GateNormalizer.weights", parallel, "group")
        found = [weights_and_totals(gate=self.gate, **part) for part in micro_batches]
        mine = joined(torch.stack([torch.stack(totals) for *_, totals in found]))
        everyone = over_ranks(mine, name_of("parallel.group", as_parallel(parallel).group))
        return [
            rescaled(w, torch.exp(totals.log_quotient(everyone)), valid)
            for w, valid, totals in found
        ]


def _check_distance(found: Totals, first: Totals) -> None:
    """All ranks see the same, and raise alike."""
    if found.peak.is_cpu and not torch.compiler.is_compiling():
        distance = float(found.log_quotient(first))
        if distance > FURTHEST:
            raise ValueError(
                f"the mean gate of this micro-batch is e^{distance:.0f} times that of the step's "
                "first, more than gradients hold: give the losses the weights of "
                "GateNormalizer.weights as their gate, or put this micro-batch first"
            )


def _quotient(found: Totals, first: Totals) -> Tensor:
    """Of the mean gates; 0 where both are."""
    return torch.where(found.peak == -torch.inf, 0, torch.exp(found.log_quotient(first)))
