"""The scripts of examples/, with tiny random models on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'drift-gate[trl]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'drift-gate[trl]'")

from support import tiny  # isort: skip  (before transformers: it keeps the hub offline)
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import hf_trainer
import plain_loop
import rollouts as rollouts_module

PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]


@pytest.fixture
def rollouts():
    """Sampled; responses then cut to unequal lengths, so that micro-batches differ in tokens."""
    torch.manual_seed(0)
    ids, attention, response = rollouts_module.sample(
        tiny.model(1), tiny.tokenizer(), PROMPTS, max_new_tokens=8
    )
    for row, cut in enumerate((1, 5, 2, 7)):
        attention[row, ids.shape[1] - cut :] = 0
        response[row, ids.shape[1] - cut :] = 0
    return ids, attention, response


def moved(student):
    """How far the weights have gone from where they began."""
    start = dict(tiny.model(1).named_parameters())
    return {name: parameter - start[name] for name, parameter in student.named_parameters()}


def assert_same(these, those):
    for name, step in these.items():
        scale = step.abs().max()
        assert scale > 0
        assert (step - those[name]).abs().max() <= 1e-4 * scale, name


def by_hand(rollouts, micro_batches, epochs=1, gate=None):
    student = tiny.model(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    metrics = plain_loop.train_on(
        student, optimizer, rollouts, tiny.model(2), epochs=epochs, micro_batches=micro_batches,
        gate=gate,
    )  # fmt: skip
    return moved(student), metrics


def by_trainer(folder, rollouts, rows, accumulate, gate=None):
    student = tiny.model(1)
    args = TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate, remove_unused_columns=False, report_to=[],
        lr_scheduler_type="constant", save_strategy="no", use_cpu=True, max_grad_norm=0.0,
        disable_tqdm=True,
    )  # fmt: skip
    data = hf_trainer.dataset(student, tiny.model(2), rollouts)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    trainer = hf_trainer.GatedTrainer(
        student, args, train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.gate = gate
    trainer.train()
    return moved(student)


def test_micro_batches_and_trainers_take_the_same_step(tmp_path, rollouts):
    """`num_items_in_batch` counts the accumulated batch: one step of four rows, however split, in
    the plain loop and in `Trainer`."""
    whole, _ = by_hand(rollouts, 1)
    assert_same(whole, by_hand(rollouts, 2)[0])
    assert_same(whole, by_trainer(tmp_path, rollouts, rows=4, accumulate=1))
    assert_same(whole, by_trainer(tmp_path, rollouts, rows=1, accumulate=4))


def test_the_second_epoch_is_gated(rollouts):
    """With the unit mean of the step: micro-batches of the plain loop take the whole batch's."""
    gate = plain_loop.DriftGate(block_size=2)
    assert_same(*(by_hand(rollouts, parts, epochs=2, gate=gate)[0] for parts in (1, 4)))
    _, first = by_hand(rollouts, 1, epochs=1, gate=plain_loop.DriftGate(block_size=2))
    _, second = by_hand(rollouts, 1, epochs=2, gate=plain_loop.DriftGate(block_size=2))
    assert first["drift_abs"] < 1e-5 < 1e-3 < second["drift_abs"]
    assert second["gate_min"] < 1 < second["gate_max"]


def test_a_step_without_a_token_changes_nothing(tmp_path, rollouts):
    """Each response was cut away: no parameter becomes NaN, of AdamW with clipped norms neither."""
    ids, attention, response = rollouts
    empty = ids, attention, torch.zeros_like(response)
    for steps in (by_hand(empty, 2)[0], by_trainer(tmp_path, empty, rows=2, accumulate=2)):
        assert all((step == 0).all() for step in steps.values())
    student = tiny.model(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.0)
    plain_loop.train_on(student, optimizer, empty, tiny.model(2), epochs=2, micro_batches=4)
    assert all((step == 0).all() for step in moved(student).values())


def test_responses_end_with_the_first_end_token():
    torch.manual_seed(0)
    student = tiny.model(1)
    with torch.no_grad():
        student.lm_head.weight[tiny.EOS] *= 4  # so that some rows stop early
    ids, attention, response = rollouts_module.sample(student, tiny.tokenizer(), PROMPTS, 12)
    lengths = response.sum(1)
    assert lengths.min() < lengths.max()
    for row, mask in zip(ids, response.bool(), strict=True):
        assert (row[mask][:-1] != tiny.EOS).all()
    assert (response <= attention).all() and (response[:, :4] == 0).all()
