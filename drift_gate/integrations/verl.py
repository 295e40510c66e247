"""verl: gated losses in its registries of distillation losses and of policy losses.

Set VERL_USE_EXTERNAL_MODULES=drift_gate.integrations.verl for every process, and choose one of the
names that are bound below: those of `register` as `distillation.distillation_loss.loss_mode`, those
of `register_policy` as `actor.policy_loss.loss_mode`. A module of one's own that calls either can
be named there instead.

verl sees a distillation loss twice. As logits processor it gets the packed logits of a micro-batch
and returns a number for each row; as final loss it gets whole sequences, and so the gate belongs
there. verl's top-K computation is forward KL whatever the mode: `compute_topk_loss` replaces it for
the names registered here.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import DriftGate, gate_weights, gather_lse, newline_spans
from ..call import lists
from ..call.arguments import option
from ..passes.backends import passes_of, resolve
from . import check_policy_gate, check_version, unusable

WANTED = "0.9"

try:
    import verl.trainer.distillation.losses as losses
    from verl import __version__ as found_version
    from verl.trainer.ppo import core_algos
    from verl.utils.metric import AggregationType, Metric
    from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor
    from verl.workers.utils.padding import no_padding_2_padding

    check_version("verl", WANTED, found_version)
    stock_topk_loss = losses.compute_topk_loss
    register_loss, Settings = losses.register_distillation_loss, losses.DistillationLossSettings
    register_policy_loss, kl_penalty = core_algos.register_policy_loss, core_algos.kl_penalty
except (ImportError, AttributeError) as reason:
    raise unusable("verl", WANTED, reason) from reason

ESTIMATORS = ("opd", "k1", "k2", "k3")
POLICY_LOSSES = ("vanilla", "gspo", "cispo")
STRATEGIES = ("fsdp", "fsdp2", "veomni")  # logits with the whole vocabulary
LOG_PROBS = "drift_gate_log_probs"


class Kind(NamedTuple):
    """A divergence over the teacher's K words: options of `topk_loss`."""

    direction: str = "reverse"
    support: str = "renormalized"
    beta: float = 0.5


MODES: dict[str, Kind] = {}
"""Divergence of each top-K mode registered here."""


def register(
    name: str,
    loss: str | Kind,
    *,
    gate: DriftGate | None = DriftGate(),  # noqa: B008  (frozen)
    newline_ids: Sequence[int] = (),
) -> None:
    """Bind a gated loss to a `loss_mode`, in every process of verl.

    Args:
        name: the mode; verl must not have it.
        loss: Kind(direction, support, beta) of `topk_loss`, or of the sampled token: "k1", "k2",
            "k3" as verl's `kl_penalty` has them; or "opd", whose advantage is the paper's,
            teacher's log-prob less the old one, both frozen. "opd" and "k1" need
            `use_policy_gradient=True`.
        gate: of each micro-batch, whose weights have unit mean; None leaves the loss ungated.
        newline_ids: tokens that end a line, with the gate's granularity "span".

    Raises:
        ValueError, TypeError: an option is unknown, or the name is taken.
    """
    if isinstance(loss, str):
        option("loss", loss, ESTIMATORS)
    else:
        lists.kind_of(*loss, None)
    if gate is not None and gate.granularity == "span" and not newline_ids:
        raise ValueError('newline_ids must be given with gate granularity "span"; got none')
    final = _final(loss, gate, list(newline_ids))
    topk = not isinstance(loss, str)
    register_loss(Settings(names=[name], use_topk=topk, use_estimator=not topk))(final)
    if not isinstance(loss, str):
        MODES[name] = loss


def register_policy(name: str, loss: str, *, gate: DriftGate = DriftGate()) -> None:  # noqa: B008
    """Bind a gated policy loss to an `actor.policy_loss.loss_mode`, in every process of verl.

    It is verl's own function of that name, called with the gate's weights times verl's
    `rollout_is_weights` in the place of these: they multiply the position losses after every clip.

    Args:
        name: the mode; verl must not have it.
        loss: "vanilla" (PPO), "gspo" or "cispo", as verl has them.
        gate: of each micro-batch, whose weights have unit mean. Not of granularity "span": policy
            losses see no words.

    Raises:
        ValueError, TypeError: an option is unknown, or the name is taken.
    """
    option("loss", loss, POLICY_LOSSES)
    check_policy_gate("verl", loss, gate)
    if name in core_algos.POLICY_LOSS_REGISTRY:
        raise ValueError(f"Policy loss {name} already registered.")
    register_policy_loss(name)(_policy(core_algos.get_policy_loss_fn(loss), gate))


