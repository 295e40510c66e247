"""`full_loss`: the three divergences against formulas, float64, and each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support.judge import assert_same_budget, loss_and_grad
from support.memory import peak_bytes
from support.problems import draw
from torch import Tensor
from torch.library import opcheck

from drift_gate import DriftGate, full_loss

DIRECTIONS = ["reverse", "forward", "jsd"]
EACH_DIRECTION = pytest.mark.parametrize("direction", DIRECTIONS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])
INF, NAN = float("inf"), float("nan")


@dataclasses.dataclass
class FullProblem:
    """Arguments of `full_loss`."""

    logits: Tensor
    labels: Tensor | None
    old_log_probs: Tensor | None
    teacher: Tensor
    options: dict[str, Any]

    def arguments(self) -> tuple[Any, ...]:
        return self.logits, self.labels, self.old_log_probs, self.teacher

    def to(self, target: torch.device | torch.dtype) -> FullProblem:
        """On another device, or in another float dtype."""

        def move(x: Any) -> Any:
            integer = isinstance(x, Tensor) and not x.is_floating_point()
            keep = isinstance(target, torch.dtype) and integer
            return x if keep or not isinstance(x, Tensor) else x.detach().to(target)

        options = {name: move(value) for name, value in self.options.items()}
        return FullProblem(*map(move, self.arguments()), options)


def draw_full(*shape: int, **options: Any) -> FullProblem:
    """As `draw`; the teacher some way from the student, shifted by a constant."""
    problem = draw(*shape, **options)
    generator = torch.Generator().manual_seed(11)
    teacher = problem.logits.float() + torch.randn(*shape, generator=generator) + 3
    teacher = teacher.to(problem.logits.dtype)
    return FullProblem(
        problem.logits, problem.labels, problem.old_log_probs, teacher, problem.options
    )


def check(problem: FullProblem, **options: Any) -> None:
    assert_same_budget(full_loss, problem, "torch", **options)


def losses(problem: FullProblem, backend: str = "torch", **options: Any) -> tuple[Any, Tensor]:
    """The ungated per-token losses and the gradient of their sum."""
    options = {"gate": None, "loss_agg_mode": "none", **options}
    upstream = torch.ones(problem.logits.shape[:-1])
    upstream = upstream.to(torch.promote_types(problem.logits.dtype, torch.float32))
    return loss_and_grad(problem, backend, upstream, function=full_loss, **options)


@EACH_BACKEND
def test_kl_as_pytorch_has_it(backend):
    problem = draw_full(1, 30, 50).to(torch.float64)
    log_p, log_q = problem.logits.log_softmax(-1), problem.teacher.log_softmax(-1)
    for direction, pair in (("reverse", (log_q, log_p)), ("forward", (log_p, log_q))):
        expected = torch.nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
        result, _ = losses(problem, backend, direction=direction)
        torch.testing.assert_close(result.loss, expected, rtol=1e-10, atol=1e-12)


@EACH_BACKEND
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd_as_trl_computes_it(beta, backend):
    """m = beta teacher + (1 - beta) student; both softmaxed at the temperature."""
    problem = draw_full(1, 30, 50).to(torch.float64)
    p, q = (problem.logits / 0.9).softmax(-1), (problem.teacher / 0.9).softmax(-1)
    m = beta * q + (1 - beta) * p
    expected = beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()
    result, _ = losses(problem, backend, direction="jsd", beta=beta, temperature=0.9)
    torch.testing.assert_close(result.loss, expected.sum(-1), rtol=1e-10, atol=1e-12)


@EACH_DIRECTION
def test_the_gradient_is_the_documented_one(direction):
    problem = draw_full(1, 30, 50).to(torch.float64)
    options = {"direction": direction, "beta": 0.3, "temperature": 0.7, "teacher_temperature": 1.9}
    result, grad = losses(problem, **options)
    p, q = (problem.logits / 0.7).softmax(-1), (problem.teacher / 1.9).softmax(-1)
    if direction == "forward":
        expected = p - q
    else:
        m = q if direction == "reverse" else 0.3 * q + 0.7 * p
        h = (1.0 if direction == "reverse" else 0.7) * (p / m).log()
        expected = p * (h - (p * h).sum(-1, keepdim=True))
    torch.testing.assert_close(grad, expected / 0.7, rtol=1e-9, atol=1e-13)
    assert (result.loss > 0).all()


@EACH_BACKEND
@EACH_DIRECTION
def test_gradcheck(direction, backend):
    problem = draw_full(2, 3, 7, masked=0.2).to(torch.float64)
    problem.labels.clamp_(max=5)
    _, *rest = problem.arguments()
    options = {"direction": direction, "beta": 0.3, "temperature": 0.8, "vocab_size": 6}

    def outputs(z):
        result = full_loss(z, *rest, **options, **problem.options, gate=None, backend=backend)
        return result.loss, result.token_loss

    assert torch.autograd.gradcheck(outputs, (problem.logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 70, 517),  # two sequences; odd V
        (1, 3, 32_000),  # a real vocabulary; a chunk of rows that is not full
        (150, 33),  # [N, V]
        (50, 1, 2),  # two words; rows enough for the eager error to be a yardstick
    ],
    ids=str,
)
@EACH_DIRECTION
def test_shapes_and_dtypes(direction, shape, dtype):
    check(draw_full(*shape, dtype=dtype), direction=direction, beta=0.3)


@EACH_DIRECTION
def test_one_word(direction):
    """p = q = 1: no divergence, and no gradient but for the rounding of 1."""
    result, grad = losses(draw_full(3, 2, 1), direction=direction)
    assert (result.loss == 0).all()
    assert grad.abs().max() < 4e-7


@EACH_DIRECTION
def test_temperatures(direction):
    problem = draw_full(2, 60, 101, masked=0.2)
    options = {"direction": direction, "temperature": 0.7}
    check(problem, **options)
    check(problem, **options, teacher_temperature=1.6)
    given, _ = losses(problem, **options)
    expected, _ = losses(problem, **options, teacher_temperature=0.7)
    assert torch.equal(given.loss, expected.loss)


@EACH_DIRECTION
def test_a_teacher_of_another_dtype(direction):
    problem = draw_full(2, 60, 101, dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.float16, torch.float64):
        problem.teacher = problem.teacher.to(dtype)
        check(problem, direction=direction)


@EACH_DIRECTION
def test_logits_of_1e4_and_equal_models(direction):
    """A constant costs no digits; two equal models have divergence 0 and no gradient."""
    problem = draw_full(1, 40, 600)
    for x in (problem.logits, problem.teacher):  # exact in float32
        x.copy_((x * 16).round() / 16 + 1e4)
    check(problem, direction=direction, gate=None)
    problem.teacher = problem.logits.clone()
    result, grad = losses(problem, direction=direction)
    assert result.loss.abs().max() < 1e-6
    assert grad.abs().max() < 1e-6


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "gate", [DriftGate(block_size=9, aggregate="rms"), DriftGate("span"), None], ids=str
)
def test_gates_and_reductions(gate, packed):
    shape = (123, 40) if packed else (3, 41, 40)
    problem = draw_full(*shape, drift=1.5, masked=0.25)
    if packed:  # the second sequence is empty
        problem.options["cu_seqlens"] = torch.tensor([0, 17, 17, 70, 123])
    if gate is not None and gate.granularity == "span":
        generator = torch.Generator().manual_seed(1)
        problem.options["span_ids"] = torch.randint(-3, 3, shape[:-1], generator=generator)
    for mode in ("token-mean", "seq-mean-token-mean", "none"):
        check(problem, gate=gate, loss_agg_mode=mode)


@EACH_BACKEND
def test_the_gate_is_detached(backend):
    problem = draw_full(2, 80, 30, drift=1.0).to(torch.float64)
    gated, grad = loss_and_grad(problem, backend, function=full_loss)
    _, expected = loss_and_grad(
        problem, backend, gated.gate / 160, function=full_loss, gate=None, loss_agg_mode="none"
    )
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@EACH_BACKEND
def test_without_labels(backend):
    """Every position is valid but for the mask, whatever the ignore_index."""
    problem = draw_full(2, 30, 40, masked=0.3)
    expected, expected_grad = losses(problem, backend)
    problem.labels = problem.old_log_probs = None
    for ignore_index in (-100, 0):
        got, grad = losses(problem, backend, ignore_index=ignore_index)
        assert torch.equal(got.loss, expected.loss) and torch.equal(grad, expected_grad)
        assert (got.log_probs == 0).all() and (got.drift == 0).all()
    assert (got.loss != 0).equal(problem.options["response_mask"])


@EACH_DIRECTION
def test_float64_stays_float64(direction):
    problem = draw_full(2, 70, 90, masked=0.2).to(torch.float64)
    (got, grad), (truth, truth_grad) = (
        loss_and_grad(problem, b, function=full_loss, direction=direction)
        for b in ("torch", "reference")
    )
    for name in ("loss", "token_loss", "log_probs", "gate", "drift", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(truth, name), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(grad, truth_grad, rtol=1e-10, atol=1e-14)


@EACH_DIRECTION
def test_vocab_size(direction):
    """As if both were cut; the student's words beyond get no gradient, whatever they hold."""
    problem = draw_full(2, 40, 50, masked=0.2)
    cut = dataclasses.replace(
        problem, logits=problem.logits[..., :45].clone(), teacher=problem.teacher[..., :45].clone()
    )
    cut.labels.clamp_(max=44)
    expected, expected_grad = losses(cut, direction=direction)
    problem.logits[..., 45:] = NAN
    problem.teacher[..., 45:] = INF
    for width in (50, 47):
        problem.teacher = problem.teacher[..., :width]
        for backend in ("torch", "reference"):
            got, grad = losses(problem, backend, direction=direction, vocab_size=45)
            torch.testing.assert_close(got.loss, expected.loss)
            torch.testing.assert_close(grad[..., :45], expected_grad)
            assert (grad[..., 45:] == 0).all()


