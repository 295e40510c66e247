"""`topk_loss`: its divergences against formulas, the float64 reference, and each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.judge import EACH_BACKEND, EACH_FUSED, EACH_WIDE, assert_same_budget
from support.problems import draw_topk
from torch import Tensor

from drift_gate import DriftGate, topk_loss
from drift_gate.choices import DIRECTIONS, SUPPORTS

PAIRS = list(itertools.product(DIRECTIONS, SUPPORTS))
EACH_PAIR = pytest.mark.parametrize(("direction", "support"), PAIRS)


def listed_log_probs(problem, temperature=1.0) -> Tensor:
    """Full-softmax log-probs of the student on the teacher's words."""
    log_p = (problem.logits / temperature).log_softmax(-1)
    return log_p.gather(-1, problem.ids.long())


def run(problem, **options):
    arguments = {**problem.options, "gate": None, "reduction": "none", **options}
    return topk_loss(*problem.arguments(), **arguments)


@EACH_WIDE
def test_lsm_as_in_its_paper(backend):
    """arXiv 2603.25562: both softmaxed over the teacher's top K, KL(student || teacher)."""
    problem = draw_topk(1, 40, 50, k=8).to(torch.float64)
    result = run(problem, backend=backend)
    student = problem.logits.gather(-1, problem.ids).softmax(-1)
    teacher = problem.teacher.softmax(-1)
    expected = (student * (student.log() - teacher.log())).sum(-1)
    torch.testing.assert_close(result.loss, expected)
    assert (result.loss >= 0).all()


@EACH_WIDE
def test_truncated_forward_kl_as_verl_computes_it(backend):
    problem = draw_topk(1, 40, 50, k=8).to(torch.float64)
    result = run(problem, direction="forward", support="truncated", backend=backend)
    log_q, log_p = problem.teacher, listed_log_probs(problem)
    torch.testing.assert_close(result.loss, (log_q.exp() * (log_q - log_p)).sum(-1))
    metrics = run(problem, support="truncated", backend=backend).metrics
    torch.testing.assert_close(metrics["student_mass"], log_p.exp().sum(-1).mean())
    torch.testing.assert_close(metrics["teacher_mass"], log_q.exp().sum(-1).mean())


def test_truncated_values_may_be_negative_and_are_not_clamped():
    problem = draw_topk(1, 200, 50, k=4, teacher_share=0.5)
    assert (run(problem, direction="forward", support="truncated").loss < 0).any()


@EACH_WIDE
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("support", SUPPORTS)
def test_generalised_jsd_as_trl_computes_it(support, beta, backend):
    """m = beta teacher + (1 - beta) student; with "tail" over K + 1 buckets."""
    problem = draw_topk(1, 40, 50, k=8, teacher_share=0.9).to(torch.float64)
    result = run(problem, direction="jsd", support=support, beta=beta, backend=backend)
    p, q = listed_log_probs(problem).exp(), problem.teacher.exp()
    if support == "renormalized":
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    if support == "tail":
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    m = beta * q + (1 - beta) * p
    expected = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
    torch.testing.assert_close(result.loss, expected.sum(-1))
    overlap = torch.minimum(p, q).sum(-1).mean()
    torch.testing.assert_close(result.metrics["overlap"], overlap)


