"""One problem, run forward and backward on a backend, in its own dtype or in float64."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call.logits import overlaps
from ..head import sparse, sums
from ..outputs import LossOutput
from ..passes import native
from ..passes.native import library
from ..passes.torch import vocabulary
from .choices import Choices, Pick
from .functions import FUNCTIONS, Function
from .options import Arguments
from .shapes import VOCABS
from .tensors import of_inference, replaced, tensors

LOSS_SCALE = 1024.0  # as trainers in float16 scale, to keep gradients out of its subnormals
LONGEST_LIST = 65  # kernels compile for the length of the lists
Results = dict[str, Tensor]


class Problem(NamedTuple):
    """A function with all its arguments."""

    name: str
    backend: str
    choices: Choices
    arguments: Arguments
    leaves: tuple[str, ...]
    storages: Mapping[str, Tensor]
    valid: Tensor | None
    upstream: str
    beside: bool
    """Whether another loss reaches the leaves in the same backward."""
    refused: bool
    """Whether `inplace_backward` was drawn beside logits that overlap themselves: the arguments are
    those without it."""
    machine: dict[str, Any]
    """How the backend is set up: threads, chunks, tiles."""

    @property
    def function(self) -> Function:
        return FUNCTIONS[self.name]

    def saved(self) -> dict[str, Any]:
        """What a file holds beside the backend: enough to build the problem again."""
        taken = {name: x for name, x in self.choices.taken.items() if name != "backend"}
        return {"function": self.name, **taken}


def build(name: str, pick: Pick, backends: Sequence[str], device: torch.device) -> Problem:
    """The problem of these choices, for one of the backends."""
    choose = Choices(pick, device)
    backend = choose("backend", backends)
    choose.wide = backend == "torch"
    choose.interpreted = is_interpreted(backend, device)
    choose.longest = LONGEST_LIST if backend == "triton" else VOCABS[-1]
    function = FUNCTIONS[name]
    machine = _draw_machine(choose, backend)
    student = function.student(choose)
    arguments, valid, storages = function.rest(choose, student)
    upstream = choose("upstream", ("loss", "tokens", "both"))
    # In a shorter dtype the sum is rounded once more, which is no fault of the loss.
    beside = bool(student.leaves) and student.dtype.itemsize >= 4 and choose.flag("a loss beside")
    refused = arguments.get("inplace_backward", False) and overlaps(arguments["logits"])
    if refused:
        arguments["inplace_backward"] = False
    memory = {**student.storages, **storages}
    if choose.flag("tensors of inference mode"):
        arguments, memory = of_inference(arguments, memory, student.leaves)
    return Problem(
        name,
        backend,
        choose,
        arguments,
        student.leaves,
        memory,
        valid,
        upstream,
        beside,
        refused,
        machine,
    )


def is_interpreted(backend: str, device: torch.device) -> bool:
    return backend == "triton" and device.type == "cpu"


def _draw_machine(choose: Choices, backend: str) -> dict[str, Any]:
    """Small chunks and tiles bring their borders into small problems."""
    if backend == "triton":
        return {
            "tiles": choose("tiles", ("as shipped", "small")),
            "programs": choose("programs", (1, 9)),
        }
    words = choose("words per thread", (1 << 18, 64, 1))
    threads = choose("threads", (1, 1, 1, 1, 1, 1, 2, 3))
    return {"threads": threads, "words": words, "native": backend == "native"}


# What a thread takes at a time, and less than which is not shared; and what decides how lists go.
WORDS = (
    (vocabulary, "CPU_WORDS"),
    (library, "MOST_WORDS"),
    (library, "FEW_WORDS"),
    (sums, "PRODUCT_WORDS"),
    (sums, "SLAB_WORDS"),
    (sparse, "WORDS_OF_AN_ENTRY"),
)


@contextlib.contextmanager
def set_up(machine: Mapping[str, Any]) -> Iterator[None]:
    """Threads, chunks and tiles as the problem has them."""
    if "tiles" in machine:
        from .tiles import small_tiles

        with small_tiles(machine["programs"], small=machine["tiles"] == "small"):
            yield
        return
    threads, enabled = torch.get_num_threads(), native.enabled
    before = [getattr(module, name) for module, name in WORDS]
    torch.set_num_threads(machine["threads"])
    for module, name in WORDS:
        setattr(module, name, min(getattr(module, name), machine["words"]))
    native.enabled = enabled and machine["native"]  # for functions that choose by themselves
    try:
        yield
    finally:
        for (module, name), words in zip(WORDS, before, strict=True):
            setattr(module, name, words)
        native.enabled = enabled
        torch.set_num_threads(threads)


def run_backend(problem: Problem) -> tuple[Results, bool]:
    """Results of its backend, and whether in place the gradient lies where the logits were."""
    arguments = dict(problem.arguments)
    inplace = arguments.get("inplace_backward", False)
    if problem.refused:
        _check_refused(problem)
    given, leaves = tensors(arguments), {}
    for name in problem.leaves:
        leaf = given[name]
        if inplace:
            storage = problem.storages[name].clone()
            leaf = storage.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
        leaves[name] = leaf.detach().requires_grad_()
    arguments = replaced(arguments, leaves)
    if problem.function.reference is None:
        arguments["backend"] = problem.backend
    with set_up(problem.machine):
        results, gradients = _forward_backward(problem, problem.function.call, arguments, leaves)
    in_place = True
    if inplace and gradients:
        (name,) = problem.leaves
        found = gradients[f"grad {name}"]  # with a loss beside, a sum that lies elsewhere
        in_place = problem.beside or found.data_ptr() == leaves[name].data_ptr()
        margin = _margin_bits(storage, leaves[name])
        original = _margin_bits(problem.storages[name], problem.arguments[name])
        in_place &= torch.equal(margin, original)
    return results | gradients, in_place


def _check_refused(problem: Problem) -> None:
    """Raise AssertionError unless rows that share memory are not to be overwritten."""
    arguments = problem.arguments | {"inplace_backward": True, "backend": problem.backend}
    try:
        problem.function.call(**arguments)
    except ValueError as error:
        if str(error).startswith("inplace_backward needs "):
            return
        raise
    raise AssertionError("a gradient would be written over logits that overlap themselves")


def _margin_bits(storage: Tensor, view: Tensor) -> Tensor:
    """The storage with 0 in the view's elements, as integers."""
    margin = storage.detach().clone()
    margin.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return bits(margin)


