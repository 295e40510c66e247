"""Compare backends with the float64 reference on this machine: `drift-gate check`."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import eager
from .budget import share_of_budget
from .choices import BACKENDS
from .gate import DriftGate
from .losses.opd import opd_loss
from .measure import device_name, peak_bytes, quartiles, seconds
from .outputs import LossOutput
from .passes import native
from .passes.backends import HAS_TRITON
from .spans import newline_spans

LENGTHS = [50, 1, 77]  # rows of the packed sequences: less than a block, one, a block and a part
ROWS = sum(LENGTHS)
LARGE, SMALL = 50_257, 8_209  # words
ROUNDS = 3
ROUTES = tuple(name for name in BACKENDS if name not in ("auto", "reference"))
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
class Yardstick:
    """What every backend's results on a problem are held to."""

    same: LossOutput  # the reference in the problem's dtype,
    same_grad: Tensor
    truth: LossOutput  # and in float64
    true_grad: Tensor
    memory: int
    """Peak of live bytes of the eager loss, beyond the inputs."""
    seconds: float
    """Of the eager loss and its gradient, the median of ROUNDS."""


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
    fast = HAS_TRITON if device.type == "cuda" else native.instruction_set() is not None
    first = "triton" if device.type == "cuda" else "native"
    return [first, "torch"] if fast else ["torch"]


def absent_on(device: torch.device) -> dict[str, str]:
    """Backends that cannot run there, and why."""
    found = {}
    if device.type == "cuda" and not HAS_TRITON:
        found["triton"] = "the package triton is not installed"
    if device.type == "cpu":
        if native.instruction_set() is None:
            found["native"] = "there was no C compiler at the installation"
        found["triton"] = "needs a GPU, and torch sees none"
        if torch.cuda.is_available():
            del found["triton"]
    return found


def route(backend: str, device: torch.device) -> str:
    """A backend on a device, in words."""
    how = {
        "triton": "Triton kernels",
        "native": f"functions in C, compiled for {native.instruction_set()}",
        "torch": "plain PyTorch",
    }
    return f"{backend} ({how[backend]}) on {device_name(device)}"


def problems(device: torch.device, seed: int) -> Iterator[Problem]:
    """Every dtype. One of GPT-2's vocabulary, the rest of a few tiles and a part: both are odd, so
    that rows start unaligned. The small ones on one thread: more would wait for one another."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    yield _draw("plain", LARGE, bf16, device, seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _draw("plain", SMALL, fp16, device, seed + 1)
        yield _draw("plain", SMALL, fp32, device, seed + 2)
        yield _draw("in place", SMALL, bf16, device, seed + 3, inplace_backward=True)
        yield _draw("in place", SMALL, fp32, device, seed + 4, inplace_backward=True)
        yield _draw("masked", SMALL, bf16, device, seed + 5, masked=0.3)
        yield _draw("packed", SMALL, bf16, device, seed + 6, cu_seqlens=True)
        yield _draw("span gate", SMALL, fp16, device, seed + 7, spans=True)
    finally:
        torch.set_num_threads(threads)


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


def yardstick(problem: Problem) -> Yardstick:
    """Run the reference, in two dtypes, and the eager loss."""
    logits = problem.logits
    same = _run(problem, logits, "reference")
    truth = _run(problem, logits.double(), "reference")

    def run() -> Tensor:
        leaf = logits.detach().requires_grad_()
        return _gradient(eager.loss(leaf, *problem.eager_rows), leaf)

    return Yardstick(*same, *truth, _peak(run, logits.device), _seconds(run, logits.device))


def check(problem: Problem, beside: Yardstick, backend: str) -> Result:
    """Run one problem on one backend, and time it beside the eager loss.

    Raises whatever the backend raises.
    """
    logits, device = problem.logits, problem.logits.device
    got, grad = _run(problem, logits.clone(), backend)
    losses, eager_losses, true_losses = map(_losses, (got, beside.same, beside.truth))
    loss_error = float(share_of_budget(losses, eager_losses, true_losses).max())
    grad_error = float(share_of_budget(grad, beside.same_grad, beside.true_grad).max())
    del got, grad
    work = logits.clone()

    def run() -> Tensor:
        return _run(problem, work, backend)[1]

    def restore() -> None:
        work.copy_(logits)  # a backward in place left its gradient there

    memory, took = _peak(run, device), _seconds(run, device, restore)
    return Result(
        problem.name,
        logits.dtype,
        loss_error,
        grad_error,
        memory,
        memory / beside.memory,
        took / beside.seconds,
    )


def _peak(run: Callable[[], Tensor], device: torch.device) -> int:
    """Peak of live bytes in a run; what it returns, the gradient, counts."""
    with peak_bytes(device) as measured:
        kept = run()
    del kept
    return measured.peak


def _seconds(
    run: Callable[[], Tensor], device: torch.device, before: Callable[[], None] = lambda: None
) -> float:
    """Median of ROUNDS runs, each after a call of `before`."""
    found = []
    for _ in range(ROUNDS):
        before()
        found.append(seconds(run, device))
    return quartiles(found)[1]


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