@EACH_WIDE
@EACH_PAIR
def test_gradcheck(direction, support, backend):
    problem = draw_topk(1, 4, 9, k=3, teacher_share=0.9).to(torch.float64)
    problem.ids[0, 1, 2] = -1  # one missing
    problem.teacher[0, 2, 0] = -torch.inf
    _, *rest = problem.arguments()
    options = {"direction": direction, "support": support, "beta": 0.3, "temperature": 0.8}

    def losses(z):
        return topk_loss(z, *rest, **options, gate=None, reduction="none", backend=backend).loss

    assert torch.autograd.gradcheck(losses, (problem.logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@EACH_PAIR
@EACH_FUSED
def test_error_budget(direction, support, dtype, backend):
    """Of many rows: the worst is one whose tail has little mass, and how wrong it is chance."""
    problem = draw_topk(8, 60, 301, k=12, dtype=dtype, masked=0.2, teacher_share=0.95)
    options = {"direction": direction, "support": support, "beta": 0.3}
    assert_same_budget(topk_loss, problem, backend, **options)


@pytest.mark.parametrize("packed", [False, True])
@EACH_FUSED
def test_gates_and_reductions(packed, backend):
    shape = (123, 40) if packed else (3, 41, 40)
    problem = draw_topk(*shape, k=5, masked=0.3)
    if packed:
        problem.options["cu_seqlens"] = torch.tensor([0, 17, 17, 70, 123])
    for gate in (DriftGate(block_size=9, aggregate="rms"), DriftGate("token"), None):
        for mode in ("token-mean", "seq-mean-token-mean"):
            assert_same_budget(topk_loss, problem, backend, gate=gate, reduction=mode)


@EACH_PAIR
def test_missing_entries_are_left_out(direction, support):
    """As if the list were shorter; -1 and -inf mean the same, whatever the order."""
    problem = draw_topk(1, 30, 50, k=6)
    options = {"direction": direction, "support": support}
    short = draw_topk(1, 30, 50, k=6)
    short.ids, short.teacher = short.ids[..., :4], short.teacher[..., :4]
    expected, expected_grad = loss_and_grad(short, **options)
    problem.ids[..., 4] = -1
    problem.teacher[..., 4] = torch.nan if support == "renormalized" else 0.0  # ignored
    problem.teacher[..., 5] = -torch.inf
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    problem.ids, problem.teacher = problem.ids[..., order], problem.teacher[..., order]
    got, grad = loss_and_grad(problem, **options)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)


def loss_and_grad(problem, backend="auto", **options):
    z = problem.logits.clone().requires_grad_()
    result = topk_loss(z, *problem.arguments()[1:], **problem.options, **options, backend=backend)
    return result, torch.autograd.grad(result.loss, z)[0]


@EACH_BACKEND
@pytest.mark.parametrize("support", SUPPORTS)
def test_a_position_without_support_is_not_valid(support, backend):
    problem = draw_topk(1, 20, 50, k=4)
    masked = draw_topk(1, 20, 50, k=4)
    masked.options["response_mask"] = torch.arange(20)[None] != 7
    expected, expected_grad = loss_and_grad(masked, backend, support=support)
    problem.ids[0, 7] = -1
    got, grad = loss_and_grad(problem, backend, support=support)
    assert got.metrics["without_support"] == 1
    assert expected.metrics["without_support"] == 0
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)


@EACH_BACKEND
def test_a_word_listed_twice_counts_once_or_raises(backend):
    problem = draw_topk(1, 20, 50, k=4)
    problem.ids[..., 3] = problem.ids[..., 0]
    with pytest.raises(ValueError, match="must not list a word twice in a row; got .* in row 0"):
        run(problem, validate=True)
    result, grad = loss_and_grad(problem, backend, direction="forward")
    assert result.metrics["duplicate_words"] == 20
    problem.ids, problem.teacher = problem.ids[..., :3], problem.teacher[..., :3]
    once, expected = loss_and_grad(problem, backend, direction="forward")
    torch.testing.assert_close(result.loss, once.loss)
    torch.testing.assert_close(grad, expected)


@EACH_BACKEND
@pytest.mark.parametrize("support", SUPPORTS)
def test_words_that_only_the_teacher_has(support, backend):
    """They raise, or are left out on request, as -1 is."""
    problem = draw_topk(1, 20, 50, k=6)
    problem.ids[0, ::3, 2] = 50
    problem.ids[0, 1::3, 0] = 10**6
    if backend != "reference":  # which indexes with them
        wanted = r"\[0, 50\) or be -1 .* got 50 at row 0, entry 2 \(ignore_unknown_ids=True leaves"
        with pytest.raises(ValueError, match=wanted):
            run(problem, support=support, backend=backend)
    options = {"support": support, "backend": backend}
    got, grad = loss_and_grad(problem, ignore_unknown_ids=True, **options)
    problem.ids[problem.ids >= 50] = -1
    expected, expected_grad = loss_and_grad(problem, **options)
    assert torch.equal(got.loss, expected.loss) and torch.equal(grad, expected_grad)


