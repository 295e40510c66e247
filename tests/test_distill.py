"""`drift-gate distill`: problems, sampling, rollouts, training and pass@k."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

import reasoning_gym
from drift_gate.bench.distill import (
    evaluation,
    models,
    problems,
    report,
    sampling,
    settings,
    training,
)
from drift_gate.bench.distill.problems import HELD_OUT, TRAIN, Grader, Problem
from drift_gate.bench.distill.solutions import Solver
from rich.console import Console

CPU = torch.device("cpu")
SMALL = settings.Settings(steps=2, prompts=2, samples=2, minibatch=2, max_tokens=48)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn() -> list[list[Problem]]:
    """Thirty training problems of each level."""
    return [problems.draw(level, 30, 0, stream=TRAIN) for level in range(4)]


def trainer(name: str, some: list[Problem], **changed: object) -> training.Trainer:
    """With the shipped models and the variant of that name."""
    chosen = dataclasses.replace(SMALL, **changed)  # type: ignore[arg-type]
    variant = next(v for v in settings.variants(chosen) if v.name == name)
    job = settings.Job(variant, chosen.epochs[0], 0)
    return training.Trainer(models.load_pair(None, None, CPU), job, chosen, some)


def test_worked_solutions_are_right(drawn: list[list[Problem]]) -> None:
    solver, grader = Solver(0.0, 0), Grader()
    for problem in itertools.chain(*drawn):
        assert grader(problem, solver.solve(problem)), problem
    example = Problem("47 * 36", "1692", "products")
    assert solver.solve(example).splitlines() == [
        "47*6: 7*6=42 4*6+4=28 282",
        "47*30: 7*3=21 4*3+2=14 1410",
        "282+1410: 2+0=2 8+1=9 2+4=6 0+1=1 1692",
        "answer: 1692",
    ]


@pytest.mark.parametrize(("left", "right"), [(5, 9), (0, 12), (3, 1)])
def test_padding_that_is_left_out_changes_no_hidden_state(
    left: int, right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(left)
    columns = torch.arange(16 + right)
    first = torch.randint(0, left + 1, (21, 1), generator=rng)
    end = 16 + torch.randint(1, right + 1, (21, 1), generator=rng)
    mask = (columns >= first) & (columns < end)
    tokens = torch.randint(3, 90, mask.shape, generator=rng)
    model = models.small_model("student")
    monkeypatch.setattr(models, "GROUP", 4)
    found = models.hidden_states(model, tokens, mask, right)
    whole = model.base_model(
        input_ids=tokens[:, :-1], attention_mask=mask[:, :-1], use_cache=False,
        position_ids=(mask.long().cumsum(-1) - 1).clamp(min=0)[:, :-1],
    ).last_hidden_state[:, -right:]  # fmt: skip
    valid = mask[:, -right:]
    torch.testing.assert_close(found[valid], whole[valid], rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad((states[valid] ** 2).sum(), model.base_model.embed_tokens.weight)[0]
        for states in (found, whole)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_sloppy_solutions_are_worse_the_higher_the_level() -> None:
    solver, grader, shares = Solver(0.5, 0), Grader(), []
    for level in range(4):
        some = problems.draw(level, 300, 0, stream=TRAIN, sources=("chain_sum", "products"))
        shares.append(np.mean([grader(p, solver.solve(p)) for p in some * 4]))
    assert 1 > shares[0] > shares[1] > shares[2] > shares[3] > 0


def test_answers_are_what_reasoning_gym_accepts() -> None:
    for source in problems.SOURCES:
        data = reasoning_gym.create_dataset(source, seed=0, size=3)
        for entry in data:
            assert data.score_answer(entry["answer"], entry) == 1
            problem, right = (
                Problem("", entry["answer"], source),
                f"work\nanswer: {entry['answer']}",
            )
            assert Grader()(problem, right) and not Grader()(problem, right + "1")


def test_held_out_problems_are_not_trained_on(drawn: list[list[Problem]]) -> None:
    held = [problems.draw(level, 30, 0, stream=HELD_OUT) for level in range(4)]
    for ours, theirs in zip(drawn, held, strict=True):
        assert len(set(ours)) == len(set(theirs)) == 30
        assert not {p.question for p in ours} & {p.question for p in theirs}
        assert {p.source for p in theirs} == set(problems.SOURCES)
    assert problems.draw(2, 30, 0, stream=HELD_OUT) == held[2]


def test_math_verify_grades_the_problems_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"problem": "1/2 + 1/4?", "answer": "\\\\frac{3}{4}"}\n')
    (problem,) = problems.read(file)
    grader = Grader()
    assert grader(problem, "so it is $\\boxed{0.75}$") and grader(problem, "3/4")
    assert not grader(problem, "2/4") and not grader(problem, "")


@pytest.mark.parametrize(
    "text, named",
    [
        ("", "is empty"),
        ('{"problem": "1+1", "answer": "2"}\n\n', "line 2 is empty"),
        ('{"problem": "1+1", "answer"\n', "line 1 is not JSON"),
        ("[1]\n", "got list"),
        ('{"answer": "2"}\n', '"problem"'),
        ('{"problem": "1+1"}\n', '"answer"'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(text)
    with pytest.raises(problems.BadFile, match=r"some\.jsonl") as error:
        problems.read(file)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_nucleus_keeps_the_likeliest_words_and_their_shares() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = torch.arange(1000) / 1000
    words = sampling.Nucleus(1.0, 0.75).draw(logits.expand(1000, -1), draws)
    assert torch.bincount(words).tolist() == [625, 375]  # 0.5 and 0.3 of 0.8
    cold = sampling.Nucleus(0.5, 1.0).draw(logits.expand(1000, -1), draws)
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    expected = 1000 * shares / shares.sum()
    assert (torch.bincount(cold) - expected).abs().max() <= 1


def test_cached_sampling_is_the_model_itself(drawn: list[list[Problem]]) -> None:
    """Greedy (a nucleus of one word), with rows that end at different times, against one pass."""
    pair = models.load_pair(None, None, CPU)
    ids = [models.prompt_ids(pair.tokenizer, level[i].question) for level in drawn for i in (0, 1)]
    prompts = sampling.pad_left(ids, pair.tokenizer.pad_token_id)
    responses, written = sampling.respond(
        pair.teacher, *prompts, most=120, ends=models.end_ids(pair.teacher, pair.tokenizer),
        pad=pair.tokenizer.pad_token_id, nucleus=sampling.Nucleus(1.0, 1e-6),
        generator=torch.Generator(),
    )  # fmt: skip
    assert len(set(written.sum(1).tolist())) > 2
    tokens, mask = torch.cat([prompts[0], responses], 1), torch.cat([prompts[1], written], 1)
    with torch.no_grad():
        hidden = models.hidden_states(pair.teacher, tokens, mask, responses.shape[1])
        again = models.logits_of(pair.teacher, hidden).argmax(-1)
    assert torch.equal(responses[written], again[written])


def test_scores_are_the_models_log_probs(drawn: list[list[Problem]]) -> None:
    run = trainer("OPD", drawn[1])
    rollouts, _ = run.collect(0)
    with torch.no_grad():
        for model, scores in (
            (run.pair.student, rollouts.old_log_probs),
            (run.pair.teacher, rollouts.teacher_log_probs),
        ):
            hidden = models.hidden_states(
                model, rollouts.tokens, rollouts.mask, rollouts.labels.shape[1]
            )
            exact = models.logits_of(model, hidden).double().log_softmax(-1)
            sampled = exact.gather(-1, rollouts.labels[..., None])[..., 0]
            mask = rollouts.response_mask
            torch.testing.assert_close(scores[mask].double(), sampled[mask], rtol=1e-5, atol=1e-5)
    listed = exact.gather(-1, rollouts.teacher_topk_ids)
    assert torch.equal(
        listed.argsort(-1, descending=True)[..., 0], torch.zeros_like(listed[..., 0]).long()
    )
    torch.testing.assert_close(
        rollouts.teacher_topk_log_probs.double(), listed, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", [v.name for v in settings.variants(SMALL)])
def test_the_reference_trains_the_same_curve(name: str, drawn: list[list[Problem]]) -> None:
    """Same prompts, same first rollouts; then rounding may be amplified by Adam, so few steps."""
    curves = []
    for backend in ("auto", "reference"):
        run = trainer(name, drawn[0], backend=backend, epochs=(2,))
        steps = [run.step() for _ in range(2)]
        curves.append(
            [
                [e[key] for key in ("loss", "drift_abs", "gate_mean_raw")]
                for s in steps
                for e in s["epochs"]
            ]
        )
    ours, theirs = map(torch.tensor, curves)
    assert ours[1, 1] > 0 and (("+" in name) == bool(ours[1, 2] < 1))  # it moved, and was gated
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def test_a_gate_that_samples_says_how_its_weights_differ(drawn: list[list[Problem]]) -> None:
    """Blocks of 8 of whose positions the first alone is measured; and it names no drift of NaN."""
    run = trainer(
        "OPD + Block8 every 8th", drawn[0], minibatch=4, epochs=(2,), extra=True, block_size=8
    )
    first, second = run.step()["epochs"]
    assert 0 < second["drift_abs"] < 1 and all(x >= 0 for x in second["drift_abs_quantiles"])
    assert first["sampled_largest_difference"] < 1e-5 < second["sampled_largest_difference"]
    assert second["sampled_difference"] < second["sampled_largest_difference"]
    assert 0 < second["sampled_correlation"] < 1
    whole = trainer("OPD + Block8", drawn[0], minibatch=4, epochs=(2,), block_size=8)
    assert "sampled_correlation" not in whole.step()["epochs"][0]
    movement = report.movement_of([{"curve": [{"epochs": [first, second]}]}])
    row = {"name": "OPD + Block8 every 8th", "epochs": 2, "movement": movement}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.of_sampling([row], False))
    shown = console.export_text()
    names = "sampled_correlation", "sampled_difference", "sampled_largest_difference"
    assert all(f"{second[name]:.4f}" in shown for name in names)


def after(name: str, some: list[Problem], **changed: object) -> torch.Tensor:
    """All weights of the student after a rollout batch, which is the same for all settings."""
    options: dict[str, object] = dict(minibatch=2, epochs=(3,), learning_rate=2e-3, warmup=1)
    run = trainer(name, some, **{**options, **changed})
    run.step()
    return torch.cat([p.detach().flatten() for p in run.pair.student.parameters()])


# What each is said to leave alone, it must: ungated runs by gates' options, LSM by those of OPD.
@pytest.mark.parametrize(
    "changed, moved, unmoved",
    [
        ({"warmup": 9}, "OPD", ""),
        ({"gradient_norm": 1e-9}, "LSM", ""),
        ({"minibatch": 4}, "OPD", ""),
        ({"clip": 1e-3}, "OPD", "LSM"),
        ({"advantage": "current"}, "OPD", "LSM"),
        ({"tau": 10.0}, "LSM + Block64", "LSM"),
        ({"aggregate": "max_abs"}, "OPD + Block64", "OPD"),
        ({"sample_every": 8}, "LSM + Block64", "LSM"),
    ],
)
def test_a_knob_moves_what_it_is_of(
    changed: dict[str, object], moved: str, unmoved: str, drawn: list[list[Problem]]
) -> None:
    assert not torch.equal(after(moved, drawn[0]), after(moved, drawn[0], **changed))
    if unmoved:
        assert torch.equal(after(unmoved, drawn[0]), after(unmoved, drawn[0], **changed))


def test_compiled_layers_train_as_the_others_do(drawn: list[list[Problem]]) -> None:
    """And sampling, whose shapes change with every token, compiles nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = (trainer("OPD + Block64", drawn[0], compile=on) for on in (False, True))
    prompts = drawn[0][:2]
    written = [run.sampler(prompts, training.seeded(1))[1][0] for run in (eager, compiled)]
    assert torch.equal(*written) and not torch._dynamo.utils.counters["frames"]
    shown = [run.step() for run in (eager, compiled)]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for name in ("loss", "reverse_kl"):
        assert shown[1][name] == pytest.approx(shown[0][name], rel=1e-4)
    assert shown[1]["epochs"][-1]["drift_abs"] == pytest.approx(
        shown[0]["epochs"][-1]["drift_abs"], rel=1e-2
    )
    states = [run.pair.student.state_dict() for run in (eager, compiled)]
    assert states[0].keys() == states[1].keys()
    for name, weights in states[0].items():
        torch.testing.assert_close(states[1][name], weights, rtol=0, atol=1e-4)


