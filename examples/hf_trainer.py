"""On-policy distillation with `transformers.Trainer`: its epochs reuse one batch of rollouts.

python examples/hf_trainer.py STUDENT TEACHER < prompts.txt
"""

import sys

import torch
from rollouts import sample, score
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from drift_gate import DriftGate, Reduction, opd_loss


class GatedTrainer(Trainer):
    gate: DriftGate | None = DriftGate(granularity="block", block_size=64)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # count tokens; do not divide the loss once more

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, old, teacher = (
            inputs.pop(name)[:, 1:] for name in ("labels", "old_log_probs", "teacher_log_probs")
        )
        outputs = model(**inputs)
        # Where tokens are counted over all ranks, whose gradients are averaged, this undoes it.
        counted = num_items_in_batch is not None and self.args.average_tokens_across_devices
        result = opd_loss(
            outputs.logits[:, :-1],
            labels,
            old,
            teacher,
            gate=self.gate,
            reduction=Reduction(
                batch_num_tokens=num_items_in_batch,  # of the accumulated batch
                dp_size=self.accelerator.num_processes if counted else 1,
            ),
            inplace_backward=not return_outputs,
        )
        return (result.loss, outputs) if return_outputs else result.loss


def dataset(student, teacher, rollouts) -> list[dict[str, torch.Tensor]]:
    """A row for each rollout: labels are -100 outside the response, log-probs aligned with ids."""
    ids, attention_mask, response_mask = rollouts
    columns = {
        "input_ids": ids,
        "attention_mask": attention_mask,
        "labels": ids.masked_fill(response_mask == 0, -100),
    }
    for name, model in (("old_log_probs", student), ("teacher_log_probs", teacher)):
        columns[name] = torch.nn.functional.pad(score(model, ids, attention_mask), (1, 0))
    return [{name: x[i].cpu() for name, x in columns.items()} for i in range(len(ids))]


def main(student_name: str, teacher_name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_name)
    student, teacher = map(AutoModelForCausalLM.from_pretrained, (student_name, teacher_name))
    args = TrainingArguments(
        num_train_epochs=2,  # over each batch of rollouts
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
        save_strategy="no",
    )
    student, teacher = student.to(args.device), teacher.to(args.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-6)
    prompts = sys.stdin.read().splitlines()
    for step in range(0, len(prompts), 8):
        rollouts = sample(student, tokenizer, prompts[step : step + 8], max_new_tokens=512)
        rows = dataset(student, teacher, rollouts)
        GatedTrainer(student, args, train_dataset=rows, optimizers=(optimizer, None)).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
