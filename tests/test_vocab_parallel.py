"""Vocabularies over ranks (gloo): shards of the words have the results of whole rows."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.parts import VOCAB, Whole, draw_whole, run_part
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.library import opcheck

import drift_gate as dg
from drift_gate.call.op import Op, flatten
from drift_gate.head import sparse

pytestmark = pytest.mark.xdist_group("shards")  # one worker: processes are started once
GATE = dg.DriftGate(block_size=4)
HEAD = (
    "softcap",
    "logit_scale",
    "chunk_size",
    "logits_dtype",
)  # of the options: the rest is the loss's
OUTSIDE = {"support": "truncated", "zero_outside_topk": True, "direction": "mixed"}
CASES: dict[str, tuple[str, bool, Any, dict[str, Any]]] = {
    f"{form}{', linear' * linear}": (form, linear, GATE, {"return_entropy": True})
    for form, linear in itertools.product(("opd", "topk"), (False, True))
}
CASES |= {
    f"{direction}, {support}{', linear' * linear}": (
        "topk", linear, GATE, {"direction": direction, "support": support},
    )
    for (direction, support), linear in itertools.product(
        [("forward", "truncated"), ("jsd", "tail"), ("reverse", "tail")], (False, True)
    )
}  # fmt: skip
CASES |= {
    "k3": ("opd", False, None, {"estimator": "k3", "temperature": 0.7}),
    "per token": ("opd", True, GATE, {"reduction": "none"}),
    "capped": ("opd", True, GATE, {"softcap": 3.0, "logit_scale": 0.5, "chunk_size": 70}),
    "capped, sparse": ("topk", True, None, {"softcap": 3.0, "logit_scale": 0.5}),
    "capped, word by word": ("topk", True, None, {"softcap": 3.0, "by_word": True}),
    "none outside": ("topk", False, GATE, OUTSIDE),
    "none outside, linear": ("topk", True, GATE, OUTSIDE | {"chunk_size": 7}),
    "none outside, per token": ("topk", True, GATE, OUTSIDE | {"reduction": "none"}),
    "listed words alone": ("topk", False, None, {"without": "labels"}),
    "listed words alone, linear": ("topk", True, None, {"without": "labels"}),
    "sequences": ("opd", True, dg.DriftGate("sequence"), {"chunk_size": 5}),
    "in place": ("opd", False, GATE, {"inplace_backward": True}),
}


def run(whole: Whole, case: str, weight: Tensor, bias: Tensor, **extra: Any) -> dict[str, Tensor]:
    """A loss of the head that is given; and the gradients of hidden states, weight and bias."""
    form, linear, gate, options = CASES[case]
    options = {**options, **extra}
    leaves = [x.detach().clone().requires_grad_() for x in (whole.hidden, weight, bias)]
    hidden, weight, bias = leaves
    if linear:
        head = {name: options.pop(name) for name in HEAD if name in options}
        student = (hidden, dg.Head(weight, bias, **head))
    else:  # in place needs logits that are no leaf
        student = (hidden @ weight.T + bias,)
    rows = [whole.labels, whole.old]
    if options.pop("without", None):
        rows = [None, None]
    teacher = (whole.teacher,) if form == "opd" else (whole.ids, whole.log_q)
    function = getattr(dg, f"{'linear_' * linear}{form}_loss")
    by_word = mock.patch.object(sparse, "products_are_faster", return_value=False)
    with by_word if options.pop("by_word", False) else contextlib.nullcontext():
        result = function(*student, *rows, *teacher, gate=gate, response_mask=whole.mask, **options)
        grads = torch.autograd.grad(result.loss.sum(), leaves)
    if not linear and extra:  # the product with the hidden states is the caller's, and so its sum
        dist.all_reduce(grads[0])
    names = "loss", "token_loss", "log_probs", "gate", "entropy"
    outputs = {name: getattr(result, name) for name in names}
    outputs |= {f"metric {name}": value for name, value in result.metrics.items()}
    grads = dict(zip(("hidden", "weight", "bias"), grads, strict=True))
    found = {**outputs, **grads}
    return {name: value.detach() for name, value in found.items() if value is not None}


def problem(seed: int = 0) -> tuple[Whole, Tensor]:
    whole = draw_whole(seed, batch=8)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    whole.ids[1, :, 1] = -1  # a missing entry
    return whole, bias


def words(x: Tensor, rank: int, ranks: int) -> Tensor:
    """The words of a rank: 19 and 18, or 10, 9, 9 and 9."""
    return x.tensor_split(ranks)[rank]


def losses(rank: int, ranks: int) -> dict[str, dict[str, Tensor]]:
    whole, bias = problem()
    head = words(whole.weight, rank, ranks), words(bias, rank, ranks)
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    return {case: run(whole, case, *head, parallel=parallel) for case in CASES}


def functions_of(
    whole: Whole, weight: Tensor, bias: Tensor, rows: Tensor, **extra: Any
) -> dict[str, Tensor]:
    """`token_log_probs`, `gather_lse` and their linear forms, rows of the logits edited."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (whole.hidden, weight))
    logits = torch.where(rows, -torch.inf, hidden @ weight.T + bias)
    found = {}
    for name, student in (("", (logits,)), ("linear_", (hidden, dg.Head(weight, bias)))):
        log_probs, entropy = getattr(dg, f"{name}token_log_probs")(
            *student, whole.labels, return_entropy=True, **extra
        )
        z, lse = getattr(dg, f"{name}gather_lse")(*student, whole.ids.clamp(min=0), **extra)
        value = log_probs.sum() + (z * lse[..., None]).exp().clamp(max=9).sum()
        grads = torch.autograd.grad(value, (hidden, weight), retain_graph=True)
        if not name and extra:
            dist.all_reduce(grads[0])
        parts = dict(log_probs=log_probs, entropy=entropy, z=z, lse=lse, of_hidden=grads[0])
        parts |= lists_of(name, student, whole.mask, **extra)
        found |= {name + key: x.detach() for key, x in parts.items()}
        found[name + "of_weight"] = grads[1]
    return found


