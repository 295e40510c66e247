"""Tiny models of transformers and a tokenizer, made on the spot: nothing is fetched."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

WORDS = ["<pad>", "</s>", "<unk>", "\n", *(f"w{i}" for i in range(60))]
NEWLINE = WORDS.index("\n")
EOS = WORDS.index("</s>")


def tokenizer() -> PreTrainedTokenizerFast:
    ids = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def model(seed: int, hidden: int = 16, words: int = len(WORDS)) -> Qwen2ForCausalLM:
    """Logits spread over a nat or two, so that no distribution is flat. words: those beyond the
    tokenizer's are padding."""
    config = Qwen2Config(
        vocab_size=words, hidden_size=hidden, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=False, eos_token_id=EOS, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    made = Qwen2ForCausalLM(config)
    with torch.no_grad():
        made.lm_head.weight.normal_(std=0.4)
    return made
