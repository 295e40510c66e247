"""Training options of `drift_gate.integrations.trl`, inside TRL's own `train()`, on the CPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="needs trl: pip install 'drift-gate[trl]'")

from support import tiny  # isort: skip  (before trl: it keeps the hub offline)
from support.trainer_memory import WORDS, step_peaks
from support.trl_runs import COMPLETIONS, FixedGated, FixedPlain, assert_same, run
from trl import DistillationTrainer

from drift_gate.integrations.trl import GatedDistillationTrainer
from drift_gate.integrations.vllm_samples import Recording


def test_mixed_is_beta_of_forward_and_the_rest_of_reverse(tmp_path):
    """The divergence of NeMo-RL, of one step: TRL's beta = 0 is forward, 1 is reverse."""
    common = dict(loss="topk", teacher_top_k=5, max_steps=1)
    _, (forward,) = run(tmp_path, beta=0.0, **common)
    _, (reverse,) = run(tmp_path, beta=1.0, **common)
    _, (mixed,) = run(tmp_path, beta=0.3, direction="mixed", **common)
    assert_same({n: 0.3 * forward[n] + 0.7 * reverse[n] for n in forward}, mixed)


def test_a_current_advantage_differs_once_the_policy_has_moved(tmp_path):
    """In the first step the old policy is the current one."""
    _, old = run(tmp_path, max_steps=2, estimator="importance")
    _, current = run(tmp_path, max_steps=2, estimator="importance", advantage="current")
    assert_same(old[0], current[0])
    apart = (old[1]["lm_head.weight"] - current[1]["lm_head.weight"]).abs().max()
    assert apart > 1e-3 * old[1]["lm_head.weight"].abs().max()


# vLLM is not installed: what stands for its engine answers as TRL's wrapper of it does.


class Sampled:
    """TRL's `VLLMGeneration`: the rollouts of this file, and log-probs of another policy."""

    logprobs = None  # TRL's trainer asks for none
    lowered = 0.0

    def __init__(self, **options):
        self.options = options

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler=None):
        completions = [COMPLETIONS[int(tiny.WORDS[ids[0]][1:])] for ids in prompts]
        assert num_generations == 1
        log_probs = [[[self.log_prob(word)] for word in ids] for ids in completions]
        return prompts, completions, None if self.logprobs is None else log_probs, None

    def log_prob(self, word):
        """None for the word 12, as TRL hands on a NaN."""
        return None if word == 12 and not self.lowered else -2.0 - 0.5 * (word % 5) - self.lowered


@pytest.fixture
def vllm(monkeypatch):
    module = sys.modules["trl.trainer.distillation_trainer"]
    monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(module, "VLLMGeneration", Sampled)
    shape = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, teacher_top_k=5)
    return shape | dict(trainer=GatedDistillationTrainer, use_vllm=True, vllm_mode="colocate")


def test_importance_weights_of_vllm(tmp_path, vllm):
    """Ratios of the old policy and of what was sampled from, bounded; in two micro-batches."""
    trainer, _ = run(tmp_path, **vllm, vllm_importance_sampling_clip_max=1.1)
    found = []
    for part in trainer._buffered_inputs:
        ids, mask = part["completion_ids"], part["completion_mask"].bool()
        ratio = (part["old_log_probs"] + 2.0 + 0.5 * (ids % 5)).exp().clamp(max=1.1)
        wanted = torch.where(ids == 12, 0, ratio)[mask]
        torch.testing.assert_close(part["row_weights"][mask], wanted)
        found.append(wanted)
    weights = torch.cat(found)
    assert (weights == 0).sum() == 1 and (weights == 1.1).any() and (weights < 1.0).sum() > 3


@pytest.mark.parametrize("loss", ["sampled", "topk", "full"])
def test_importance_weights_weigh_the_loss(tmp_path, vllm, monkeypatch, loss):
    """Where all ratios are above the bound, all gradients are that many times the unweighted."""
    _, plain = run(tmp_path, **vllm, loss=loss)
    monkeypatch.setattr(Sampled, "lowered", 50.0)
    _, steps = run(tmp_path, **vllm, loss=loss, vllm_importance_sampling_clip_max=0.5)
    assert_same({name: 0.5 * x for name, x in plain[0].items()}, steps[0])


def test_a_server_s_raw_log_probs_and_tools_are_refused(tmp_path, vllm, monkeypatch):
    modes = {"logprobs_mode": "raw_logprobs"}
    client = SimpleNamespace(get_server_info=lambda: {"model_config": modes})
    with pytest.raises(ValueError, match="--logprobs-mode must be processed_logprobs with"):
        Recording(SimpleNamespace(vllm_client=client), True)
    modes["logprobs_mode"] = "processed_logprobs"
    Recording(SimpleNamespace(vllm_client=client), True)
    stock = DistillationTrainer.__init__

    def with_tools(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        self.tools = [len]

    monkeypatch.setattr(DistillationTrainer, "__init__", with_tools)
    with pytest.raises(ValueError, match="tools must be None with .* no log-probs; got 1 tools"):
        run(tmp_path, **vllm, vllm_importance_sampling_clip_max=2.0)


@pytest.mark.slow
def test_peak_memory_beside_trl_s_own(tmp_path):
    """The loss alone, from hidden states [8, 128, 16] and heads [V, 16]; TRL's has chunks, too."""
    ids = torch.randint(4, 64, (8, 128), generator=torch.Generator().manual_seed(0))
    inputs = {
        "prompt_ids": ids[:, :2], "prompt_mask": torch.ones_like(ids[:, :2]),
        "completion_ids": ids, "completion_mask": torch.ones_like(ids),
    }  # fmt: skip

    def step(kind, **options):
        models = {"student": tiny.model(1, words=WORDS), "teacher": tiny.model(2, words=WORDS)}
        trainer, _ = run(tmp_path, kind, **models, **options)
        scored = trainer._score(dict(inputs)) if kind is FixedGated else inputs

        def loss(unused):
            return trainer._compute_loss(trainer.model, scored, ids.numel())[0]

        return loss

    steps = {"own": step(FixedPlain)}
    for kind in ("sampled", "topk", "full"):
        steps[kind] = step(FixedGated, loss=kind, teacher_top_k=64)
    peaks = step_peaks("TRL", steps)
    assert max(peaks[x] for x in ("sampled", "topk", "full")) < peaks["own"]
