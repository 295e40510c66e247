"""What the suite `train_step` trains: causal LMs of random weights, and a padded batch.

Sizes are those of Qwen3, whose heads are tied to the embeddings; weights are drawn, none fetched.
Sequences are padded on the right, where a causal model needs no attention mask, and differ in
length; prompts and padding are masked, a quarter of the positions in all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .cases import Case
from .peers.guard import load

VOCAB, K = 151_936, 64
BLOCK = 64  # rows of a gate's block
CHUNK_WORDS = 1 << 26  # logits made at once where the batch is drawn


class Size(NamedTuple):
    """A model and its batch."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    intermediate: int
    batch: int
    length: int
    vocab: int = VOCAB


SIZES = {
    "Qwen3 1.7B": Size(2048, 28, 16, 8, 128, 6144, 4, 4096),
    "Qwen3 0.6B": Size(1024, 28, 16, 8, 128, 3072, 4, 4096),
    "Qwen3 4B": Size(2560, 36, 32, 8, 128, 9728, 4, 4096),
    "Qwen3 tiny": Size(256, 2, 4, 2, 64, 768, 2, 256),
    "Qwen3 dry": Size(64, 2, 4, 2, 16, 96, 2, 128, 259),
}


def case_of(name: str) -> Case:
    """The size of a model as the other suites have theirs."""
    size = SIZES[name]
    rows = size.batch * size.length
    return Case(name, rows, size.vocab, "bfloat16", min(K, size.vocab // 8), size.hidden, "model")


@dataclasses.dataclass
class Problem:
    """A model and the rows of its batch, [B, T] each and right-padded."""

    model: Any
    tokens: Tensor
    labels: Tensor  # the next token, which a mask may make irrelevant
    mask: Tensor  # bool, the responses
    blocks: Tensor  # [B T]: number of each row's block, from its response's first
    old: Tensor  # float32
    teacher: Tensor  # float32
    ids: Tensor  # [B, T, K], the teacher's likeliest
    log_q: Tensor  # [B, T, K] float32
    held_bytes: int  # of model and batch

    @property
    def weight(self) -> Tensor:
        """Of the head, [V, H]."""
        return self.model.get_output_embeddings().weight

    def hidden_states(self) -> Tensor:
        """What the head takes, [B, T, H]."""
        return self.model.base_model(input_ids=self.tokens, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """As the model makes them, [B, T, V]."""
        return functional.linear(hidden, self.weight)


def draw(case: Case, device: torch.device) -> Problem:
    """Model and batch of a case, on the device from the start.

    Raises:
        LeftOut: transformers is not installed.
    """
    torch.manual_seed(0)
    size = SIZES[case.what]
    model = _model(size, case.torch_dtype, device)
    tokens = torch.randint(size.vocab, (size.batch, size.length), device=device)
    mask, blocks = _responses(size, device)
    rows = tokens, tokens.roll(-1, 1), mask, blocks
    problem = Problem(model, *rows, *[torch.empty(0, device=device)] * 4, held_bytes=0)
    _policies(problem, case.k)
    tensors = [value for value in vars(problem).values() if isinstance(value, Tensor)]
    tensors += [*model.parameters(), *model.buffers()]
    problem.held_bytes = sum(x.nbytes for x in tensors)
    return problem


def _model(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """In training, each layer a checkpoint."""
    make_config = load("transformers", "Qwen3Config")
    make_model = load("transformers", "AutoModelForCausalLM").from_config
    config = make_config(
        vocab_size=size.vocab, hidden_size=size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.key_value_heads,
        head_dim=size.head_dim, intermediate_size=size.intermediate, tie_word_embeddings=True,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model = make_model(config, dtype=dtype, attn_implementation="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _responses(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The mask [B, T] of the responses, and the number of each row's block [B T]."""
    prompt, pad = size.length // 8, size.length // 12
    positions = torch.arange(size.length, device=device).expand(size.batch, -1)
    sequences = torch.arange(size.batch, device=device)[:, None]
    end = size.length - 1 - sequences % 4 * pad  # the last token predicts nothing
    mask = (positions >= prompt) & (positions < end)
    blocks = (positions - prompt).clamp(min=0) // BLOCK + sequences * -(-size.length // BLOCK)
    return mask, blocks.flatten()


@torch.no_grad()
def _policies(problem: Problem, k: int) -> None:
    """Draw what the old policy and the teacher say, near to what the model says."""
    hidden, labels = problem.hidden_states().flatten(0, 1), problem.labels.flatten()
    now, ids, log_q = [], [], []
    step = max(1, CHUNK_WORDS // problem.weight.shape[0])
    for states, words in zip(hidden.split(step), labels.split(step), strict=True):
        z = problem.logits(states).float()
        now.append(z.gather(-1, words[:, None])[:, 0] - z.logsumexp(-1))
        z += torch.randn_like(z)
        scores, listed = z.topk(k)
        ids.append(listed)
        log_q.append(scores - z.logsumexp(-1, keepdim=True))
    shape = problem.labels.shape
    log_probs = torch.cat(now).view(shape)
    problem.old = log_probs + 0.3 * torch.randn_like(log_probs)
    problem.teacher = log_probs + torch.randn_like(log_probs)
    problem.ids, problem.log_q = (torch.cat(x).view(*shape, k) for x in (ids, log_q))