@EACH_BACKEND
@EACH_DIRECTION
def test_minus_infinity(direction, backend):
    problem = draw_full(1, 6, 40)
    x, y = problem.logits, problem.teacher
    problem.labels.fill_(39)
    x[0, 0, :39] = -INF  # one word has all the mass
    x[0, 1, ::2] = y[0, 1, ::2] = -INF  # words that neither has
    x[0, 2, ::2] = -INF  # the student alone has them not
    y[0, 3, ::2] = -INF  # the teacher alone
    x[0, 4, 3], y[0, 4, 3] = -1e4, -INF  # a probability that underflows, and is no -inf
    infinite = {"reverse": [3, 4], "forward": [0, 2], "jsd": []}[direction]
    result, grad = losses(problem, backend, direction=direction)
    truth, truth_grad = losses(problem.to(torch.float64), "reference", direction=direction)
    assert result.loss[0].isinf().nonzero()[:, 0].tolist() == infinite
    torch.testing.assert_close(result.loss, truth.loss.float())
    finite = result.loss.isfinite()
    torch.testing.assert_close(grad[finite], truth_grad[finite].float())
    if direction != "reverse":
        assert grad.isfinite().all()
    for excluded in ((x[0] == -INF)[finite[0]],):
        assert (grad[finite][excluded] == 0).all() or direction == "forward"


