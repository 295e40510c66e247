"""`drift_gate.integrations.ms_swift` beside ms-swift's own `gkd_loss`, and in its `rlhf_main`.

`make test-integrations` lays ms-swift beside the pinned set; without it these tests are skipped.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("swift", reason="make test-integrations installs ms-swift")

from support import swift_runs  # isort: skip  (before ms-swift: it keeps the hubs offline)
from support.trainer_memory import ROWS, WORDS, step_peaks
from swift.rlhf_trainers import gkd_loss as stock
from swift.rlhf_trainers.gkd_loss import TeacherOutput
from swift.trainers.trainer_factory import TrainerFactory

import drift_gate as dg
from drift_gate.integrations import ms_swift as integration

PLUGIN = Path(__file__).resolve().parent.parent / "examples" / "ms_swift_plugin.py"
BATCH, LENGTH, VOCAB, K = 3, 8, 41, 6
GATE = dg.DriftGate(block_size=2, tau=1.5)


class Case:
    """Student and teacher in float64; prompts of unequal lengths, a tool's token in the first."""

    def __init__(self, topk: bool, own_prompt: bool = False, teacher_words: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * 2

        self.logits = draw(BATCH, LENGTH, VOCAB).requires_grad_()
        self.labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
        self.labels[torch.arange(LENGTH) < torch.tensor([2, 4, 3])[:, None]] = -100
        self.labels[0, 4] = -100
        now = dg.token_log_probs(self.logits.detach(), self.labels)[0]
        self.old = now + 0.3 * draw(BATCH, LENGTH)
        self.full = draw(BATCH, LENGTH, teacher_words)
        self.topk = topk
        self.log_probs, self.ids = self.full.log_softmax(-1).topk(K)
        self.teacher_labels = self.labels
        if own_prompt:  # two tokens longer: the same completions further right
            self.teacher_labels, self.full, self.log_probs, self.ids = (
                torch.cat([x.new_full((BATCH, 2, *x.shape[2:]), fill), x], 1)
                for x, fill in (
                    (self.labels, -100), (self.full, 7), (self.log_probs, 7), (self.ids, 7)
                )
            )  # fmt: skip

    def teacher(self) -> TeacherOutput:
        """A new one: ms-swift's functions may change it."""
        labels = self.teacher_labels.clone()
        if self.topk:
            return TeacherOutput(topk_logprobs=self.log_probs, topk_indices=self.ids, labels=labels)
        return TeacherOutput(full_logits=self.full, labels=labels)

    def run(self, loss, beta: float = 0.3, temperature: float = 0.7, **options):
        total, count = loss(self.logits, self.teacher(), self.labels, beta, temperature, **options)
        return total.detach(), count, torch.autograd.grad(total, self.logits)[0]


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]
    assert expected[2].abs().max() > 1e-3
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("own_prompt", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0, 0.3, 1])
@pytest.mark.parametrize("topk", [False, True])
def test_ungated_it_is_ms_swift_s_own(topk, beta, temperature, own_prompt):
    """Also where the teacher has a prompt of its own, as in self-distillation."""
    case = Case(topk, own_prompt)
    expected = case.run(stock.gkd_loss, beta, temperature)
    assert expected[1] == (case.labels != -100).sum()
    assert_same(case.run(integration.gkd_loss, beta, temperature), expected)
    gate = dg.DriftGate(tau=0.0)
    found = case.run(integration.gkd_loss, beta, temperature, gate=gate, old_log_probs=case.old)
    assert_same(found, expected)


def test_raw_logits_as_lists_and_positions_without_any():
    """`to_topk` lists logits; a server that does not know a position lists -inf."""
    case = Case(True)
    case.log_probs = case.log_probs + 3.0
    case.log_probs[1, 5] = -torch.inf
    expected = case.run(stock.gkd_loss)
    assert expected[1] == (case.labels != -100).sum() - 1
    assert_same(case.run(integration.gkd_loss), expected)


def test_a_batch_without_trained_tokens():
    for topk in (False, True):
        case = Case(topk)
        case.labels.fill_(-100)
        found = case.run(integration.gkd_loss)
        assert found[0] == 0 and found[1] == 0 and not found[2].any()


@pytest.mark.parametrize("own_prompt", [False, True])
@pytest.mark.parametrize("topk", [False, True])
def test_gated_it_is_the_package_s(topk, own_prompt):
    case, plain = Case(topk, own_prompt), Case(topk)
    found = case.run(integration.gkd_loss, gate=GATE, old_log_probs=case.old)
    common = dict(
        direction="jsd", beta=0.3, temperature=0.7, teacher_temperature=0.7, gate=GATE,
        reduction="token-sum",
    )  # fmt: skip
    args = plain.logits, plain.labels, plain.old
    if topk:
        result = dg.topk_loss(*args, plain.ids, plain.log_probs, **common)
    else:
        result = dg.full_loss(*args, plain.full, **common)
    assert_same(found, (result.loss, found[1], torch.autograd.grad(result.loss, plain.logits)[0]))
    ungated = case.run(stock.gkd_loss)[0]
    assert (found[0] - ungated).abs() > 0.02 * ungated


@pytest.mark.parametrize("teacher_words", [VOCAB - 5, VOCAB + 5])
def test_heads_of_other_sizes_share_the_leading_words(teacher_words):
    """ms-swift fills up the smaller with the other's logits, as if both agreed there."""
    case, shared = Case(False, teacher_words=teacher_words), min(VOCAB, teacher_words)
    found = case.run(integration.gkd_loss)
    case.full, whole = case.full[..., :shared], case.logits
    case.logits = whole[..., :shared]
    total, count = stock.gkd_loss(case.logits, case.teacher(), case.labels, 0.3, 0.7)
    assert_same(found, (total, count, torch.autograd.grad(total, whole)[0]))


