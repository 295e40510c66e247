"""The shipped Qwen3 models and their tokenizer, and local models in their place."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from drift_gate import Head

logging.disable_progress_bar()  # of transformers; runs have bars of their own
logging.set_verbosity_error()

WEIGHTS = Path(__file__).with_name("weights")  # student/ and teacher/; pretrain.py makes them
SIZES = {
    "teacher": dict(hidden_size=96, num_hidden_layers=3, intermediate_size=256),
    "student": dict(hidden_size=64, num_hidden_layers=2, intermediate_size=160),
}
CHARACTERS = sorted({*string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"})
GROUP = 8  # responses of about a length that a CPU runs at once
PAD, END, UNKNOWN = "<pad>", "<end>", "<unknown>"


class BadModel(ValueError):
    """A model or a pair of models that cannot be used; the message says which and why."""


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token a printable ASCII character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [PAD, END, UNKNOWN, *CHARACTERS]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def small_model(name: str) -> Qwen3ForCausalLM:
    """An untrained "teacher" or "student" for the character tokenizer, from torch's seed."""
    tokenizer = character_tokenizer()
    config = Qwen3Config(
        **SIZES[name], vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2,
        head_dim=SIZES[name]["hidden_size"] // 4, max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def hidden_states(model: PreTrainedModel, tokens: Tensor, mask: Tensor, last: int) -> Tensor:
    """What the head takes, [B, last, H], for the last positions but one of tokens [B, T].

    Row t of the result predicts token T - last + t; where that token is padding it is 0. mask
    [B, T] is False on padding, left or right. A CPU runs responses of a length together and
    leaves out the padding that they share: of responses as students write them, half of it all.
    """
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    order = mask.sum(-1).argsort(stable=True)
    parts = []
    for rows in order.split(GROUP if tokens.device.type == "cpu" else len(tokens)):
        first, end = _columns(mask[rows], last)
        output = model.base_model(
            input_ids=tokens[rows, first:end], attention_mask=mask[rows, first:end],
            position_ids=positions[rows, first:end], use_cache=False,
        )  # fmt: skip
        hidden = output.last_hidden_state[:, tokens.shape[1] - last - 1 - first :]
        parts.append(F.pad(hidden, (0, 0, 0, last - hidden.shape[1])))
    return torch.cat(parts)[order.argsort()]


def _columns(mask: Tensor, last: int) -> tuple[int, int]:
    """First and end of the columns that predict a token of any row, or come before one."""
    used = mask.any(0).nonzero()[:, 0].tolist() or [0]
    head = mask.shape[1] - last - 1  # the first of those asked for
    return min(used[0], head), max(used[-1], head + 1)


def head_of(model: PreTrainedModel) -> Head:
    """The model's head; what some families do to its logits is in their config."""
    layer = model.get_output_embeddings()
    return Head(
        layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        logit_scale=getattr(model.config, "logit_scale", None) or 1.0,
    )


class Pair(NamedTuple):
    """A student and its teacher, on one device."""

    student: PreTrainedModel  # float32, to be trained
    teacher: PreTrainedModel  # frozen; bfloat16 on a GPU
    tokenizer: PreTrainedTokenizerBase


def load_pair(student: Path | None, teacher: Path | None, device: torch.device) -> Pair:
    """Both models; the shipped ones where there is no path.

    Raises:
        BadModel: a path holds no causal LM, or the tokenizers differ.
    """
    tokenizer = check_pair(student, teacher)
    wide = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = [
        _load(AutoModelForCausalLM, flag, path, dtype=dtype).to(device)
        for flag, path, dtype in (
            ("student", student, torch.float32),
            ("teacher", teacher, wide),
        )
    ]
    models[1].requires_grad_(False)
    for flag, model in zip(("student", "teacher"), models, strict=True):
        _check_head(flag, model.eval())
    return Pair(*models, tokenizer)


def check_pair(student: Path | None, teacher: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer that both models share; raises BadModel as `load_pair`."""
    ours = _load(AutoTokenizer, "student", student)
    theirs = _load(AutoTokenizer, "teacher", teacher)
    words, others = ours.get_vocab(), theirs.get_vocab()
    if words != others:
        word = min(set(words.items()) ^ set(others.items()), key=lambda item: (item[1], item[0]))
        raise BadModel(
            f"--student and --teacher must share a tokenizer: theirs have {len(words)} and "
            f"{len(others)} words, and differ from word {word[1]} on ({word[0]!r})"
        )
    if ours.eos_token_id is None:
        raise BadModel(f"--student {student}: its tokenizer has no end-of-sequence token")
    if ours.pad_token_id is None:
        ours.pad_token = ours.eos_token
    return ours


def _load(factory: Any, flag: str, path: Path | None, **options: Any) -> Any:
    where = path or WEIGHTS / flag
    if not (where / "config.json").is_file():
        made = "" if path else ": python -m drift_gate.bench.distill.pretrain makes it"
        raise BadModel(f"--{flag} {where} must be a folder with a Hugging Face causal LM{made}")
    try:
        return factory.from_pretrained(where, local_files_only=True, **options)
    except Exception as error:  # what a broken folder raises depends on what is broken in it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BadModel(f"--{flag} {where} cannot be loaded: {reason[0]}") from None


@torch.no_grad()
def _check_head(flag: str, model: PreTrainedModel) -> None:
    """The losses form the logits from hidden states: that must give what the model gives."""
    tokens = torch.arange(5, device=model.device)[None]
    hidden = hidden_states(model, tokens, torch.ones_like(tokens, dtype=torch.bool), 4)
    theirs = model(input_ids=tokens[:, :-1]).logits.float()
    if not torch.allclose(logits_of(model, hidden), theirs, rtol=0.05, atol=0.05):
        raise BadModel(
            f"--{flag}: {type(model).__name__} does more to its logits than head, softcap and scale"
        )


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits [..., V] of hidden states [..., H], as the model itself makes them."""
    head = head_of(model)
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias).float()
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits * head.logit_scale


def newline_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens whose text has a newline in it."""
    return [i for i in range(len(tokenizer)) if "\n" in tokenizer.decode([i])]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: the tokenizer's, and those that the model was published with."""
    published = model.generation_config.eos_token_id if model.generation_config else None
    more = published if isinstance(published, list) else [published]
    return sorted({tokenizer.eos_token_id, *(i for i in more if i is not None)})


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The chat template with the question, or, without a template, the question and a newline."""
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        return list(ids)
    return list(tokenizer.encode(f"{question}\n"))