@EACH_BACKEND
@EACH_DIRECTION
@pytest.mark.parametrize("poison", [NAN, INF, "all -inf"])
def test_nan_and_infinite_logits_make_their_row_nan(poison, direction, backend):
    for side in ("logits", "teacher"):
        problem = draw_full(1, 80, 30)
        x = getattr(problem, side)
        if poison == "all -inf":
            x[0, 3] = -INF
        else:
            x[0, 3, 5] = poison
        result, grad = losses(problem, backend, direction=direction)
        bad = result.loss.isnan()
        assert bad[0].nonzero().tolist() == [[3]]
        assert grad[bad].isnan().all() and grad[~bad].isfinite().all()


@EACH_DIRECTION
def test_invalid_rows_may_hold_anything(direction):
    problem = draw_full(2, 60, 30, masked=0.4)
    clean, clean_grad = loss_and_grad(problem, "torch", function=full_loss, direction=direction)
    masked = ~problem.options["response_mask"]
    for x in (problem.logits, problem.old_log_probs, problem.teacher):
        x[masked] = NAN
    problem.labels[masked] = 10**9
    for backend in ("torch", "reference"):
        got, grad = loss_and_grad(problem, backend, function=full_loss, direction=direction)
        torch.testing.assert_close(got.loss, clean.loss)
        torch.testing.assert_close(grad, clean_grad)
        for name in ("token_loss", "log_probs", "gate", "drift", "entropy"):
            assert (getattr(got, name)[masked] == 0).all(), name
        assert (grad[masked] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (2, 0, 7), (0, 7), (2, 3, 7)], ids=str)