def lists_of(name: str, student: tuple, mask: Tensor, **extra: Any) -> dict[str, Tensor]:
    """Lists of more words than a shard has, and than there are; and of logits with equal ones, with
    a NaN, and without any mass."""
    function = getattr(dg, f"{name}top_k_log_probs")
    lists = {k: function(*student, k, response_mask=mask, **extra) for k in (1, 23, VOCAB + 2)}
    if not name:
        rounded = student[0].detach().round()
        rounded[1] = -torch.inf
        rounded[2, :, 0] = torch.nan
        lists["rounded"] = function(rounded, 9, temperature=0.5, **extra)
    return {f"{k} {part}": x for k, y in lists.items() for part, x in y._asdict().items()}


def excluded(whole: Whole) -> Tensor:
    """Words without mass: all of the first shard's, of the rows of which none is listed there."""
    of_rows = (whole.labels >= 19) & (whole.ids.clamp(min=0) >= 19).all(-1)
    assert of_rows.any()
    return of_rows[..., None] & (torch.arange(VOCAB) < 19)


def functions(rank: int, ranks: int) -> dict[str, Tensor]:
    whole, bias = problem(1)
    rows = excluded(whole).tensor_split(ranks, -1)[rank]
    head = words(whole.weight, rank, ranks), words(bias, rank, ranks)
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    return functions_of(whole, *head, rows, parallel=parallel)