@EACH_BACKEND
def test_lists_may_be_longer_than_the_vocabulary(backend):
    """All words, as verl lists them: the sampled one first, then the likeliest."""
    problem = draw_topk(1, 20, 50, k=50)
    expected, expected_grad = loss_and_grad(problem, backend, support="truncated")
    for name in ("ids", "teacher"):
        x = getattr(problem, name)
        setattr(problem, name, torch.cat([x[..., 7:8], x], -1))
    result, grad = loss_and_grad(problem, backend, support="truncated")
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)


def test_raw_teacher_logits_do_for_the_renormalised_support():
    problem = draw_topk(1, 20, 50, k=4)
    expected = run(problem).loss
    problem.teacher += 7 * torch.randn(1, 20, 1)
    torch.testing.assert_close(run(problem).loss, expected)


def test_without_labels_only_the_listed_entries_are_read():
    """Renormalised and ungated: every other logit may be NaN, and the gradient is sparse."""
    problem = draw_topk(2, 20, 50, k=4)
    expected, expected_grad = loss_and_grad(problem, gate=None)
    listed = torch.zeros(2, 20, 50).scatter(-1, problem.ids, 1).bool()
    problem.logits[~listed] = torch.nan
    problem.labels = problem.old_log_probs = None
    got, grad = loss_and_grad(problem, gate=None)
    torch.testing.assert_close(got.loss, expected.loss)
    torch.testing.assert_close(grad, expected_grad)
    assert (grad[~listed] == 0).all()
    assert "student_mass" not in got.metrics
    for support in ("truncated", "tail"):
        full = draw_topk(2, 20, 50, k=4)
        expected = run(full, support=support).loss
        full.labels = full.old_log_probs = None
        torch.testing.assert_close(run(full, support=support).loss, expected)


def test_inplace_backward_and_compile():
    problem = draw_topk(2, 20, 50, k=4, masked=0.2)
    for support in SUPPORTS:
        torch._dynamo.reset()  # torch 2.9 takes one step for the other
        _, expected = loss_and_grad(problem, support=support)

        def step(leaf, inplace, support=support):
            return topk_loss(
                leaf * 1, *problem.arguments()[1:], **problem.options, support=support,
                inplace_backward=inplace,
            ).loss  # fmt: skip

        leaf = problem.logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(step(leaf, True), leaf)
        assert torch.equal(grad, expected)
        compiled = torch.compile(lambda z, f=step: f(z, False), backend="aot_eager", fullgraph=True)
        (grad,) = torch.autograd.grad(compiled(leaf), leaf)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "backward"}, "direction must be one of reverse, forward, jsd"),
        ({"support": "full"}, "support must be one of renormalized, truncated, tail"),
        ({"beta": 1.1}, "beta must be at most 1; got 1.1"),
        ({"beta": -1}, "beta must be finite and at least 0; got -1"),
        ({"k": 0}, "must list at least one word a row; got K = 0"),
        ({"k": 1}, "at least 2 words with support 'renormalized'"),
        ({"ids": 50}, r"teacher_topk_ids must lie in \[0, 50\) or be -1 where missing; got 50"),
        ({"ids": -2}, r"teacher_topk_ids must lie in \[0, 50\) or be -1 where missing; got -2"),
        ({"labels": None}, "labels must be a tensor where a gate or old_log_probs are used"),
    ],
)
def test_bad_input(changes, message):
    problem = draw_topk(1, 20, 50, k=4)
    if "k" in changes:
        k = changes.pop("k")
        problem.ids = torch.zeros(1, 20, k, dtype=torch.int64)
        problem.teacher = torch.zeros(1, 20, k)
    if "ids" in changes:
        problem.ids[0, 3, 1] = changes.pop("ids")
    if "labels" in changes:
        problem.labels = changes.pop("labels")
    with pytest.raises(ValueError, match=message):
        topk_loss(*problem.arguments(), **changes)
    problem = draw_topk(1, 20, 50, k=4)
    problem.teacher = problem.teacher[..., :3]
    with pytest.raises(ValueError, match="teacher_topk_log_probs must have the shape"):
        topk_loss(*problem.arguments())


def test_without_labels_ignore_index_ignores_nothing():
    problem = draw_topk(1, 20, 50, k=4)
    problem.labels = problem.old_log_probs = None
    assert torch.equal(run(problem, ignore_index=0).loss, run(problem).loss)
    assert (run(problem, ignore_index=0).gate == 1).all()
