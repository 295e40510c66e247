"""The ops as citizens of PyTorch: opcheck, torch.compile, autograd's rules, threads, memory."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from drift_gate.bench.measure import peak_bytes
from support.judge import EACH_FUSED
from support.problems import draw
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from drift_gate import (
    DriftGate,
    Reduction,
    gate_weights,
    gather_lse,
    newline_spans,
    opd_loss,
    token_log_probs,
)
from drift_gate.passes.backends import passes_of


def drawn():
    """float64 logits [2, 5, 19], two ids a row, valid [10]."""
    ids = torch.randint(19, (2, 5, 2), generator=torch.Generator().manual_seed(0))
    return draw(2, 5, 19).logits.double().requires_grad_(), ids, torch.arange(10) % 3 > 0


def test_gather_lse_joins_the_gradients_of_both_results():
    logits, ids, _ = drawn()
    results = gather_lse(logits, ids, temperature=1 / 1.5)
    z = 1.5 * logits
    eager = z.gather(-1, ids), z.logsumexp(-1)
    for weights in ((1, 1), (0, 2), (3, 0)):
        ours, theirs = (
            sum(w * x.square().sum() for w, x in zip(weights, pair, strict=True) if w)
            for pair in (results, eager)
        )
        (got,) = torch.autograd.grad(ours, logits, retain_graph=True)
        (truth,) = torch.autograd.grad(theirs, logits, retain_graph=True)
        torch.testing.assert_close(got, truth)


@EACH_FUSED
def test_expand_gives_0_in_invalid_rows_whatever_their_betas(backend):
    logits, ids, valid = drawn()
    logits, ids, run = logits.detach().float(), ids.view(10, 2), passes_of(backend)
    gathered, _, top, log_sum, _ = run.scan(logits, ids, valid, 1.0, False)
    alpha, beta = torch.ones_like(top), torch.ones_like(gathered)
    out = torch.empty_like(logits)
    run.expand(logits, ids, top, log_sum, gathered, valid, alpha, beta, 1.0, out)
    rows = out.view(10, 19)
    assert rows[~valid].eq(0).all() and rows[valid].ne(0).all()


def test_opcheck_of_newline_spans():
    problem = draw(3, 20, 11, masked=0.3)
    mask = problem.options["response_mask"].flatten()
    arguments = problem.labels.flatten(), [3, 4], mask, None, 20, 2, 8
    opcheck(torch.ops.drift_gate.newline_spans, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_traces_the_loss_without_a_break(backend, dynamic):
    torch._dynamo.reset()

    def step(hidden, weight, labels, old, teacher, mask):
        return opd_loss(
            hidden @ weight, labels, old, teacher, response_mask=mask, return_entropy=True
        )

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=dynamic)
    for length in (20, 13):
        problem = draw(2, length, 30, masked=0.2)
        mask = problem.options["response_mask"]
        inputs = torch.randn(2, length, 8), torch.randn(8, 30)
        grads = []
        for function in (compiled, step):
            leaves = [x.clone().requires_grad_() for x in inputs]
            result = function(*leaves, *problem.arguments()[1:], mask)
            grads.append((result.loss, result.gate, *torch.autograd.grad(result.loss, leaves)))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "seq-mean-token-sum-norm", "gate": None, "estimator": "k3"},
        {"gate": DriftGate("sequence", aggregate="rms", normalize="sequence")},
        {
            "reduction": Reduction("seq-mean-token-mean", global_batch_size=7),
            "inplace_backward": True,
        },
    ],
    ids=str,
)
def test_compile_traces_every_kind_of_option(options):
    torch._dynamo.reset()
    problem = draw(2, 20, 30)

    def step(leaf):
        return opd_loss(leaf * 1, *problem.arguments()[1:], **options).loss.sum()

    grads = []
    for function in (torch.compile(step, backend="aot_eager", fullgraph=True), step):
        leaf = problem.logits.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(leaf), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_compile_traces_the_other_functions():
    torch._dynamo.reset()
    new, old = -torch.rand(2, 100), -torch.rand(2, 100)
    logits, labels = torch.randn(2, 6, 30), torch.randint(30, (2, 6))
    calls = [
        (gate_weights, (new, old)),
        (lambda z, y: token_log_probs(z, y, return_entropy=True), (logits, labels)),
        (gather_lse, (logits, labels[..., None])),
        (lambda y: newline_spans(y, [3, 4]), (labels,)),
    ]
    for function, arguments in calls:
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(*arguments)
        torch.testing.assert_close(got, function(*arguments))


def loss_of(logits, problem, **options):
    return opd_loss(logits, *problem.arguments()[1:], **problem.options, **options).loss


def test_inplace_backward_overwrites_the_logits_with_their_gradient():
    problem = draw(2, 30, 40, masked=0.2)
    (expected,) = torch.autograd.grad(
        loss_of(problem.logits.requires_grad_(), problem), problem.logits
    )
    logits = problem.logits * 1
    loss_of(logits, problem, inplace_backward=True).backward()
    assert torch.equal(logits, expected)
    assert torch.equal(problem.logits.grad, expected)


def test_autograd_refuses_what_an_inplace_backward_would_corrupt():
    problem = draw(2, 30, 40)
    problem.logits.requires_grad_()
    logits = problem.logits * 1
    loss = loss_of(logits, problem, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # a second time
    logits = problem.logits * 1
    loss, other = loss_of(logits, problem, inplace_backward=True), logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()  # an op that saved the logits


def test_a_second_backward_is_exact_out_of_place():
    problem = draw(2, 30, 40)
    z = problem.logits.requires_grad_()
    loss = loss_of(z, problem)
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    (second,) = torch.autograd.grad(loss, z, torch.tensor(-2.5))
    torch.testing.assert_close(second, -2.5 * first)


def test_double_backward_is_refused():
    problem = draw(2, 30, 40)
    z = problem.logits.requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(z, problem), z, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradients of drift_gate::opd are not different"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="drift_gate"):
        (z.sum() + grad.square().sum()).backward()  # a penalty is not left out
    (again,) = torch.autograd.grad(loss_of(z, problem), z)
    assert torch.equal(grad, again)


def test_modes_of_pytorch_see_one_op():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(str(op))
            return op(*args, **(kwargs or {}))

    problem, names = draw(2, 30, 40), []
    with Seen():
        loss = loss_of(problem.logits.requires_grad_(), problem, inplace_backward=True)
        loss.backward()
    assert {x for x in names if "drift_gate" in x} == {
        "drift_gate.opd.default",
        "drift_gate.opd_backward.default",
    }


def test_inputs_that_get_no_gradient_may_require_it():
    problem = draw(2, 30, 40)
    for x in problem.arguments():
        if x.is_floating_point():
            x.requires_grad_()
    loss_of(problem.logits, problem).backward()
    assert problem.logits.grad is not None
    assert problem.old_log_probs.grad is None
    assert problem.teacher_log_probs.grad is None


def test_no_grad_and_frozen_logits():
    problem = draw(2, 30, 40)
    assert not loss_of(problem.logits, problem).requires_grad
    problem.logits.requires_grad_()
    with torch.no_grad():
        assert not loss_of(problem.logits, problem).requires_grad
    with torch.inference_mode():
        loss_of(problem.logits, problem)


def test_autocast_and_checkpoint():
    problem = draw(2, 30, 40)
    hidden, weight = torch.randn(2, 30, 8), torch.randn(8, 40)
    grads = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = wrap(lambda h: loss_of(h @ weight, problem), leaf)
        assert loss.dtype == torch.float32
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(grads[0], grads[1])


def test_meta_tensors_have_shapes():
    problem = draw(2, 30, 40).to(torch.device("meta"))
    result = opd_loss(*problem.arguments(), backend="torch")
    assert result.loss.shape == () and result.gate.shape == (2, 30)


def test_threads():
    """Several threads at once, each with its own graph, give what one gives."""
    problem = draw(2, 60, 200, masked=0.2)
    z = problem.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(z, problem), z)
    results: list[torch.Tensor] = []

    def work():
        leaf = problem.logits.clone().requires_grad_()
        results.append(torch.autograd.grad(loss_of(leaf, problem), leaf)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(got, expected) for got in results)


def test_configurations_copy_and_pickle():
    gate = DriftGate("span", tau=0.5, aggregate="rms")
    assert copy.deepcopy(gate) == pickle.loads(pickle.dumps(gate)) == gate
    assert hash(gate) == hash(copy.copy(gate))
    with pytest.raises(AttributeError):
        gate.tau = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extra_memory(dtype):
    """Beyond inputs: in place a scratch block, else the gradient and that block."""
    problem = draw(4, 256, 4099, dtype=dtype)
    leaf = problem.logits.requires_grad_()
    scratch = 6 << 20
    for inplace, allowed in ((True, scratch), (False, leaf.nbytes + scratch)):
        logits = leaf * 1
        loss_of(logits.detach().requires_grad_(), problem)  # one-time set-up is not counted
        with peak_bytes() as memory:
            loss = loss_of(logits, problem, inplace_backward=inplace)
            (grad,) = torch.autograd.grad(loss, logits)
        assert memory.peak <= allowed
        assert grad.isfinite().all()


def test_extra_memory_does_not_grow_with_rows():
    peaks = []
    for rows in (256, 1024):
        problem = draw(1, rows, 4099, dtype=torch.bfloat16)
        logits = problem.logits.requires_grad_() * 1
        with peak_bytes() as memory:
            loss = loss_of(logits, problem, inplace_backward=True)
            torch.autograd.grad(loss, logits)
        peaks.append(memory.peak)
    row_data = 768 * 400  # bytes of [N] temporaries
    assert peaks[1] <= peaks[0] + row_data


def test_no_warnings():
    problem = draw(2, 30, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(problem.logits.requires_grad_(), problem).backward()
