"""`swift rlhf --rlhf_type gkd` of tiny random models, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ["USE_HF"] = "1"  # nothing is fetched, and tiny keeps this hub offline

from support import tiny  # isort: skip  (before transformers)
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

SETTINGS = {
    "rlhf_type": "gkd", "model_type": "qwen2", "teacher_model_type": "qwen2", "template": "default",
    "tuner_type": "full", "torch_dtype": "float32", "bf16": "false", "lmbda": 1, "max_steps": 4,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "steps_per_generation": 2,
    "learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant", "warmup_ratio": 0,
    "max_completion_length": 6, "max_length": 512, "logging_steps": 1, "eval_strategy": "no",
    "save_strategy": "no", "split_dataset_ratio": 0, "report_to": "none", "use_vllm": "false",
    "dataloader_num_workers": 0,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Models and prompts on the disk. The tokenizer's words are letters."""
    words = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {word: i for i, word in enumerate(words)}
    special = dict(unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    tokenizer = Qwen2Tokenizer(vocab=ids, merges=[], **special)
    for name, seed in (("student", 1), ("teacher", 2)):
        model = tiny.model(seed, words=len(tokenizer))
        model.config.max_position_embeddings = 1024
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"messages": [{"role": "user", "content": "a" * i}, {"role": "assistant", "content": "b"}]}
        for i in range(1, 9)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, **changes: Any) -> list[dict[str, float]]:
    """What each optimiser step logs."""
    from swift.pipelines import rlhf_main

    options = SETTINGS | changes
    options |= {"model": folder / "student", "teacher_model": folder / "teacher"}
    options |= {"dataset": folder / "prompts.jsonl", "output_dir": folder / "out"}
    done = rlhf_main([part for name, x in options.items() for part in (f"--{name}", str(x))])
    return [log for log in done["log_history"] if "loss" in log]
