"""TRL: a distillation trainer that reuses its rollouts, with drift-gated losses.

`GatedDistillationTrainer` is TRL's `DistillationTrainer` but for three things: a buffer of rollouts
serves several optimiser epochs; the model as it is before the first of them, and the teacher, score
the buffer once; the loss is one of this package's, from hidden states and LM head.
"""

import inspect
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import (
    GateNormalizer,
    Head,
    LossOutput,
    Parallel,
    Reduction,
    linear_full_loss,
    linear_opd_loss,
    linear_token_log_probs,
    linear_top_k_log_probs,
    linear_topk_loss,
    newline_spans,
)
from ..outputs import is_mostly_rounding
from . import unusable
from .teacher import head_of, newline_token_ids
from .trl_config import LOGITS_DTYPES, WANTED, GatedDistillationConfig
from .vllm_samples import Recording, importance_weights
from .vocabularies import Words, shared_words, tokenizer_of

try:
    from datasets import IterableDataset
    from trl import DistillationConfig, DistillationTrainer
    from trl.models import prepare_deepspeed
    from trl.trainer.utils import (
        RepeatSampler,
        create_model_from_path,
        repeat_iterable_dataset,
        shuffle_sequence_dict,
        split_pixel_values_by_grid,
        split_tensor_dict,
        unsplit_pixel_values_by_grid,
    )

    # What a forward takes beside ids, mask and length: the inputs of vision-language models.
    FORWARD_EXTRAS = tuple(
        inspect.signature(DistillationTrainer._get_last_hidden_state).parameters
    )[5:]
except (ImportError, AttributeError, RuntimeError) as reason:  # TRL's lazy modules raise the last
    raise unusable("trl", WANTED, reason) from reason

LOG = logging.getLogger(__name__)


