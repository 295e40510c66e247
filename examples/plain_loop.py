"""On-policy distillation in a plain PyTorch loop.

python examples/plain_loop.py STUDENT TEACHER < prompts.txt
"""

import sys

import torch
from rollouts import hidden_states, sample, score
from transformers import AutoModelForCausalLM, AutoTokenizer

from drift_gate import DriftGate, GateNormalizer, Reduction, linear_opd_loss
from drift_gate.integrations.teacher import head_of

GATE = DriftGate(granularity="block", block_size=64)


def train_on(student, optimizer, rollouts, teacher, *, epochs=2, micro_batches=2, gate=GATE):
    """An optimiser step an epoch over one batch of rollouts; the last micro-batch's metrics."""
    ids, attention_mask, response_mask = rollouts
    old, theirs = (score(model, ids, attention_mask) for model in (student, teacher))
    rows = ids, attention_mask, response_mask, old, theirs
    tokens = response_mask[:, 1:].sum()  # of the optimiser's step, which micro-batches share
    normalizer = GateNormalizer(gate)
    for _ in range(epochs):
        for part in zip(*(x.chunk(micro_batches) for x in rows), strict=True):
            ids, attention_mask, response_mask, old, theirs = part
            hidden = hidden_states(student, ids, attention_mask)
            result = linear_opd_loss(
                hidden,
                head_of(student, hidden.dtype),
                ids[:, 1:],
                old,
                theirs,
                response_mask=response_mask[:, 1:],
                gate=normalizer,  # one unit mean for the micro-batches
                reduction=Reduction(batch_num_tokens=tokens),
            )
            result.loss.backward()
        normalizer.scale_gradients(student.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.item() for name, value in result.metrics.items()}


def main(student_name: str, teacher_name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_name)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name).to(
            "cuda" if torch.cuda.is_available() else "cpu"
        )
        for name in (student_name, teacher_name)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-6)
    prompts = sys.stdin.read().splitlines()
    for step in range(0, len(prompts), 8):
        rollouts = sample(student, tokenizer, prompts[step : step + 8], max_new_tokens=512)
        print(step, train_on(student, optimizer, rollouts, teacher))


if __name__ == "__main__":
    main(*sys.argv[1:])