def test_drift_is_over_all_words_whatever_is_compared():
    case = Case(False, teacher_words=VOCAB - 5)
    found = case.run(integration.gkd_loss, gate=GATE, old_log_probs=case.old)
    now = dg.token_log_probs(case.logits.detach(), case.labels, temperature=0.7)[0]
    mask = case.labels != -100
    weights = dg.gate_weights(now, case.old, GATE, response_mask=mask).weights
    result = dg.full_loss(
        case.logits, None, None, case.full, direction="jsd", beta=0.3, vocab_size=VOCAB - 5,
        temperature=0.7, gate=weights, response_mask=mask, reduction="token-sum",
    )  # fmt: skip
    gradient = torch.autograd.grad(result.loss, case.logits)[0]
    assert_same(found, (result.loss, mask.sum(), gradient))


@pytest.mark.parametrize("topk", [False, True])
def test_peak_memory_beside_ms_swift_s_own(topk):
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(1, ROWS, WORDS, generator=generator).bfloat16()
    labels = torch.randint(WORDS, (1, ROWS), generator=generator)
    labels[:, : ROWS // 8] = -100

    def step(loss):
        def run(logits):
            output = TeacherOutput(full_logits=teacher, labels=labels)
            return loss(logits[None], output.to_topk(64) if topk else output, labels, 0.5, 1.0)[0]

        return run

    steps = {"own": step(stock.gkd_loss), "drift_gate": step(integration.gkd_loss)}
    peaks = step_peaks(f"ms-swift, {'top K' if topk else 'full'}", steps)
    assert peaks["drift_gate"] < 0.5 * peaks["own"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("swift")
    swift_runs.prepare(made)
    return made


@pytest.fixture
def installed(monkeypatch):
    """`install`, undone after the test."""
    monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
    monkeypatch.setattr(integration.GatedGKDTrainer, "gate", None)
    return integration.install


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gkd_logits_topk": 5, "beta": 1}])
def test_ungated_its_trainer_logs_ms_swift_s_own_losses(folder, installed, options):
    expected = swift_runs.run(folder, **options)
    installed(gate=None)
    found = swift_runs.run(folder, **options)
    assert len(found) == len(expected) == 4
    for name in ("loss", "grad_norm"):
        for log, other in zip(found, expected, strict=True):
            assert log[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.slow
def test_the_plugin_gates_the_second_step_over_a_buffer(folder, installed):
    logs = swift_runs.run(folder, external_plugins=PLUGIN, learning_rate=2)
    assert TrainerFactory.TRAINER_MAPPING["gkd"].startswith(integration.__name__)
    drift = [log["drift_gate/drift_abs"] for log in logs]
    assert max(drift[0], drift[2]) < 1e-5 < 1e-3 < min(drift[1], drift[3])
    assert logs[1]["drift_gate/gate_min"] < 1 < logs[1]["drift_gate/gate_max"]
    installed(gate=None)
    plain = swift_runs.run(folder, learning_rate=2)
    assert logs[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4)
    assert logs[1]["grad_norm"] != pytest.approx(plain[1]["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    "liger, template, message",
    [
        (True, {}, "use_liger_kernel must be False with GatedGKDTrainer; got True"),
        (False, {"padding_free": True}, "padding_free must be False with a gate"),
        (False, {"sequence_parallel_size": 2}, "sequence_parallel_size must be 1 with a gate"),
    ],
)
def test_options_that_do_not_go_with_a_gate(installed, monkeypatch, liger, template, message):
    """Set as ms-swift's trainer sets them, which needs a GPU to get so far."""

    def init(self):
        self.use_liger_gkd_loss = liger
        self.template = SimpleNamespace(padding_free=False, sequence_parallel_size=1)
        vars(self.template).update(template)

    monkeypatch.setattr(integration.GKDTrainer, "__init__", init)
    installed()
    with pytest.raises(ValueError, match=message):
        integration.GatedGKDTrainer()


def test_what_is_not_supported_says_so(installed):
    with pytest.raises(ValueError, match="gate granularity must be one of block, token, sequence"):
        installed(gate=dg.DriftGate("span"))
    with pytest.raises(TypeError, match="gate must be a DriftGate or None; got str"):
        installed(gate="block")
    case = Case(True)
    case.ids, case.log_probs = case.ids[..., :1], case.log_probs[..., :1]
    with pytest.raises(ValueError, match="gkd_logits_topk must be at least 2; got 1"):
        case.run(integration.gkd_loss)
    case = Case(False)
    case.teacher_labels = case.labels.clone()
    case.teacher_labels[0, -1] = -100
    with pytest.raises(ValueError, match="teacher_output.labels must have as many trained pos"):
        case.run(integration.gkd_loss)
    case = Case(False)
    with pytest.raises(ValueError, match="old_log_probs must be a tensor where a gate is used"):
        case.run(integration.gkd_loss, gate=GATE)


@pytest.mark.parametrize("missing", ["the package", "a function", "the version"])
def test_a_missing_or_other_ms_swift_is_named(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, integration.__name__)
    if missing == "the package":
        monkeypatch.setitem(sys.modules, "swift.rlhf_trainers.gkd_loss", None)
    elif missing == "a function":
        monkeypatch.delattr(stock, "TeacherOutput")
    else:
        monkeypatch.setattr("swift.version.__version__", "4.60.0")
    wanted = "drift_gate.integrations.ms_swift needs ms-swift 4.6: pip install 'ms-swift==4.6."
    with pytest.raises(ImportError, match=wanted):
        importlib.import_module(integration.__name__)