def float32_logits(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Log-probs of a head in bfloat16, and the gradient of this rank's words."""
    whole, bias = problem(1)
    weight = words(whole.weight, rank, ranks).bfloat16().requires_grad_()
    head = dg.Head(weight, words(bias, rank, ranks).float(), logits_dtype=torch.float32)
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    found, _ = dg.linear_token_log_probs(
        whole.hidden.bfloat16(), head, whole.labels, parallel=parallel
    )
    (gradient,) = torch.autograd.grad(found.sum(), weight)
    return found.detach(), gradient


def with_rows_over_ranks(rank: int, ranks: int) -> dict[str, Tensor]:
    """Two shards of the words times two of the rows."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("rows", "words"))
    whole, bias = problem()
    part = whole.take(lambda x: x.tensor_split(2)[mesh.get_local_rank("rows")])
    at = mesh.get_local_rank("words"), ranks // 2
    both = dg.Parallel(mesh.get_group("rows"), vocab_parallel_group=mesh.get_group("words"))
    return run(part, "opd, linear", words(whole.weight, *at), words(bias, *at), parallel=both)


def dtensors(rank: int, ranks: int) -> dict[str, Any]:
    """Logits sharded over their words and a sharded head beside replicated hidden states."""
    whole, bias = problem()
    mesh = init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(whole.weight, mesh, [Shard(0)]).requires_grad_()
    shift = distribute_tensor(bias, mesh, [Shard(0)])
    hidden = distribute_tensor(whole.hidden, mesh, [Replicate()]).requires_grad_()
    options = {"gate": GATE, "response_mask": whole.mask}
    rest = whole.labels, whole.old, whole.teacher
    found: dict[str, Any] = {}
    result = dg.linear_opd_loss(hidden, dg.Head(weight, shift), *rest, **options)
    grads = torch.autograd.grad(result.loss, (hidden, weight))
    assert grads[1].placements == (Shard(0),)
    found["head"] = [result.loss.detach(), *(x.full_tensor() for x in grads)]
    logits = torch.nn.functional.linear(hidden, weight, shift)
    assert isinstance(logits, DTensor) and logits.placements == (Shard(2),)
    result = dg.opd_loss(logits, *rest, **options)
    grads = torch.autograd.grad(result.loss, (hidden, weight))
    found["logits"] = [result.loss.detach(), *(x.full_tensor() for x in grads)]
    partial = DTensor.from_local(torch.zeros(8, 12, 3), mesh, [torch.distributed.tensor.Partial()])
    with pytest.raises(ValueError, match="logits must be sharded or replicated"):
        dg.opd_loss(partial, *rest, **options)
    return found


def two_vocabularies(rank: int, ranks: int) -> list[Tensor]:
    """In turn on one group; this rank's shards may be of one size where the others' are not."""
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    found = []
    for vocab in (10, 9, 10, 9):
        logits, labels = drawn(vocab)
        shard = logits.tensor_split(ranks, -1)[rank]
        found.append(dg.token_log_probs(shard, labels, parallel=parallel)[0])
    return found


def drawn(vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(2, 15, vocab, generator=generator, dtype=torch.float64)
    return logits, torch.arange(30).view(2, 15) % vocab


def troubles(rank: int, ranks: int) -> list[str]:
    whole, _ = problem()
    weight = words(whole.weight, rank, ranks)
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    said = []

    def attempt(part: Whole, **options: Any) -> None:
        with pytest.raises((ValueError, RuntimeError)) as error:
            run_part(part, "opd", True, weight, GATE, parallel=parallel, **options)
        said.append(str(error.value))

    attempt(whole.take(lambda x: x[: len(x) - rank]))
    attempt(whole, temperature=1.0 + rank)
    attempt(whole, backend="reference")
    bad = whole.take(lambda x: x)
    bad.labels = bad.labels + VOCAB
    attempt(bad)
    attempt(whole, clip=dg.Clip(high=0.2 + rank))
    return said


def counted_bytes(rank: int, ranks: int) -> tuple[int, int]:
    """What the all-reduces of the top-K loss send, and N K."""
    sent, original = [], dist.all_reduce

    def counting(x: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(x.numel() * x.element_size())
        return original(x, *arguments, **options)

    dist.all_reduce = counting
    whole, _ = problem()
    weight = words(whole.weight, rank, ranks).clone().requires_grad_()
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    run_part(whole, "topk", False, weight, GATE, parallel=parallel)[0].loss.backward()
    dist.all_reduce = original
    return sum(sent), whole.labels.numel()


def opchecks(rank: int, ranks: int) -> int:
    """The ops of the losses over shards, as torch.compile calls them; how many there were."""
    whole, bias = problem()
    calls: list[tuple[Op, Any]] = []

    def record(op: Op, x: Any) -> Any:
        calls.append((op, x))
        return call(op, x)

    head = words(whole.weight, rank, ranks), words(bias, rank, ranks)
    parallel = dg.Parallel(vocab_parallel_group=dist.group.WORLD)
    with pytest.MonkeyPatch.context() as patch:
        call = Op.__call__
        patch.setattr(Op, "__call__", record)
        for case in ("opd", "topk, linear", "jsd, tail", "opd, linear"):
            run(whole, case, *head, parallel=parallel)
        functions(rank, ranks)
    for op, x in calls:
        utils = "test_schema", "test_autograd_registration", "test_faketensor"
        opcheck(op.library, tuple(flatten(x)), test_utils=utils)
    return len({op.name for op, _ in calls})


def all_works(rank: int, ranks: int) -> dict[str, Any]:
    works: list[Callable[..., Any]] = [losses, functions, float32_logits, two_vocabularies]
    works += [dtensors, troubles, counted_bytes, opchecks] if ranks == 2 else [with_rows_over_ranks]
    return {work.__name__: work(rank, ranks) for work in works}


@functools.cache
def run_all(ranks: int) -> list[dict[str, Any]]:
    """What every rank has to say: processes are slow to start, so all works share theirs."""
    return run_ranks(ranks, all_works, ranks)


def of_ranks(ranks: int, work: Callable[..., Any]) -> list[Any]:
    return [found[work.__name__] for found in run_all(ranks)]


SHARDED = ("weight", "bias", "of_weight", "linear_of_weight")


def assert_same(every: list[dict[str, Tensor]], wanted: dict[str, Tensor], what: str) -> None:
    """Every rank has the whole, and of the head its part."""
    for rank, found in enumerate(every):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            value = words(value, rank, len(every)) if name in SHARDED else value
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=1e-12, equal_nan=True,
                msg=lambda m, name=name: f"{what}, {name}: {m}",
            )  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_of_shards(ranks: int):
    whole, bias = problem()
    every = of_ranks(ranks, losses)
    for case in CASES:
        assert_same([x[case] for x in every], run(whole, case, whole.weight, bias), case)


@pytest.mark.parametrize("ranks", [2, 4])
def test_log_probs_and_logsumexp_of_shards(ranks: int):
    """A shard whose words have no mass at all has no say."""
    whole, bias = problem(1)
    wanted = functions_of(whole, whole.weight, bias, excluded(whole))
    assert_same(of_ranks(ranks, functions), wanted, "functions")


@pytest.mark.parametrize("ranks", [2, 4])
def test_float32_logits_of_shards(ranks: int):
    whole, bias = problem(1)
    weight = whole.weight.bfloat16().double().requires_grad_()
    logits = whole.hidden.bfloat16().double() @ weight.T + bias.float()
    truth = logits.log_softmax(-1).gather(-1, whole.labels[..., None])[..., 0]
    (gradient,) = torch.autograd.grad(truth.sum(), weight)
    for rank, (found, of_words) in enumerate(of_ranks(ranks, float32_logits)):
        torch.testing.assert_close(found.double(), truth.detach(), rtol=0, atol=3e-6)
        wanted = words(gradient, rank, ranks)
        assert (of_words.double() - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_vocabularies_on_one_group(ranks: int):
    """10 and 9 words over four ranks: 3, 3, 2, 2 and 3, 2, 2, 2."""
    for found in of_ranks(ranks, two_vocabularies):
        for vocab, got in zip((10, 9, 10, 9), found, strict=True):
            logits, labels = drawn(vocab)
            wanted = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            torch.testing.assert_close(got, wanted)


def test_rows_and_words_over_ranks():
    whole, bias = problem()
    wanted = run(whole, "opd, linear", whole.weight, bias)
    every = of_ranks(4, with_rows_over_ranks)  # ranks 0, 1 have the first rows, 2, 3 the others
    torch.testing.assert_close(every[0]["loss"] + every[2]["loss"], wanted["loss"])
    for at in (0, 1):
        for name in ("weight", "bias"):
            both = every[at][name] + every[at + 2][name]
            torch.testing.assert_close(both, words(wanted[name], at, 2), rtol=1e-10, atol=1e-13)
    hidden = torch.cat([every[0]["hidden"], every[2]["hidden"]])
    torch.testing.assert_close(hidden, wanted["hidden"], rtol=1e-10, atol=1e-13)


def test_dtensors():
    whole, bias = problem()
    found = run(whole, "opd, linear", whole.weight, bias)
    wanted = [found[name] for name in ("loss", "hidden", "weight")]
    for every in of_ranks(2, dtensors):
        for way in ("head", "logits"):
            torch.testing.assert_close(every[way], wanted, rtol=1e-10, atol=1e-13)


def test_ranks_that_disagree():
    for said in of_ranks(2, troubles):
        assert "vocab_parallel_group: ranks 0 and 1 disagree about the shape of labels" in said[0]
        assert "[8, 12] and [7, 12]" in said[0]
        assert "disagree about temperature: 1.0 and 2.0" in said[1]
        assert 'backend "reference" takes whole rows' in said[2]
        assert "labels must lie in [0, 37)" in said[3]
        assert "disagree about high: 0.2 and 1.2" in said[4]


def test_the_ops_pass_opcheck():
    assert of_ranks(2, opchecks) == [10, 10]


def test_bytes_on_the_wire():
    """A maximum a row; then a sum, the label and K words of it: float64 here."""
    k = draw_whole().ids.shape[-1]
    for sent, rows in of_ranks(2, counted_bytes):
        assert sent == 8 * rows * (1 + 1 + 1 + k)
