"""Micro-batches as verl's engine has them, and as the public losses take them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

PROMPTS, RESPONSES = [4, 2, 3], [7, 5, 6]  # lengths: no two sequences are padded alike
WIDTH, LONGEST = max(PROMPTS), max(RESPONSES)
VOCAB, K = 53, 6
SIZES = dict(dp_size=2, batch_num_tokens=40, global_batch_size=8)  # a batch of more than this one
AGG_MODES = [
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
]  # fmt: skip


class Case(NamedTuple):
    """A micro-batch as verl's engine has it, and the same as the public losses take it."""

    data: TensorDict
    logits: torch.Tensor  # [1, nnz, V]
    labels: torch.Tensor  # [B, T]
    old: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor  # [B, T]: the row of the packed logits that predicts each label

    def response(self, packed: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] of [nnz, ...]."""
        return packed[self.rows]


def draw(*, jagged: bool = False, estimator: bool = False, drift: float = 0.5) -> Case:
    """A micro-batch whose student has drifted from its old self by so many nats."""
    generator = torch.Generator().manual_seed(7)
    batch, length, k = len(PROMPTS), WIDTH + LONGEST, 1 if estimator else K
    ids = torch.randint(1, VOCAB, (batch, length), generator=generator)
    position = torch.arange(length)
    begins = WIDTH - torch.tensor(PROMPTS)[:, None]
    ends = WIDTH + torch.tensor(RESPONSES)[:, None]
    attention = (position >= begins) & (position < ends)
    mask = attention[:, WIDTH:].clone()
    mask[0, 2] = False  # a tool's token inside a response
    teacher = torch.randn(batch, length, VOCAB, generator=generator).mul(2).log_softmax(-1)
    log_probs, words = teacher.topk(k)
    if estimator:
        words = ids.roll(-1, 1)[..., None]
        log_probs = teacher.gather(-1, words)
    data = TensorDict(
        {
            "input_ids": ids, "attention_mask": attention.long(), "response_mask": mask.long(),
            "position_ids": position.expand(batch, -1).clone(),
            "prompts": ids[:, :WIDTH].clone(), "responses": ids[:, WIDTH:].clone(),
            "teacher_logprobs": log_probs, "teacher_ids": words.int(),
            "advantages": torch.randn(batch, LONGEST, generator=generator),
        },
        batch_size=batch,
    )  # fmt: skip
    data = left_right_2_no_padding(data)
    for name, size in SIZES.items():
        tu.assign_non_tensor_data(data, name, size)
    packed = data["input_ids"].values()
    logits = torch.randn(1, len(packed), VOCAB, generator=generator).mul(2)
    rows = no_padding_2_padding(torch.arange(len(packed)), data)
    labels = data["responses"].clone()
    now = logits[0].log_softmax(-1)[rows].gather(-1, labels[..., None])[..., 0]
    old = now + drift * torch.randn(now.shape, generator=generator)
    data["old_log_probs"] = old
    if jagged:
        for name, lengths in (("prompts", PROMPTS), ("responses", RESPONSES)):
            start = begins[:, 0] if name == "prompts" else [0] * batch
            data[name] = nest(data[name], start, lengths)
        for name in ("response_mask", "old_log_probs", "advantages"):
            data[name] = nest(data[name], [0] * batch, RESPONSES)
    return Case(data, logits.requires_grad_(), labels, old, mask, rows)


def nest(x, starts, lengths):
    parts = [row[i : i + n] for row, i, n in zip(x, starts, lengths, strict=True)]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)