class GatedDistillationTrainer(DistillationTrainer):
    """TRL's `DistillationTrainer` with rollout reuse and a drift gate; takes the same arguments.

    Student and teacher may have heads of other sizes (padded embeddings) where their words are the
    tokenizer's: see `Words`.
    """

    _buffered_inputs: list[dict[str, Any]] | None
    vllm_generation: Any

    def __init__(self, model: Any, teacher_model: Any = None, *args: Any, **kwargs: Any) -> None:
        # TRL refuses a teacher of another vocab_size, and so does not see it.
        super().__init__(model, None, *args, **kwargs)
        if not isinstance(self.args, GatedDistillationConfig):
            raise TypeError(
                f"args must be a GatedDistillationConfig; got {type(self.args).__name__}"
            )
        if teacher_model is None:
            raise ValueError("teacher_model must be a model or its name; got None")
        if self.args.vllm_importance_sampling_clip_max is not None:
            if self.tools:
                raise ValueError(
                    "tools must be None with vllm_importance_sampling_clip_max: what a tool writes "
                    f"has no log-probs; got {len(self.tools)} tools"
                )
            server = self.args.vllm_mode == "server" and self.accelerator.is_main_process
            self.vllm_generation = Recording(self.vllm_generation, server)
        teacher = _loaded(teacher_model, self.args)
        self._words: Words = shared_words(
            self.model, teacher, self._tokenizer, lambda: tokenizer_of(teacher, self.args)
        )
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher, self.accelerator)
        else:
            self.teacher_model = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.gate = self.args.drift_gate()
        self._normalizer: GateNormalizer | None = None
        # DeepSpeed keeps the gradients to itself: there each micro-batch has its own unit mean.
        if self.gate is not None and not self.is_deepspeed_enabled:
            self._normalizer = GateNormalizer(self.gate)
        several = self.accelerator.num_processes > 1
        self._parallel = Parallel(torch.distributed.group.WORLD if several else None)
        self._step_loss = torch.zeros((), device=self.accelerator.device)
        self._newline_ids: list[int] | None = None
        if self.args.gate_granularity == "span":
            self._newline_ids = newline_token_ids(self._tokenizer)
        self._loss_metrics: dict[str, Tensor] = {}
        self._has_warned = False

    def _repeats(self) -> dict[str, int]:
        """How the prompts of a buffer, all ranks', are repeated: once for each micro-batch."""
        args = self.args
        rows = args.per_device_train_batch_size * args.steps_per_generation
        return {
            "mini_repeat_count": 1,
            "batch_size": rows * self.accelerator.num_processes,
            "repeat_count": args.steps_per_generation * args.num_iterations,
        }

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        dataset = self.train_dataset if dataset is None else dataset
        return RepeatSampler(
            dataset, shuffle=self.shuffle_dataset, seed=self.args.seed, **self._repeats()
        )

    def get_train_dataloader(self) -> Any:
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            if self.shuffle_dataset:
                dataset = dataset.shuffle(seed=self.args.seed)
            dataset = repeat_iterable_dataset(dataset, **self._repeats())
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """A micro-batch of the buffer, which is filled and scored when it has served."""
        if not self.model.training:
            return self._score(self._rollouts(generation_batch))
        steps = self.args.steps_per_generation
        if self._step % (steps * self.args.num_iterations) == 0 or self._buffered_inputs is None:
            rollouts = self._rollouts(generation_batch)
            rollouts = shuffle_sequence_dict(split_pixel_values_by_grid(rollouts))
            parts = split_tensor_dict(rollouts, steps)
            self._buffered_inputs = [
                self._score(unsplit_pixel_values_by_grid(part)) for part in parts
            ]
            self._count_items(self._buffered_inputs)
        return self._buffered_inputs[self._step % steps]

    def _rollouts(self, generation_batch: Any) -> dict[str, Any]:
        """TRL's; words of the student's that the teacher has not are not trained on."""
        made: dict[str, Any] = self._generate_and_score_completions(generation_batch)
        if self._words.student > self._words.shared:
            made["known_mask"] = (made["completion_ids"] < self._words.shared).long()
        if self.args.vllm_importance_sampling_clip_max is not None:
            made["sampled_log_probs"] = self.vllm_generation.padded(made["completion_ids"])
        return made

    def _count_items(self, parts: list[dict[str, Any]]) -> None:
        """Set `num_items_in_batch` to the trained tokens of the optimiser step, over all ranks."""
        steps = self.args.gradient_accumulation_steps
        counts = torch.stack([_loss_mask(part).sum() for part in parts]).view(-1, steps).sum(1)
        totals = self.accelerator.gather(counts[None]).view(-1, len(counts)).sum(0)
        for i, part in enumerate(parts):
            part["num_items_in_batch"] = totals[i // steps]

    @torch.no_grad()
    def _score(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Add what the loss needs and the optimiser's steps must not change."""
        training = self.model.training
        self.model.eval()  # dropout would count as drift
        self.teacher_model.eval()
        with self.compute_loss_context_manager():
            scores = {
                "old_log_probs": self._redirected(self.model_wrapped, self._log_probs, inputs),
                **self._redirected(self.teacher_model, self._teacher_scores, inputs),
            }
        self.model.train(training)
        if "sampled_log_probs" in inputs:
            scores["row_weights"] = importance_weights(
                scores["old_log_probs"],
                inputs["sampled_log_probs"],
                self.args.vllm_importance_sampling_clip_max,
            )
        if self._newline_ids is not None:
            scores["span_ids"] = newline_spans(
                inputs["completion_ids"], self._newline_ids, response_mask=_loss_mask(inputs)
            )
        return inputs | scores

    def _redirected(self, model: Any, method: Any, inputs: dict[str, Any]) -> Any:
        """Call method(model, inputs) inside the forward of whatever wraps the model's shards."""
        unwrapped = self.accelerator.unwrap_model(model)
        return self._forward_redirection(model, unwrapped, method, unwrapped, inputs)

    def _hidden_states(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """[B, T, H]: row t predicts completion token t."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1)
            for name in ("ids", "mask")
        )
        if "known_mask" in inputs:  # the teacher has no embedding of the student's other words
            ids = ids.clamp(max=model.config.get_text_config().vocab_size - 1)
        extras = {name: inputs[name] for name in FORWARD_EXTRAS if name in inputs}
        length = inputs["completion_ids"].size(1)
        hidden = self._get_last_hidden_state(model, ids, mask, length, **extras)
        return hidden.to(model.get_output_embeddings().weight.device)

    def _head(self, model: Any, dtype: torch.dtype) -> Head:
        """The LM head of a model whose hidden states have this dtype."""
        wanted = self.args.logits_dtype
        return replace(
            head_of(model, dtype), logits_dtype=None if wanted is None else LOGITS_DTYPES[wanted]
        )

    def _log_probs(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Log-probs [B, T] of the completion's tokens; 0 where the loss is masked."""
        hidden = self._hidden_states(model, inputs)
        labels = inputs["completion_ids"].masked_fill(_loss_mask(inputs) == 0, -100)
        labels = labels.to(hidden.device)
        head = self._head(model, hidden.dtype)
        if self.args.loss == "full" and self._words.differ:  # as the loss will see them
            bias = None if head.bias is None else head.bias[: self._words.shared]
            head = replace(head, weight=head.weight[: self._words.shared], bias=bias)
        log_probs, _ = linear_token_log_probs(hidden, head, labels, temperature=self.temperature)
        return log_probs

    def _teacher_scores(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The teacher's part of the loss."""
        if self.args.loss == "sampled":
            return {"teacher_log_probs": self._log_probs(model, inputs)}
        hidden = self._hidden_states(model, inputs)
        if self.args.loss == "full":
            return {"teacher_hidden_states": hidden}
        head = self._head(model, hidden.dtype)
        mask = _loss_mask(inputs).to(hidden.device)
        ids, log_probs = linear_top_k_log_probs(
            hidden, head, self.args.teacher_top_k, temperature=self.temperature, response_mask=mask
        )
        return {"teacher_topk_ids": ids, "teacher_topk_log_probs": log_probs}

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, sum of entropies and count of tokens, as TRL's `compute_loss` wants them."""
        hidden = self._hidden_states(unwrapped_student, inputs)
        mask = _loss_mask(inputs).to(hidden.device)
        output = self._loss(unwrapped_student, hidden, mask, inputs, num_items_in_batch)
        assert output.entropy is not None
        self._loss_metrics = output.metrics
        if self.args.gate_sample_every == 1:
            return output.loss, output.entropy.sum(), mask.sum()
        # The entropy may be known where the drift is measured alone: its mean stands for all.
        return output.loss, output.metrics["entropy"] * mask.sum(), mask.sum()

    def _loss(
        self, model: Any, hidden: Tensor, mask: Tensor, inputs: dict[str, Any], num_items: Any
    ) -> LossOutput:
        args, device, spans = self.args, hidden.device, inputs.get("span_ids")
        options: dict[str, Any] = {
            "hidden_states": hidden,
            "head": self._head(model, hidden.dtype),
            "labels": inputs["completion_ids"].to(device),
            "old_log_probs": inputs["old_log_probs"],
            "gate": self._normalizer if self.model.training and self._normalizer else self.gate,
            "parallel": self._parallel,
            "row_weights": inputs.get("row_weights"),
            "response_mask": mask,
            "span_ids": None if spans is None else spans.to(device),
            "temperature": self.temperature,
            # TRL has divided it by the number of processes, whose gradients are averaged.
            "reduction": Reduction(batch_num_tokens=num_items),
            "return_entropy": True,
        }
        options |= {name: x.to(device) for name, x in inputs.items() if name.startswith("teacher_")}
        if args.loss == "sampled":
            return linear_opd_loss(
                **options, estimator=args.estimator, clip=args.clip(), advantage=args.advantage
            )
        # "jsd" is at 0 and 1 the KLs, as TRL has them.
        options |= {"direction": args.direction, "beta": args.beta}
        if args.loss == "topk":
            unknown = self._words.teacher > self._words.student
            return linear_topk_loss(**options, support=args.support, ignore_unknown_ids=unknown)
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        head = self._head(teacher, options["teacher_hidden_states"].dtype)
        shared = self._words.shared if self._words.differ else None
        return linear_full_loss(**options, teacher_head=head, vocab_size=shared)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """TRL's; after the last micro-batch the gates get the unit mean of the optimiser's step."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self._normalizer is None:
            return loss
        self._step_loss = self._step_loss + loss
        if self._step % self.current_gradient_accumulation_steps == 0:
            whole = self._normalizer.scale_gradients(model.parameters())
            loss = loss + whole - self._step_loss  # the micro-batches' losses, summed, are its
            self._step_loss = torch.zeros_like(self._step_loss)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's, which logs the entropy; and the package's metrics beside it."""
        mode = "train" if self.model.training else "eval"
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        metrics = {k: v for k, v in self._loss_metrics.items() if k != "entropy"}
        values = torch.stack([*metrics.values(), _loss_mask(inputs).sum().to(loss.device)])
        gathered = self.accelerator.gather(values.double()[None])  # [ranks, metrics + 1]
        tokens = gathered[:, -1:]
        mean = (gathered * tokens).sum(0) / tokens.sum().clamp(min=1)
        for i, name in enumerate(metrics):
            extreme = {"gate_min": torch.min, "gate_max": torch.max}.get(name)
            value = mean[i] if extreme is None else extreme(gathered[:, i])
            self._metrics[mode][f"drift_gate/{name}"].append(value.item())
        self._say_what_is_rounding(mode)
        return loss

    def _say_what_is_rounding(self, mode: str) -> None:
        """Once, in the log: that the gate reads the rounding of its logits."""
        found = self._metrics[mode]
        drift, noise = (found.get(f"drift_gate/drift_{x}", [0.0])[-1] for x in ("abs", "noise"))
        if self._has_warned or not is_mostly_rounding(drift, noise):
            return
        self._has_warned = True
        if self.accelerator.is_main_process:
            LOG.warning(
                "drift_gate: over half of the drift is rounding. Old and current log-probs are "
                "%.4g nats apart, of which rounding of the logits alone would show %.4g: the gate "
                'reads its own rounding. logits_dtype="float32" keeps it out.',
                drift,
                noise,
            )


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """[B, T]: the tokens that the model wrote, not its tools, and of which the teacher knows."""
    mask: Tensor = inputs["completion_mask"]
    for name in ("tool_mask", "known_mask"):
        if name in inputs:
            mask = mask * inputs[name]
    return mask


def _loaded(teacher: Any, args: DistillationConfig) -> Any:
    """The teacher, a model or a name, as TRL loads it."""
    if not isinstance(teacher, str):
        if args.teacher_model_init_kwargs is not None:
            raise ValueError(
                "teacher_model_init_kwargs must be None where teacher_model is a model; got "
                f"{args.teacher_model_init_kwargs}"
            )
        return teacher
    options = dict(args.teacher_model_init_kwargs or {})
    options.setdefault("dtype", None)
    if args.teacher_model_revision is not None:
        options.setdefault("revision", args.teacher_model_revision)
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    options.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(teacher, **options)