def compute_topk_loss(
    config: Any, distillation_config: Any, data: Any, student_logits: Tensor, data_format: str
) -> dict[str, Tensor]:
    """What verl's logits processor returns for each row of student_logits [1, nnz, V].

    The logits are divided by the temperature already; rows predict `input_ids` rolled by -1. Other
    modes go to verl's own function.

    Returns:
        distillation_losses (differentiable), student_mass, teacher_mass and log-probs of the
        labels, each [1, nnz] float32.

    Raises:
        NotImplementedError: the logits are sharded over the vocabulary (Megatron).
        ValueError: K = 1 with the renormalised support; on a CPU, an id outside the vocabulary.
    """
    options = distillation_config.distillation_loss
    kind = MODES.get(options.loss_mode)
    if kind is None:
        return stock_topk_loss(config, distillation_config, data, student_logits, data_format)
    if config.strategy not in STRATEGIES:
        raise NotImplementedError(
            f"loss_mode {options.loss_mode!r} needs logits with the whole vocabulary, strategy "
            f"{', '.join(STRATEGIES)}; got strategy {config.strategy!r}"
        )
    packed = data["teacher_logprobs"], data["teacher_ids"], data["input_ids"]
    teacher, words, ids = (x.values()[None] for x in packed)
    labels = torch.roll(ids, -1, dims=1)
    if get_ulysses_sequence_parallel_world_size() > 1:
        teacher, words, labels = (slice_input_tensor(x, dim=1) for x in (teacher, words, labels))
    renormalized = kind.support == "renormalized"
    if renormalized and words.shape[-1] < 2:
        raise ValueError(
            f"topk must be at least 2 with loss_mode {options.loss_mode!r}, whose loss over one "
            f"word is 0; got {words.shape[-1]}"
        )
    if not renormalized and options.use_task_rewards:
        # verl's log-probs of the same logits, which task rewards train, may leave their gradient
        # in the logits' place before this loss's backward reads them.
        student_logits = student_logits.clone()
    clamp = None if renormalized else options.log_prob_min_clamp
    logits = student_logits.squeeze(0)  # [0] would copy the gradient
    found = _rows(logits, labels[0], words[0], teacher[0], kind, clamp)
    return {name: x.view(student_logits.shape[:2]) for name, x in found.items()}


