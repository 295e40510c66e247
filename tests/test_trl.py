"""`drift_gate.integrations.trl` inside TRL's own `train()`, with tiny random models on the CPU."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install 'drift-gate[trl]'")

from support import tiny  # isort: skip  (before trl: it keeps the hub offline)
from datasets import Dataset, IterableDataset
from support import trl_runs
from support.trl_runs import (
    COMPLETIONS,
    PROMPTS,
    FixedGated,
    FixedPlain,
    assert_same,
    metric,
    run,
    settings,
)
from transformers import HfArgumentParser
from trl import DistillationConfig, DistillationTrainer

from drift_gate.integrations.trl import GatedDistillationConfig, GatedDistillationTrainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_trains_on_its_own_rollouts(tmp_path, loss):
    """TRL's sampler too: nothing is replaced."""
    trainer, steps = run(
        tmp_path, GatedDistillationTrainer, teacher_width=24, loss=loss, teacher_top_k=5,
        gate_granularity="span", max_steps=4,
    )  # fmt: skip
    assert len(steps) == 4
    assert all(step["lm_head.weight"].abs().max() > 0 for step in steps)
    drift = metric(trainer, "drift_gate/drift_abs")
    # Two epochs over each of two buffers: the second epoch's model has moved from its old self.
    assert max(drift[0], drift[2]) < 1e-5 < 1e-3 < min(drift[1], drift[3])
    assert len(metric(trainer, "entropy")) == 4
    assert len(metric(trainer, "completions/mean_length")) == 2  # TRL's own, once a buffer
    names = {"gate_mean_raw", "gate_min", "gate_max", "gate_ess", "drift_signed", "ppo_kl"}
    names |= {"sampled": {"pg_clipfrac"}, "topk": {"student_mass", "overlap"}, "full": set()}[loss]
    assert names <= {name.removeprefix("drift_gate/") for name in trainer.state.log_history[0]}


def test_a_gate_that_samples_logs_finite_numbers(tmp_path):
    options = {"loss": "topk", "teacher_top_k": 5, "gate_block_size": 4, "max_steps": 2}
    whole, _ = run(tmp_path, **options)
    trainer, steps = run(tmp_path, gate_sample_every=3, **options)
    assert trainer.gate.sample_every == 3
    assert all(step["lm_head.weight"].isfinite().all() for step in steps)
    drift = metric(trainer, "drift_gate/drift_abs")
    assert drift[0] < 1e-5 < 1e-3 < drift[1]
    # The first step's model and tokens are the same: the mean over some of them is near.
    entropies = [metric(x, "entropy")[0] for x in (whole, trainer)]
    assert entropies[0] != entropies[1] == pytest.approx(entropies[0], abs=0.2)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_buffer_serves_its_epochs_and_is_scored_once(tmp_path, streamed):
    """Buffers of two optimiser steps, two epochs: four steps a buffer, and then a fresh one."""
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    if streamed:
        rows = list(dataset)
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    scored = []

    class Watched(FixedGated):
        def _teacher_scores(self, model, inputs):
            scored.append(self._step)
            return super()._teacher_scores(model, inputs)

    trainer, steps = run(
        tmp_path, Watched, dataset=dataset, per_device_train_batch_size=2, max_steps=6,
        steps_per_generation=2,
    )  # fmt: skip
    assert len(steps) == 6 and trainer.generated == 2
    assert scored == [0, 0, 4, 4]  # each of the two micro-batches, before the first step over it
    drift = metric(trainer, "drift_gate/drift_abs")
    assert max(drift[0], drift[4]) < 1e-5 < 1e-3 < min(drift[1:4])
    gates = metric(trainer, "drift_gate/gate_min"), metric(trainer, "drift_gate/gate_max")
    assert gates[0][1] < 1 < gates[1][1]


