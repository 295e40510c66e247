"""What only a device can show: no synchronisation, CUDA graphs, memory, real sizes.

The kernel tests run the same cases on the device, through their fixture.
"""

from __future__ import annotations

import pytest
import torch
from support.heads import FORMS, draw_head, run_head
from support.judge import assert_good, loss_and_grad
from support.problems import draw

from drift_gate import DriftGate, gate_weights, opd_loss
from drift_gate.measure import peak_bytes

pytestmark = pytest.mark.gpu


def step(problem, logits, **options):
    result = opd_loss(logits, *problem.arguments()[1:], **problem.options, **options)
    (grad,) = torch.autograd.grad(result.loss, logits)
    return result, grad


def cuda_problem(*shape, **options):
    problem = draw(*shape, **options).to(torch.device("cuda"))
    problem.logits.requires_grad_()
    return problem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [32_000, 50_257, 151_936])
def test_real_vocabularies(vocab, dtype):
    assert_good(draw(1, 130, vocab, dtype=dtype, masked=0.1), "triton", device="cuda")


def test_the_pytorch_backend_on_a_gpu():
    for gate in (DriftGate(aggregate="rms"), DriftGate("sequence", normalize="sequence")):
        assert_good(draw(3, 100, 500, masked=0.2), "torch", device="cuda", gate=gate)
    assert_good(draw(3, 100, 500).to(torch.float64), "torch", device="cuda")


def test_nothing_synchronises():
    problem = cuda_problem(2, 200, 1000, dtype=torch.bfloat16, masked=0.2)
    spans = torch.arange(400, device="cuda").view(2, 200) // 30
    for gate, extra in (
        (DriftGate(), {}),
        (DriftGate("span", normalize="sequence"), {"span_ids": spans}),
    ):
        step(problem, problem.logits, gate=gate, **extra)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(
                problem, problem.logits, gate=gate, return_entropy=True,
                reduction="seq-mean-token-mean", **extra,
            )  # fmt: skip
            gate_weights(problem.old_log_probs, problem.teacher_log_probs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inplace", [False, True])
def test_a_cuda_graph_replays_with_new_inputs(inplace):
    problem = cuda_problem(2, 300, 4000, dtype=torch.bfloat16, masked=0.1)
    source = problem.logits.detach().clone()
    work = source.clone().requires_grad_()

    def run():
        with torch.no_grad():
            work.copy_(source)
        return step(problem, work * 1, inplace_backward=inplace)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, grad = run()
    for seed in (1, 2):
        fresh = draw(2, 300, 4000, seed=seed, dtype=torch.bfloat16).to(torch.device("cuda"))
        source.copy_(fresh.logits)
        problem.old_log_probs.copy_(fresh.old_log_probs)
        graph.replay()
        problem.logits = source.clone()
        expected, expected_grad = loss_and_grad(problem, "triton")
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("chunk_size", [None, 64])
@pytest.mark.parametrize("form", FORMS)
def test_a_fused_head_waits_for_nothing_and_is_captured(form, chunk_size):
    """No row is left out, and blocks end where the host knows."""
    problem = draw_head(form, 2, 128, vocab=1000, width=64, dtype=torch.bfloat16, softcap=None)
    problem = problem.to(torch.device("cuda"))
    options = dict(chunk_size=chunk_size, ignore_index=None, gate=DriftGate(block_size=16))

    def run():
        return run_head(problem, "triton", **options)

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, grads = run()
    problem.hidden.copy_(problem.hidden.flip(0).clone())
    graph.replay()
    expected, truth = run()
    torch.testing.assert_close(result.loss, expected.loss)
    for grad, right in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, right)


def test_labels_outside_the_vocabulary_poison_the_loss_or_raise():
    problem = cuda_problem(2, 20, 50)
    problem.labels[0, 3] = 50
    assert opd_loss(*problem.arguments()).loss.isnan()
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 50\)"):
        opd_loss(*problem.arguments(), validate=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_extra_memory(inplace):
    problem = cuda_problem(1, 2048, 50_304, dtype=torch.bfloat16)
    logits = problem.logits * 1
    step(problem, logits.detach().requires_grad_(), inplace_backward=inplace)
    with peak_bytes("cuda") as memory:
        step(problem, logits, inplace_backward=inplace)
    allowed = 2048 * 200  # row data
    assert memory.peak <= allowed + (0 if inplace else logits.nbytes)


def test_more_than_2_to_the_31_elements():
    rows, vocab = 14_200, 151_936
    logits = torch.randn(1, rows, vocab, dtype=torch.bfloat16, device="cuda")
    labels = torch.randint(vocab, (1, rows), device="cuda")
    old = torch.full((1, rows), -12.0, device="cuda")
    logits.requires_grad_()
    result = opd_loss(logits, labels, old, old + 0.1)
    (grad,) = torch.autograd.grad(result.loss, logits)
    last = logits.detach()[0, -4:].float()
    expected = last.log_softmax(-1).gather(1, labels[0, -4:, None])[:, 0]
    torch.testing.assert_close(result.log_probs[0, -4:], expected, rtol=1e-5, atol=1e-4)
    total = grad[0, -4:].float().sum(-1)
    torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-6)


def test_compile_on_a_gpu():
    torch._dynamo.reset()
    problem = cuda_problem(2, 100, 500)
    compiled = torch.compile(
        lambda z: opd_loss(z * 1, *problem.arguments()[1:]).loss, fullgraph=True
    )
    (grad,) = torch.autograd.grad(compiled(problem.logits), problem.logits)
    _, expected = step(problem, problem.logits)
    torch.testing.assert_close(grad, expected)