def test_warm_up_and_the_gradient_norm_are_those_asked_for(drawn: list[list[Problem]]) -> None:
    """The rate of the second of four batches; AdamW's first step of a gradient cut to nothing."""
    run = trainer("OPD", drawn[0], warmup=4, learning_rate=1e-3)
    run.step()
    run.step()
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(5e-4)
    run = trainer("OPD", drawn[0], gradient_norm=0.25, epochs=(1,), minibatch=4)
    run.step()
    norm = torch.stack([p.grad.norm() for p in run.pair.student.parameters()]).norm()
    assert norm.item() == pytest.approx(0.25, rel=1e-3)


def test_prompts_with_a_right_response_are_counted(
    drawn: list[list[Problem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer("OPD", drawn[0], samples=3)
    monkeypatch.setattr(Grader, "all", lambda *_: [True, True, False, False, False, False])
    shown = run.step()
    assert shown["accuracy"] == pytest.approx(1 / 3) and shown["passed"] == 0.5


def test_variants_see_the_same_prompts_and_first_rollouts(drawn: list[list[Problem]]) -> None:
    runs = [trainer(name, drawn[0]) for name in ("OPD", "LSM + Block64")]
    assert [runs[0].problems_of(i) for i in range(20)] == [
        runs[1].problems_of(i) for i in range(20)
    ]
    seen = [p for i in range(15) for p in runs[0].problems_of(i)]
    assert sorted(seen) == sorted(drawn[0])  # one pass takes every problem once
    first, second = (run.collect(0)[0] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_buffer_is_used_whole_in_every_epoch(drawn: list[list[Problem]]) -> None:
    rollouts, _ = trainer("OPD", drawn[0]).collect(0)
    parts = list(rollouts.minibatches(3, torch.Generator().manual_seed(0)))
    assert [len(part.tokens) for part in parts] == [3, 1]
    together = torch.cat([part.old_log_probs for part in parts])
    assert sorted(together.sum(1).tolist()) == sorted(rollouts.old_log_probs.sum(1).tolist())


def test_drift_starts_at_zero_and_gates_even(drawn: list[list[Problem]]) -> None:
    run = trainer("OPD + Block64", drawn[0], minibatch=4, epochs=(2,))
    first, second = run.step()["epochs"]
    assert first["drift_abs"] < 1e-6 and first["gate_mean_raw"] > 1 - 1e-6
    assert second["drift_abs"] > 1e-4 and second["gate_mean_raw"] < 1


@pytest.mark.parametrize("samples, right", [(8, 0), (8, 3), (16, 1), (16, 8), (16, 9), (16, 16)])
def test_pass_at_8_is_the_mean_over_all_choices_of_8(samples: int, right: int) -> None:
    if math.comb(samples, 8) == 1:
        expected = float(right > 0)
    else:
        drawn = itertools.combinations([i < right for i in range(samples)], 8)
        expected = float(np.mean([any(choice) for choice in drawn]))
    assert evaluation.pass_at(8, [right], samples)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_8_of_fewer_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="8"):
        evaluation.pass_at(8, [1], 7)


def test_the_teacher_is_clearly_above_the_student(drawn: list[list[Problem]]) -> None:
    chosen = dataclasses.replace(SMALL, max_tokens=160, evaluation_samples=8)
    pair = models.load_pair(None, None, CPU)
    sampler = training.Sampler(pair, chosen)
    held = {"level 2": problems.draw(1, 8, 0, stream=HELD_OUT)}
    student, teacher = (
        np.mean(evaluation.evaluate(sampler, held, seed=0, model=model)["level 2"]) / 8
        for model in (pair.student, pair.teacher)
    )
    assert teacher > student + 0.3