@pytest.mark.parametrize("gate", ["block", "off"])
@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_micro_batches_give_the_gradient_of_one_batch(tmp_path, loss, gate):
    """`num_items_in_batch` counts the optimiser step's tokens, and divides nothing twice; the gates
    have the unit mean of the step."""
    common = dict(loss=loss, teacher_top_k=5, gate_granularity=gate, gate_block_size=2, max_steps=2)
    whole, expected = run(tmp_path, **common)
    for size in (1, 2):
        split, gradients = run(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size,
            **common,
        )  # fmt: skip
        for step in (0, 1):  # the second is off-policy: gates differ, and PPO's clip may bind
            assert_same(expected[step], gradients[step])
        torch.testing.assert_close(*(torch.tensor(metric(t, "loss")) for t in (whole, split)))
    if gate != "off":
        assert max(metric(whole, "drift_gate/gate_max")) > 1.05


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_ungated_full_loss_is_trl_s_own(tmp_path, beta):
    shape = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, beta=beta)
    shape |= dict(temperature=0.7, teacher_width=24)
    ours, gradients = run(tmp_path, loss="full", gate_granularity="off", **shape)
    theirs, expected = run(tmp_path, FixedPlain, **shape)
    assert_same(expected[0], gradients[0])
    for name in ("loss", "entropy"):
        torch.testing.assert_close(*(torch.tensor(metric(t, name)) for t in (ours, theirs)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_in_bfloat16_it_is_trl_s_own_with_float32_logits(tmp_path, beta):
    """Of models in bfloat16, whose losses round the logits where they are not told otherwise."""
    shape = dict(per_device_train_batch_size=2, beta=beta, teacher_width=24)

    def gradient(trainer, **more):
        models = {"student": tiny.model(1).bfloat16(), "teacher": tiny.model(2, 24).bfloat16()}
        made, steps = run(tmp_path, trainer, **shape, **models, **more)
        return steps[0]["lm_head.weight"].double(), metric(made, "loss")[0]

    gated = dict(trainer=FixedGated, loss="full", gate_granularity="off")
    expected, loss = gradient(FixedPlain)
    found = {wanted: gradient(**gated, logits_dtype=wanted) for wanted in (None, "float32")}
    apart = {k: float((x - expected).norm() / expected.norm()) for k, (x, _) in found.items()}
    assert apart["float32"] < 1e-3 < 2e-3 < apart[None]
    assert abs(found["float32"][1] - loss) < 1e-5 < 1e-4 < abs(found[None][1] - loss)


@pytest.mark.parametrize("wanted", [None, "float32"])
def test_a_drift_that_is_rounding_is_said_once(tmp_path, wanted, caplog):
    """Models in bfloat16 that move by less than lies between two logits; not while they have not
    moved at all."""
    models = {"student": tiny.model(1).bfloat16(), "teacher": tiny.model(2).bfloat16()}
    trainer, _ = run(
        tmp_path, FixedGated, **models, max_steps=4, learning_rate=1e-5, logits_dtype=wanted
    )
    noise, drift = (metric(trainer, f"drift_gate/drift_{x}") for x in ("noise", "abs"))
    said = [x.getMessage() for x in caplog.records if "is rounding" in x.getMessage()]
    if wanted is None:
        assert min(noise) > 1e-4 and drift[0] == 0 and 0 < drift[1] < 2 * noise[1]
        assert len(said) == 1 and 'logits_dtype="float32"' in said[0]
    else:
        assert max(noise) == 0 and not said


# Heads of other sizes over one tokenizer, as 151,936 and 152,064 rows of Qwen2.5.

PADDED = len(tiny.WORDS) + 6


def padded(model, words=PADDED):
    """The model with rows beyond the tokenizer's words, which are as likely as others."""
    before = len(tiny.WORDS)
    model.resize_token_embeddings(words, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[before:] = model.lm_head.weight[: words - before]
    assert model.config.vocab_size == words
    return model


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_heads_of_other_sizes(tmp_path, loss, who):
    models = {"student": tiny.model(1), "teacher": tiny.model(2, 24)}
    padded(models[who])
    trainer, steps = run(
        tmp_path, GatedDistillationTrainer, **models, loss=loss, teacher_top_k=9, max_steps=2
    )
    assert len(steps) == 2
    assert all(step["lm_head.weight"].abs().max() > 0 for step in steps)
    drift = metric(trainer, "drift_gate/drift_abs")
    assert drift[0] < 1e-5 < 1e-3 < drift[1]


@pytest.mark.parametrize("loss", ["topk", "full"])
def test_a_teacher_s_padding_is_left_out(tmp_path, loss):
    """Lists of all its words, and the whole vocabulary, give what it gives without the padding."""
    common = dict(loss=loss, max_steps=2)
    whole, expected = run(tmp_path, teacher_top_k=len(tiny.WORDS), **common)
    found, gradients = run(tmp_path, teacher=padded(tiny.model(2)), teacher_top_k=PADDED, **common)
    for step in (0, 1):
        assert_same(expected[step], gradients[step])
    torch.testing.assert_close(*(torch.tensor(metric(t, "loss")) for t in (whole, found)))


def test_a_student_s_padding_gets_no_gradient_of_the_whole_vocabulary(tmp_path):
    _, expected = run(tmp_path, loss="full", max_steps=2)
    _, gradients = run(tmp_path, loss="full", student=padded(tiny.model(1)), max_steps=2)
    for wanted, step in zip(expected, gradients, strict=True):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            step[name], rest = step[name].split([len(tiny.WORDS), PADDED - len(tiny.WORDS)])
            assert (rest == 0).all()
        assert_same(wanted, step)


def test_sampled_words_have_the_padded_teacher_s_log_probs(tmp_path):
    teacher = padded(tiny.model(2))
    trainer, _ = run(tmp_path, teacher=teacher, loss="sampled", max_steps=1)
    (part,) = trainer._buffered_inputs
    ids, mask = (
        torch.cat([part[f"prompt_{name}"], part[f"completion_{name}"]], 1)
        for name in ("ids", "mask")
    )
    length = part["completion_ids"].size(1)
    with torch.no_grad():
        logits = teacher(ids, attention_mask=mask).logits[:, -length - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, part["completion_ids"][..., None])[..., 0]
    torch.testing.assert_close(part["teacher_log_probs"], wanted * part["completion_mask"])


@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_a_sampled_word_that_the_teacher_has_not_is_not_trained_on(tmp_path, monkeypatch, loss):
    completions = [COMPLETIONS[0], [9, PADDED - 1, 11, tiny.EOS], *COMPLETIONS[2:]]
    monkeypatch.setattr(trl_runs, "COMPLETIONS", completions)
    trainer, steps = run(
        tmp_path, student=padded(tiny.model(1)), loss=loss, teacher_top_k=5, max_steps=2
    )
    (part,) = trainer._buffered_inputs
    unknown = part["completion_ids"] >= len(tiny.WORDS)
    assert unknown.sum() == 1 and (part["old_log_probs"][unknown] == 0).all()
    trained = sum(map(len, completions)) - 1
    assert part["num_items_in_batch"] == trained
    for step in steps:
        assert all(x.isfinite().all() for x in step.values())
        assert step["lm_head.weight"].abs().max() > 0


def test_other_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer's 64 words; got vocab_size 64 and 60"):
        run(tmp_path / "fewer", teacher=tiny.model(2, words=60))
    folder = str(tmp_path / "teacher")
    teacher, tokenizer = padded(tiny.model(2)), tiny.tokenizer()
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run(tmp_path / "same", teacher=folder)
    vocabulary = Path(folder, "tokenizer.json")
    text = vocabulary.read_text()
    for one, other in (("w7", "?"), ("w8", "w7"), ("?", "w8")):
        text = text.replace(f'"{one}"', f'"{other}"')
    vocabulary.write_text(text)
    with pytest.raises(ValueError, match="must have the student's tokenizer .* got the id"):
        run(tmp_path / "other", teacher=folder)


def test_evaluation_scores_what_it_samples(tmp_path):
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    trainer = FixedGated(
        model=tiny.model(1), teacher_model=tiny.model(2), processing_class=tiny.tokenizer(),
        args=settings(tmp_path, loss="full", beta=1.0), train_dataset=prompts, eval_dataset=prompts,
    )  # fmt: skip
    found = trainer.evaluate()
    same = FixedGated(
        model=tiny.model(1), teacher_model=tiny.model(1), processing_class=tiny.tokenizer(),
        args=settings(tmp_path, loss="full", beta=1.0), train_dataset=prompts, eval_dataset=prompts,
    )  # fmt: skip
    assert found["eval_loss"] > 0.01 > 1e-6 > abs(same.evaluate()["eval_loss"])
    assert found["eval_drift_gate/drift_abs"] < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss": "hidden"}, "loss must be one of sampled, topk, full; got 'hidden'"),
        ({"estimator": "k4"}, "estimator must be one of"),
        ({"num_iterations": 0}, "num_iterations must be"),
        ({"loss": "topk", "teacher_top_k": 1}, "teacher_top_k must be at least 2"),
        ({"loss": "topk", "support": "all"}, "support must be one of"),
        ({"gate_granularity": "page"}, "granularity must be one of"),
        ({"gate_tau": -1.0}, "tau must be finite"),
        ({"advantage": "new"}, "advantage must be one of old, current; got 'new'"),
        ({"direction": "both", "loss": "topk"}, "direction must be one of jsd, mixed; got 'both'"),
        ({"direction": "mixed"}, 'direction "mixed" needs loss "topk"; got loss \'sampled\''),
        ({"vllm_importance_sampling_clip_max": 2.0}, "use_vllm must be True with vllm_importance"),
        (
            {"vllm_importance_sampling_clip_max": 0.0, "use_vllm": True},
            "vllm_importance_sampling_clip_max must be finite and greater than 0",
        ),
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 3},
            "steps_per_generation must be a multiple of gradient_accumulation_steps, 2; got 3",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_options_from_a_command_line(tmp_path):
    line = f"--output_dir {tmp_path} --loss topk --gate_tau 0.5 --gate_granularity off --use_cpu 1"
    (parsed,) = HfArgumentParser(GatedDistillationConfig).parse_args_into_dataclasses(line.split())
    assert (parsed.loss, parsed.gate_tau, parsed.drift_gate()) == ("topk", 0.5, None)


def test_arguments_that_do_not_fit(tmp_path):
    common = dict(model=tiny.model(1), processing_class=tiny.tokenizer())
    prompts = Dataset.from_dict({"prompt": PROMPTS})
    with pytest.raises(ValueError, match="teacher_model must be a model"):
        FixedGated(args=settings(tmp_path), train_dataset=prompts, **common)
    plain = settings(tmp_path, DistillationConfig)
    with pytest.raises(TypeError, match="args must be a GatedDistillationConfig; got Distillation"):
        FixedGated(args=plain, teacher_model=tiny.model(2), train_dataset=prompts, **common)


@pytest.mark.parametrize("missing", ["the package", "a module", "a method", "the version"])
def test_a_missing_or_other_trl_is_named(monkeypatch, missing):
    for name in ("trl", "trl_config"):
        monkeypatch.delitem(sys.modules, f"drift_gate.integrations.{name}")
    if missing == "a method":
        monkeypatch.delattr(DistillationTrainer, "_get_last_hidden_state")
    elif missing == "the version":
        monkeypatch.setattr("trl.__version__", "1.17.0")
    else:
        name = {"the package": "trl", "a module": "trl.trainer.utils"}[missing]
        monkeypatch.setitem(sys.modules, name, None)
    wanted = r"drift_gate.integrations.trl needs trl 1.16: pip install 'trl==1.16.\*'; got .+"
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module("drift_gate.integrations.trl")


def test_transformers_does_not_take_our_kernels_for_its_own():
    """From the root of a checkout, where kernels/ lies on sys.path."""
    code = "from transformers.utils.import_utils import is_kernels_available as k; print(k())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