@EACH_BACKEND
def test_a_batch_without_valid_rows_has_loss_0(shape, backend):
    problem = draw_full(*shape)
    problem.labels.fill_(-100)
    result, grad = loss_and_grad(problem, backend, function=full_loss, direction="jsd")
    assert (result.loss == 0).all() and (grad == 0).all()


@EACH_DIRECTION
def test_strided_logits_are_not_copied(direction):
    problem = draw_full(2, 40, 50, dtype=torch.bfloat16)
    expected, grad = loss_and_grad(problem, "torch", function=full_loss, direction=direction)
    for name, width in (("logits", 56), ("teacher", 51)):
        buffer = torch.full((2, 41, width), NAN, dtype=torch.bfloat16)
        setattr(problem, name, buffer[:, :-1, :50].copy_(getattr(problem, name)))
    got, strided_grad = loss_and_grad(problem, "torch", function=full_loss, direction=direction)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(grad, strided_grad)


@EACH_DIRECTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inplace_backward(direction, dtype):
    """Overwrites the logits with their gradient; run twice, the same bits."""
    problem = draw_full(2, 30, 40, masked=0.2, dtype=dtype)
    _, *rest = problem.arguments()
    options = {**problem.options, "direction": direction, "vocab_size": 37, "gate": None}
    problem.labels.clamp_(max=36)
    leaf = problem.logits.requires_grad_()
    (expected,) = torch.autograd.grad(full_loss(leaf, *rest, **options).loss, leaf)
    logits = leaf * 1
    loss = full_loss(logits, *rest, **options, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    assert torch.equal(logits, expected) and torch.equal(leaf.grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autograd():
    """A second backward is exact, a double one refused; the teacher gets no gradient."""
    problem = draw_full(2, 30, 40)
    z, y = problem.logits.requires_grad_(), problem.teacher.requires_grad_()
    result = full_loss(*problem.arguments(), return_entropy=True)
    for name in ("log_probs", "gate", "drift", "entropy"):
        assert not getattr(result, name).requires_grad
    (first,) = torch.autograd.grad(result.loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(result.loss, z, torch.tensor(-2.5), create_graph=True)
    torch.testing.assert_close(second, -2.5 * first)
    with pytest.raises(RuntimeError, match="drift_gate"):
        second.sum().backward()
    full_loss(*problem.arguments()).loss.backward()
    assert z.grad is not None and y.grad is None


@EACH_DIRECTION
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_opcheck(direction, dtype):
    problem = draw_full(2, 5, 19, dtype=torch.bfloat16).to(dtype)
    ops, (z, y) = torch.ops.drift_gate, (problem.logits, problem.teacher[..., :17])
    labels, valid = torch.arange(10), torch.arange(10) % 3 > 0
    for ids, entropy in ((labels, True), (None, False)):
        arguments = y, ids, valid, 1.5, 0.7, direction, 0.3, entropy, False, "torch"
        opcheck(ops.divergence, (z.clone().requires_grad_(), *arguments))
    _, _, statistics, _ = ops.divergence(z, *arguments)
    rest = y, statistics, valid, torch.ones_like(statistics[0]), 1.5, 0.7, direction, 0.3, "torch"
    opcheck(ops.divergence_grad, (z, *rest))
    opcheck(ops.divergence_grad_, (z.clone(), *rest))


@pytest.mark.parametrize(
    "options",
    [{}, {"direction": "jsd", "inplace_backward": True}, {"direction": "forward", "gate": None}],
    ids=str,
)
def test_compile_traces_without_a_break(options):
    torch._dynamo.reset()

    def step(leaf, labels, old, teacher):
        return full_loss(leaf * 1, labels, old, teacher, vocab_size=28, **options).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for length in (20, 13):  # the second time with a dynamic length
        problem = draw_full(2, length, 30)
        problem.labels.clamp_(max=27)
        _, *rest = problem.arguments()
        grads = []
        for function in (compiled, step):
            leaf = problem.logits.clone().requires_grad_()
            grads.append(torch.autograd.grad(function(leaf, *rest), leaf)[0])
        torch.testing.assert_close(grads[0], grads[1])


def test_extra_memory():
    """Beyond inputs: in place a few scratch rows, else the gradient and those rows."""
    problem = draw_full(1, 1024, 4099, dtype=torch.bfloat16)
    _, *rest = problem.arguments()
    leaf = problem.logits.requires_grad_()
    for inplace in (True, False):
        logits = leaf * 1
        full_loss(logits.detach(), *rest)  # one-time set-up is not counted
        with peak_bytes() as memory:
            loss = full_loss(logits, *rest, inplace_backward=inplace).loss
            torch.autograd.grad(loss, logits)
        assert memory.peak <= (0 if inplace else leaf.nbytes) + (14 << 20)


def test_same_inputs_same_bits():
    problem = draw_full(3, 200, 257, dtype=torch.bfloat16, masked=0.2)
    (a, grad_a), (b, grad_b) = (
        loss_and_grad(problem, "torch", function=full_loss) for _ in range(2)
    )
    assert torch.equal(a.loss, b.loss) and torch.equal(grad_a, grad_b)


BAD = [
    ({"teacher": torch.rand(2, 4, 7)}, ValueError, r"teacher_logits .*\[2, 5\]; got shape .*4, 7"),
    ({"teacher": torch.rand(2, 5, 8)}, ValueError, "same words; got V = 7 and 8 .vocab_size"),
    ({"teacher": torch.rand(2, 7, 5).mT}, ValueError, "teacher_logits must be contiguous in their"),
    ({"teacher": torch.rand(2, 5, 7, device="meta")}, ValueError, "logits, cpu; got meta"),
    ({"teacher": torch.ones(2, 5, 7).int()}, TypeError, "teacher_logits must be a floating-point"),
    ({"teacher": None}, TypeError, "teacher_logits must be a torch.Tensor; got NoneType"),
    ({"vocab_size": 8}, ValueError, r"between 1 and the words of logits \(7\).*got 8"),
    ({"vocab_size": 0}, ValueError, "vocab_size must be between 1 and .*got 0"),
    ({"vocab_size": 7.0}, TypeError, "vocab_size must be an int; got float"),
    (
        {"labels": torch.full((2, 5), 6), "vocab_size": 6},
        ValueError,
        r"labels must lie in \[0, 6\)",
    ),
    ({"direction": "both"}, ValueError, "direction must be one of reverse, forward, jsd; got 'bo"),
    ({"beta": 0.0}, ValueError, "beta must be finite and greater than 0; got 0"),
    ({"beta": 1.0}, ValueError, "beta must be less than 1; got 1"),
    ({"beta": "1"}, TypeError, "beta must be a number; got str"),
    ({"teacher_temperature": 0}, ValueError, "teacher_temperature must be finite and greater"),
    ({"temperature": 0}, ValueError, "temperature must be finite and greater than 0; got 0"),
    ({"labels": None}, ValueError, "labels must be a tensor where a gate or old_log_probs"),
    ({"old_log_probs": None}, ValueError, "old_log_probs must be a tensor where a gate is used"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_arguments(changes, error, message):
    names = ("logits", "labels", "old_log_probs", "teacher")
    arguments = dict(zip(names, draw_full(2, 5, 7).arguments(), strict=True)) | changes
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=message):
        full_loss(*positional, **arguments)
