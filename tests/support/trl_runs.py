"""TRL's own `train()` of tiny random models, with rollouts from a list."""

from __future__ import annotations

from support import tiny  # isort: skip  (before trl: it keeps the hub offline)
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from drift_gate.integrations.trl import GatedDistillationConfig, GatedDistillationTrainer

# Completions of unequal lengths, so that micro-batches of two hold 12 and 9 tokens in every order
# but one; with a newline, so that spans differ from blocks.
PROMPTS = [f"w{i} w{i + 20}" for i in range(4)]
COMPLETIONS = [
    [5, 6, 7, tiny.EOS],
    [9, tiny.NEWLINE, 11, 12, 13, 14, 15, 16],
    [21, 22, tiny.EOS],
    [31, 32, 33, tiny.NEWLINE, 35, 36],
]


class Fixed:
    """Rollouts from a list in place of the sampler; all else is TRL's. Counts the calls."""

    generated = 0

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        self.generated += 1
        words = [tiny.WORDS[ids[0]] for ids in prompt_ids]
        return [COMPLETIONS[int(word[1:])] for word in words]


class FixedGated(Fixed, GatedDistillationTrainer):
    pass


class FixedPlain(Fixed, DistillationTrainer):
    pass


class Gradients(TrainerCallback):
    """The gradients that every optimiser step gets, in float64."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.double().clone() for n, p in model.named_parameters()})


def settings(folder, config=GatedDistillationConfig, **changes):
    options = dict(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=1, learning_rate=0.05,
        optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        max_completion_length=8, disable_tqdm=True,
    )  # fmt: skip
    return config(**options | changes)


def run(
    folder, trainer=FixedGated, teacher_width=16, dataset=None, student=None, teacher=None, **more
):
    """Train; returns the trainer and the gradients of its steps."""
    gated = issubclass(trainer, GatedDistillationTrainer)
    config = GatedDistillationConfig if gated else DistillationConfig
    seen = Gradients()
    made = trainer(
        model=student or tiny.model(1), teacher_model=teacher or tiny.model(2, teacher_width),
        args=settings(folder, config, **more), processing_class=tiny.tokenizer(),
        train_dataset=dataset or Dataset.from_dict({"prompt": PROMPTS}), callbacks=[seen],
    )  # fmt: skip
    made.train()
    return made, seen.steps


def metric(trainer, name):
    return [log[name] for log in trainer.state.log_history if name in log]


def assert_same(gradients, others):
    """Equal to float32's rounding of sums over a batch of some twenty tokens."""
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        assert scale > 0
        assert (gradient - others[name]).abs().max() <= 2e-5 * scale, name
