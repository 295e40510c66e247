"""Compare a backend with the float64 reference on this machine: `drift-gate check`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .backends import has_triton
from .bench import eager
from .bench.measure import peak_bytes, quartiles, seconds
from .budget import share_of_budget
from .gate import DriftGate
from .losses import opd_loss
from .outputs import LossOutput
from .spans import newline_spans

LENGTHS = [50, 1, 205]  # rows of the packed sequences: less than a block, one, several blocks
ROWS = sum(LENGTHS)
ROUNDS = 3
LOSS_SCALE = 1024.0  # as trainers in float16 scale, to keep gradients out of its subnormals


@dataclasses.dataclass
class Problem:
    """Arguments of `opd_loss`, N rows, and of the eager loss in its place."""

    name: str
    logits: Tensor  # [N, V]
    rows: tuple[Tensor, Tensor, Tensor]  # labels, old and teacher log-probs, [N] each
    options: dict[str, Any]
    eager_rows: tuple[Tensor, ...]  # labels, old, teacher, mask, blocks


@dataclasses.dataclass
class Result:
    """One line of the table. Errors are fractions of what the budget allows."""

    problem: str
    dtype: torch.dtype
    loss_error: float
    grad_error: float
    memory: int
    """Peak of live bytes beyond the inputs, the gradient included."""
    memory_ratio: float
    time_ratio: float

    @property
    def passed(self) -> bool:
        return self.loss_error <= 1 and self.grad_error <= 1  # not so where one is NaN


def backends_on(device: torch.device) -> list[str]:
    """Backends that can run there, the one that "auto" takes first."""
    return ["triton", "torch"] if device.type == "cuda" and has_triton() else ["torch"]


def problems(device: torch.device, seed: int) -> Iterator[Problem]:
    """Every dtype; 50,257 words (GPT-2's: odd, so that rows start unaligned) and 32,768."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield _draw("plain", 50257, bf16, device, seed)
    yield _draw("plain", 50257, fp16, device, seed + 1)
    yield _draw("plain", 50257, fp32, device, seed + 2)
    yield _draw("in place", 50257, bf16, device, seed + 3, inplace_backward=True)
    yield _draw("in place", 32768, fp32, device, seed + 4, inplace_backward=True)
    yield _draw("masked", 50257, bf16, device, seed + 5, masked=0.3)
    yield _draw("packed", 32768, bf16, device, seed + 6, cu_seqlens=True)
    yield _draw("span gate", 32768, fp16, device, seed + 7, spans=True)


def _draw(
    name: str,
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    masked: float = 0.0,
    cu_seqlens: bool = False,
    spans: bool = False,
    **options: Any,
) -> Problem:
    """Rows like a model's: one word takes much of the mass; labels sampled, the old policy near."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROWS, vocab, generator=draw)
    winner = torch.randint(vocab, (ROWS, 1), generator=draw)
    logits.scatter_add_(-1, winner, 16 * torch.rand(ROWS, 1, generator=draw))
    logits = logits.to(dtype)
    log_p = logits.float().log_softmax(-1)
    labels = log_p.exp().multinomial(1, generator=draw)[:, 0]
    now = log_p.gather(-1, labels[:, None])[:, 0]
    old = now + 0.3 * torch.randn(ROWS, generator=draw)
    teacher = now + torch.randn(ROWS, generator=draw)
    mask = torch.rand(ROWS, generator=draw) >= masked
    mask[0] = True  # blocks count from the first valid row

    gate = DriftGate()
    blocks = eager.block_numbers(LENGTHS if cu_seqlens else [ROWS], gate.block_size)
    if masked:
        options["response_mask"] = mask.to(device)
    if cu_seqlens:
        options["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).to(device)
    if spans:
        newlines = torch.rand(ROWS, generator=draw) < 0.1
        blocks = newline_spans(newlines.long(), 1, min_length=4, max_length=32)
        options["span_ids"] = blocks.to(device)
        gate = DriftGate(granularity="span")
    rows = labels.to(device), old.to(device), teacher.to(device)
    eager_rows = (*rows, mask.float().to(device), blocks.to(device))
    return Problem(name, logits.to(device), rows, {"gate": gate, **options}, eager_rows)


def check(problem: Problem, backend: str) -> Result:
    """Run one problem on one backend, beside the reference and the eager loss.

    Raises whatever the backend raises.
    """
    logits, device = problem.logits, problem.logits.device
    got, grad = _run(problem, logits.clone(), backend)
    same, same_grad = _run(problem, logits, "reference")
    truth, true_grad = _run(problem, logits.double(), "reference")
    loss_error = float(share_of_budget(_losses(got), _losses(same), _losses(truth)).max())
    grad_error = float(share_of_budget(grad, same_grad, true_grad).max())
    del got, grad, same, same_grad, truth, true_grad

    work = logits.clone()

    def run_eager() -> Tensor:
        leaf = work.requires_grad_()
        return _gradient(eager.loss(leaf, *problem.eager_rows), leaf)

    def run_backend() -> Tensor:
        return _run(problem, work, backend)[1]

    memory, ratios = [], []
    for run in (run_backend, run_eager):
        with peak_bytes(device) as measured:
            kept = run()  # the gradient counts
        memory.append(measured.peak)
        del kept
    for _ in range(ROUNDS):
        work = logits.clone()
        baseline = seconds(run_eager, device)
        ratios.append(seconds(run_backend, device) / baseline)
    ratio = memory[0] / memory[1]
    return Result(
        problem.name, logits.dtype, loss_error, grad_error, memory[0], ratio, quartiles(ratios)[1]
    )


def _losses(out: LossOutput) -> Tensor:
    """Every token's loss, and their mean, which is no more wrong than the worst of them."""
    return torch.cat([out.token_loss.detach(), out.loss.detach()[None]])


def _run(problem: Problem, logits: Tensor, backend: str) -> tuple[LossOutput, Tensor]:
    """Loss, and its scaled gradient in the logits, which lose their values where asked for."""
    leaf = logits.detach().requires_grad_()
    labels, old, teacher = (
        x.to(logits.dtype) if x.is_floating_point() and logits.dtype == torch.float64 else x
        for x in problem.rows
    )
    out = opd_loss(leaf, labels, old, teacher, **problem.options, backend=backend)
    return out, _gradient(out.loss, leaf)


def _gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, LOSS_SCALE))
    return grad