def bits(x: Tensor) -> Tensor:
    """A tensor that is equal where the bits are."""
    if not x.is_floating_point():
        return x
    return (
        x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])
    )


def run_reference(
    problem: Problem,
    dtype: torch.dtype | None,
    change: Callable[[str, Tensor], Tensor] = lambda name, x: x,
) -> Results:
    """Results of the eager reference, in its own dtype or in float64 after a change of inputs."""
    given = tensors(problem.arguments)
    if dtype is not None:
        floating = {name: x for name, x in given.items() if x.is_floating_point()}
        for name, x in floating.items():  # of windows `to` makes columns
            given[name] = change(name, x.to(dtype, memory_format=torch.contiguous_format))
    leaves = {name: given[name].detach().requires_grad_() for name in problem.leaves}
    arguments = replaced(problem.arguments, given | leaves)
    call = problem.function.reference
    if call is None:
        call, arguments["backend"] = problem.function.call, "reference"
    results, gradients = _forward_backward(problem, call, arguments, leaves)
    return results | gradients


def _forward_backward(
    problem: Problem, call: Callable[..., Any], arguments: Arguments, leaves: dict[str, Tensor]
) -> tuple[Results, Results]:
    results, objective = outputs_of(call(**arguments), problem.upstream, problem.choices)
    if objective is None or not objective.requires_grad:
        return results, {}
    if problem.beside:
        objective = objective + _loss_beside(problem, leaves)
    gradients = torch.autograd.grad(objective, list(leaves.values()))
    return results, {f"grad {name}": g for name, g in zip(leaves, gradients, strict=True)}


def _loss_beside(problem: Problem, leaves: Mapping[str, Tensor]) -> Tensor:
    """A sum with random weights, none of them in rows that are not valid."""
    total = torch.zeros((), device=problem.choices.device)
    for leaf in leaves.values():
        kept = leaf
        if problem.valid is not None and leaf.shape[:-1] == problem.valid.shape:
            kept = leaf[problem.valid.to(leaf.device)]
        total = total + _weighed(kept, problem.choices)
    return total


def outputs_of(out: Any, upstream: str, choices: Choices) -> tuple[Results, Tensor | None]:
    """Outputs by name, detached, and a scalar that depends on all that are differentiable."""
    named: dict[str, Any]
    metrics: dict[str, Tensor] = {}
    if isinstance(out, Tensor):
        named = {"result": out}
    elif hasattr(out, "_asdict"):
        named = out._asdict()
        metrics = named.pop("metrics", {})
    else:
        named = {str(i): x for i, x in enumerate(out)}
    objective = None
    if isinstance(out, LossOutput):
        if upstream != "tokens":
            objective = out.loss.sum() * LOSS_SCALE
        if upstream != "loss":
            tokens = _weighed(out.token_loss, choices) * LOSS_SCALE
            objective = tokens if objective is None else objective + tokens
    else:
        carrying = [x for x in named.values() if x is not None and x.requires_grad]
        first = {"loss": slice(1), "tokens": slice(1, None), "both": slice(None)}[upstream]
        for x in carrying[first] or carrying:
            share = _weighed(x, choices) * LOSS_SCALE
            objective = share if objective is None else objective + share
    results = {name: x.detach() for name, x in named.items() if x is not None}
    return results | {f"metric {name}": x.detach() for name, x in metrics.items()}, objective


def _weighed(x: Tensor, choices: Choices) -> Tensor:
    """A sum with random weights, some of them 0, the same for every run."""
    choices.generator.manual_seed(choices.taken.get("seed", 0) + x.numel())
    weights = torch.randn(x.shape, generator=choices.generator)
    weights[torch.rand(x.shape, generator=choices.generator) < 0.2] = 0
    return (x * weights.to(x.device)).sum()