class _Listed(torch.autograd.Function):
    """The divergence over the lists as a function of the scores [N, K]."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, run: Any, kind: lists.Kind, *of_rows: Tensor) -> Any:
        rows, slope = lists.divergence(run, kind, scores.contiguous(), *of_rows)
        losses, mass = rows[0], rows[1]
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(mass)
        return losses, mass

    @staticmethod
    def backward(ctx: Any, of_losses: Tensor, of_mass: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * of_losses[:, None], *[None] * 6


def _rows(
    logits: Tensor, labels: Tensor, words: Tensor, teacher: Tensor, kind: Kind, clamp: float | None
) -> dict[str, Tensor]:
    """What `compute_topk_loss` returns, [N], from one scan of the logits [N, V]."""
    run, on_cpu = passes_of(resolve("auto", logits)), logits.device.type == "cpu"
    log_q = teacher.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    valid = torch.ones_like(labels, dtype=torch.bool)
    taken = lists.Lists(words.contiguous(), log_q, False, False)
    found = lists.listed(run, taken, valid, logits.shape[-1], on_cpu)
    z, lse = gather_lse(logits, torch.cat([labels[:, None], found.words.to(labels.dtype)], 1))
    log_probs = z - lse[:, None]
    scores = (z if kind.support == "renormalized" else log_probs)[:, 1:]
    known = log_probs.detach()[:, 1:].contiguous()
    of_kind = lists.kind_of(*kind, clamp)
    losses, mass = _Listed.apply(  # type: ignore[no-untyped-call]
        scores, run, of_kind, known, log_q, found.present, valid
    )
    return {
        "distillation_losses": losses,
        "student_mass": mass,
        "teacher_mass": log_q.exp().sum(-1),  # of what is not clamped, as verl logs it
        LOG_PROBS: log_probs[:, 0].detach(),
    }


def _final(loss: str | Kind, gate: DriftGate | None, newline_ids: list[int]) -> Callable[..., Any]:
    """The loss of whole sequences, as verl's registry wants it."""

    def final(
        config: Any, distillation_config: Any, model_output: dict[str, Any], data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        options = distillation_config.distillation_loss
        mask = _padded(data["response_mask"], False).bool()
        old = _padded(data["old_log_probs"], 0.0)
        if isinstance(loss, str):
            if loss in ("opd", "k1") and not options.use_policy_gradient:
                raise ValueError(
                    f"use_policy_gradient must be True with loss_mode {options.loss_mode!r}, whose "
                    "own gradient knows nothing of the teacher; got False"
                )
            now = no_padding_2_padding(model_output["log_probs"], data)
            teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
            found = old - teacher if loss == "opd" else kl_penalty(now, teacher, loss)
            metrics = {"distillation/abs_loss": _mean(found.detach().abs(), mask)}
        else:
            if LOG_PROBS not in model_output:
                raise RuntimeError(
                    f"loss_mode {options.loss_mode!r} found no log-probs of its own: fused kernels "
                    "compute forward KL inside the model; set use_fused_kernels=False"
                )
            names = "distillation_losses", LOG_PROBS, "student_mass", "teacher_mass"
            found, now, *masses = (no_padding_2_padding(model_output[n], data) for n in names)
            metrics = {
                f"distillation/{name}": _mean(x, mask)
                for name, x in zip(names[2:], masses, strict=True)
            }
        if options.loss_max_clamp is not None:  # verl clamps what comes back, gate and all
            found = found.clamp(-options.loss_max_clamp, options.loss_max_clamp)
        if gate is None:
            return found, metrics
        spans = None
        if gate.granularity == "span":
            responses = _padded(data["responses"], -1)
            spans = newline_spans(responses, newline_ids, response_mask=mask)
        gated = gate_weights(now.detach(), old, gate, response_mask=mask, span_ids=spans)
        for name, value in gated.metrics.items():
            kind = {"gate_min": AggregationType.MIN, "gate_max": AggregationType.MAX}.get(name)
            metrics[f"distillation/{name}"] = Metric(kind or AggregationType.MEAN, value)
        return torch.where(mask, found, 0) * gated.weights, metrics

    return final


def _policy(stock: Callable[..., Any], gate: DriftGate) -> Callable[..., Any]:
    """One of verl's policy losses, its positions weighed by the gate."""

    def policy(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        gated = gate_weights(log_prob.detach(), old_log_prob, gate, response_mask=response_mask)
        weights = gated.weights
        if rollout_is_weights is not None:
            weights = weights * rollout_is_weights
        loss, metrics = stock(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=weights,
        )
        values = torch.stack(list(gated.metrics.values())).tolist()
        named = zip(gated.metrics, values, strict=True)
        return loss, metrics | {f"actor/{name}": value for name, value in named}

    return policy


def _padded(x: Tensor, filling: float) -> Tensor:
    """[B, T] of a padded or a jagged tensor."""
    return torch.nested.to_padded_tensor(x, filling) if x.is_nested else x


def _mean(x: Tensor, mask: Tensor) -> Any:
    return Metric(AggregationType.MEAN, x[mask].mean())


losses.compute_topk_loss = compute_topk_loss
for estimator in ESTIMATORS:
    register(f"gated_{estimator}", estimator)
register("gated_lsm", Kind("reverse", "renormalized", 0.5))
register("gated_forward_kl_topk", Kind("forward", "truncated", 0.5))
register("gated_reverse_kl_topk", Kind("reverse", "tail", 0.5))
for policy_loss in POLICY_LOSSES:
    register_policy(f"gated_{policy_loss}", policy_loss)
