"""Batches over ranks (gloo): any split has the losses and gradients of one process, in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.parts import FORMS, T, Whole, draw_whole, run_part
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import drift_gate as dg

pytestmark = pytest.mark.xdist_group("ranks")  # one worker: processes are started once
GATE = dg.DriftGate(block_size=4)
CASES: dict[str, tuple[str, bool, Any, dict[str, Any]]] = {
    f"{form}{', linear' * linear}": (form, linear, GATE, {})
    for form, linear in itertools.product(FORMS, (False, True))
}
CASES |= {
    "truncated": ("topk", True, GATE, {"support": "truncated"}),
    "spans": ("opd", True, dg.DriftGate("span", tau=3.0, aggregate="rms"), {}),
    "sequences": ("opd", True, dg.DriftGate("sequence", aggregate="max_abs"), {}),
    "tokens": ("opd", False, dg.DriftGate("token", aggregate="mean_abs"), {}),
    "mean by sequence": ("opd", True, dg.DriftGate(block_size=4, normalize="sequence"), {}),
    "raw": ("opd", False, dg.DriftGate(block_size=4, normalize="none"), {}),
    "sampled": ("topk", True, dg.DriftGate(block_size=5, sample_every=3), {}),
    "sampled logits": ("topk", False, dg.DriftGate("span", sample_every=2), {}),
    "ungated": ("opd", True, None, {"estimator": "k3"}),
    "sums": ("opd", True, GATE, {"reduction": "token-sum"}),
    "given tokens": ("opd", False, GATE, {"reduction": dg.Reduction(batch_num_tokens=99.0)}),
    "sequence sums": ("opd", False, GATE, {"reduction": "seq-mean-token-sum"}),
    "sequence means": ("opd", True, GATE, {"reduction": "seq-mean-token-mean"}),
}
FEWER = (
    "topk", "full, linear", "opd, linear", "spans", "mean by sequence", "sequence means", "sampled",
)  # fmt: skip
Result = tuple[Tensor, Tensor]  # a loss and the gradient of the head


def one_process(whole: Whole, case: str) -> Result:
    form, linear, gate, options = CASES[case]
    weight = whole.weight.clone().requires_grad_()
    output, _ = run_part(whole, form, linear, weight, gate, **options)
    output.loss.backward()
    assert weight.grad is not None
    return output.loss.detach(), weight.grad


def over_ranks(parts: list[Whole], case: str, **extra: Any) -> Result:
    """This rank's micro-batches; what the ranks have, added up."""
    form, linear, gate, options = CASES[case]
    weight = parts[0].weight.clone().requires_grad_()
    normalizer = dg.GateNormalizer(gate) if len(parts) > 1 else None
    loss = torch.zeros((), dtype=torch.float64)
    for part in parts:
        rule = gate if normalizer is None else normalizer
        output, _ = run_part(part, form, linear, weight, rule, **options, **extra)
        output.loss.backward()
        loss = loss + output.loss.detach()
    if normalizer is not None:
        loss = normalizer.scale_gradients([weight])
    assert weight.grad is not None
    for x in (loss, weight.grad):
        dist.all_reduce(x)
    return loss, weight.grad


def share(whole: Whole, part: int, parts: int) -> Whole:
    return whole.take(lambda x: x.tensor_split(parts)[part])


def positions(rank: int, ranks: int, layout: str) -> Tensor:
    """Which positions of every sequence a rank has."""
    place = torch.arange(T)
    if layout == "contiguous":
        return place.tensor_split(ranks)[rank]
    pieces = place.tensor_split(2 * ranks)  # zigzag
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def cut_sequences(whole: Whole, rank: int, ranks: int, layout: str) -> tuple[Whole, Tensor]:
    """The part of a rank, and its position ids."""
    at = positions(rank, ranks, layout)
    return whole.take(lambda x: x[:, at]), at.expand(len(whole.labels), -1)


def packed(whole: Whole, rank: int, ranks: int) -> tuple[Whole, dict[str, Tensor]]:
    """Sequences of several lengths, cut at other places each; every third is one rank's alone."""
    rows, position, counts = [], [], []
    for b in range(len(whole.labels)):
        length = T - b % 5
        mine = torch.arange(length).tensor_split(ranks)[rank]
        if b % 3 == 0:
            mine = torch.arange(length if b % ranks == rank else 0)
        rows.append(b * T + mine)
        position.append(mine)
        counts.append(len(mine))
    index = torch.cat(rows)
    whole = whole.take(lambda x: x.reshape(-1, *x.shape[2:])[index])
    borders = torch.tensor([0, *itertools.accumulate(counts)])
    return whole, {"cu_seqlens": borders, "position_ids": torch.cat(position)}


def packed_whole(whole: Whole) -> tuple[Whole, dict[str, Tensor]]:
    part, options = packed(whole, 0, 1)
    del options["position_ids"]
    return part, options


def every_split(rank: int, ranks: int) -> dict[Any, Result]:
    """Data parallel with micro-batches, sequences cut, and both."""
    whole, world = draw_whole(), dg.Parallel(group=dist.group.WORLD)
    found: dict[Any, Result] = {}
    for case in CASES if ranks == 2 else FEWER:
        mine = share(whole, rank, ranks)
        for count in (1, 2, 5) if case == "opd, linear" else (1,):
            parts = [share(mine, i, count) for i in range(count)]
            found["rows", case, count] = over_ranks(parts, case, parallel=world)
        for layout in ("contiguous", "zigzag"):
            part, position = cut_sequences(whole, rank, ranks, layout)
            for count in (1, 2, 5) if case == "opd, linear" else (1,):
                parts = [share(part, i, count) for i in range(count)]
                place = {"position_ids": position[: len(parts[0].labels)]}  # alike in all rows
                found[layout, case, count] = over_ranks(parts, case, parallel=world, **place)
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("rows", "sequences"))
    rows, along = mesh.get_local_rank("rows"), mesh.get_local_rank("sequences")
    mine, position = cut_sequences(share(whole, rows, 2), along, ranks // 2, "zigzag")
    both = dg.Parallel(dist.group.WORLD, context_parallel_group=mesh.get_group("sequences"))
    for case in ("opd, linear", "sequence means", "mean by sequence"):
        found["both", case, 1] = over_ranks([mine], case, parallel=both, position_ids=position)
    halves = [(share(mine, i, 2), position[: len(position) // 2]) for i in range(2)]
    weight, normalizer = whole.weight.clone().requires_grad_(), dg.GateNormalizer(GATE)
    for part, place in halves:
        options = {"parallel": both, "position_ids": place}
        output, _ = run_part(part, "opd", True, weight, normalizer, **options)
        output.loss.backward()
    loss = normalizer.scale_gradients(weight)
    dist.all_reduce(loss)
    dist.all_reduce(weight.grad)
    found["both", "opd, linear", 2] = loss, weight.grad
    return found


def packed_splits(rank: int, ranks: int) -> dict[str, Result]:
    part, options = packed(draw_whole(), rank, ranks)
    cases = ("opd, linear", "spans", "sequences", "sequence means", "mean by sequence")
    lengths = torch.tensor([len(part.labels)])
    dist.all_reduce(lengths, dist.ReduceOp.MAX)
    part, options = padded(part, options, int(lengths))
    options["parallel"] = dg.Parallel(group=dist.group.WORLD)
    return {case: over_ranks([part], case, **options) for case in cases}


def padded(part: Whole, options: dict[str, Tensor], rows: int) -> tuple[Whole, dict[str, Tensor]]:
    """All ranks have the same number of rows: the rest is a sequence without valid rows."""
    more = rows - len(part.labels)
    part = part.take(lambda x: torch.cat([x, torch.zeros_like(x[:1]).expand(more, *x.shape[1:])]))
    borders, position = options["cu_seqlens"], options["position_ids"]
    return part, {
        "cu_seqlens": torch.cat([borders, torch.tensor([rows])]),
        "position_ids": torch.cat([position, torch.zeros(more, dtype=torch.long)]),
    }


def with_tokens(tokens: Any) -> Whole:
    """The batch whose response mask is where these sequences are."""
    whole = draw_whole()
    return dataclasses.replace(whole, mask=whole.mask & tokens(len(whole.mask))[:, None])


TOKENS: dict[str, Any] = {
    "of the first rank": lambda n: torch.arange(n) < n // 2,
    "of the last rank": lambda n: torch.arange(n) >= n // 2,
    "of none": lambda n: torch.zeros(n, dtype=torch.bool),
}
ALONE = ("opd", "topk, linear", "full, linear", "ungated", "sequence means", "sequence sums")


def one_rank_alone(rank: int, ranks: int) -> dict[Any, Result]:
    """Ranks without a token beside one that has some; micro-batches without as well."""
    world, found = dg.Parallel(group=dist.group.WORLD), {}
    for (who, tokens), case, count in itertools.product(TOKENS.items(), ALONE, (1, 3)):
        mine = share(with_tokens(tokens), rank, ranks)
        parts = [share(mine, i, count) for i in range(count)]
        found[who, case, count] = over_ranks(parts, case, parallel=world)
    return found


def all_works(rank: int, ranks: int) -> dict[str, Any]:
    works = [every_split, packed_splits]
    if ranks == 2:
        works += [gates_alone, in_engines, troubles, counted_bytes, one_rank_alone]
    return {work.__name__: work(rank, ranks) for work in works}


@functools.cache
def run_all(ranks: int) -> list[dict[str, Any]]:
    """What every rank has to say: processes are slow to start, so all works share theirs."""
    return run_ranks(ranks, all_works, ranks)


def of_ranks(ranks: int, work: Callable[..., Any]) -> list[Any]:
    return [found[work.__name__] for found in run_all(ranks)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_split_is_one_process(ranks: int):
    whole = draw_whole()
    wanted = {case: one_process(whole, case) for case in CASES}
    for every in of_ranks(ranks, every_split):
        for (split, case, count), found in every.items():
            assert_same(found, wanted[case], f"{split}, {case}, {count} micro-batches")


@pytest.mark.parametrize("ranks", [2, 4])
def test_packed_sequences_are_cut_anywhere(ranks: int):
    whole, options = packed_whole(draw_whole())
    for every in of_ranks(ranks, packed_splits):
        for case, found in every.items():
            form, linear, gate, more = CASES[case]
            weight = whole.weight.clone().requires_grad_()
            output, _ = run_part(whole, form, linear, weight, gate, **more, **options)
            output.loss.backward()
            assert_same(found, (output.loss.detach(), weight.grad), case)


def assert_same(found: Result, wanted: Any, what: str) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13, msg=lambda m: f"{what}: {m}")


def gates_alone(rank: int, ranks: int) -> dict[str, Any]:
    whole = draw_whole()
    now = dg.linear_token_log_probs(whole.hidden, whole.weight, whole.labels)[0]
    mine = share(whole, rank, ranks)
    options = {"response_mask": mine.mask, "parallel": dg.Parallel(group=dist.group.WORLD)}
    rows = dg.gate_weights(now.tensor_split(ranks)[rank], mine.old, GATE, **options)
    at = positions(rank, ranks, "zigzag")
    part, place = cut_sequences(whole, rank, ranks, "zigzag")
    options["response_mask"] = part.mask
    cut = dg.gate_weights(now[:, at], part.old, GATE, **options, position_ids=place)
    return {"rows": rows._asdict(), "cut": cut._asdict(), "at": at}


def test_ranks_without_a_token():
    for found in of_ranks(2, one_rank_alone):
        for (who, case, _), got in found.items():
            wanted = one_process(with_tokens(TOKENS[who]), case)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
                assert who != "of none" or (a == 0).all()


def test_gates_over_ranks():
    whole = draw_whole()
    now = dg.linear_token_log_probs(whole.hidden, whole.weight, whole.labels)[0]
    wanted = dg.gate_weights(now, whole.old, GATE, response_mask=whole.mask)
    every = of_ranks(2, gates_alone)
    torch.testing.assert_close(torch.cat([x["rows"]["weights"] for x in every]), wanted.weights)
    for found in every:
        at = found["at"]
        for name in ("weights", "drift", "block_ids"):
            torch.testing.assert_close(found["cut"][name], getattr(wanted, name)[:, at])


class Model(torch.nn.Module):
    def __init__(self, whole: Whole) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = whole.weight.shape[1]
        self.body = torch.nn.Linear(width, width, dtype=torch.float64)
        self.head = torch.nn.Linear(width, len(whole.weight), bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def step(model: torch.nn.Module, parts: list[Whole], **extra: Any) -> Tensor:
    """Gradients of a step in micro-batches; returns the loss."""
    normalizer = dg.GateNormalizer(GATE)
    for part in parts:
        dg.opd_loss(
            model(part.hidden), part.labels, part.old, part.teacher, gate=normalizer,
            response_mask=part.mask, **extra,
        ).loss.backward()  # fmt: skip
    return normalizer.scale_gradients(model.parameters())


def in_engines(rank: int, ranks: int) -> dict[str, Any]:
    """Engines average the ranks' gradients, so that dp_size is the number of ranks."""
    whole = draw_whole()
    mine = share(whole, rank, ranks)
    parts = [share(mine, i, 2) for i in range(2)]
    extra = {
        "parallel": dg.Parallel(group=dist.group.WORLD),
        "reduction": dg.Reduction(dp_size=ranks),
    }
    ddp = DistributedDataParallel(Model(whole))
    found = {"ddp": (step(ddp, parts, **extra), [p.grad for p in ddp.parameters()])}
    sharded = Model(whole)
    mesh = init_device_mesh("cpu", (ranks,))
    for module in (sharded.body, sharded.head, sharded):
        fully_shard(module, mesh=mesh)
    loss = step(sharded, parts, **extra)
    found["fsdp2"] = loss, [p.grad.full_tensor() for p in sharded.parameters()]
    return found


def test_ddp_and_fsdp2_with_micro_batches():
    whole = draw_whole()
    model = Model(whole)
    loss = step(model, [whole])
    every = of_ranks(2, in_engines)
    for engine in ("ddp", "fsdp2"):
        mean = sum(found[engine][0] for found in every) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-10, atol=0)
        for found in every:
            for a, b in zip(found[engine][1], model.parameters(), strict=True):
                torch.testing.assert_close(a, b.grad, rtol=1e-10, atol=1e-13)


def counted_bytes(rank: int, ranks: int) -> list[int]:
    """What a call sends: with its rows over ranks, and with its sequences cut."""
    sent = []
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    original = getattr(dist, name)

    def counting(out: Tensor, x: Tensor, group: Any) -> Any:
        sent.append(x.numel() * x.element_size())
        return original(out, x, group=group)

    setattr(dist, name, counting)
    whole = draw_whole()
    options: dict[str, Any] = {"parallel": dg.Parallel(group=dist.group.WORLD)}
    run_part(share(whole, rank, ranks), "opd", False, whole.weight, GATE, **options)
    rows, sent = sent, []
    part, position = cut_sequences(whole, rank, ranks, "zigzag")
    run_part(part, "opd", False, whole.weight, GATE, **options, position_ids=position)
    return [sum(rows), sum(sent), part.labels.numel()]


def test_bytes_on_the_wire():
    """40 bytes of a rank for the gate (8 of them the meeting's), 48 a position for cut blocks."""
    for rows, cut, n in of_ranks(2, counted_bytes):
        assert rows == 40
        assert cut == 40 + 8 + 48 * n


def troubles(rank: int, ranks: int) -> list[str]:
    """What each wrong call raises on this rank, and how long that takes."""
    whole, world = draw_whole(), dist.group.WORLD
    part, position = cut_sequences(whole, rank, ranks, "contiguous")
    said = []

    def attempt(part: Whole = part, gate: Any = GATE, **options: Any) -> None:
        begin = time.perf_counter()
        options = {"parallel": dg.Parallel(group=world), **options}
        with pytest.raises((ValueError, RuntimeError)) as error:
            run_part(part, "opd", True, whole.weight, gate, **options)
        said.append(str(error.value))
        assert time.perf_counter() - begin < 20

    attempt(gate=dg.DriftGate(block_size=4 + rank))
    attempt(estimator=("ppo", "k3")[rank], position_ids=position)
    short = part.take(lambda x: x[: len(x) - rank])
    attempt(short, position_ids=position[: len(position) - rank])
    bad = part.take(lambda x: x)
    if rank == 1:
        bad.labels = bad.labels + 1000
    attempt(bad)
    attempt(position_ids=positions(0, ranks, "contiguous").expand(len(part.labels), -1))
    attempt(parallel=dg.Parallel(context_parallel_group=world))
    for clip in (dg.Clip(low=0.2 + rank), dg.Clip(advantage=1.0 + rank), dg.Clip(dual=3.0 + rank)):
        attempt(clip=clip)
    attempt(estimator="k2", teacher_log_prob_min=-9.0 + rank)
    return said


CLIPS = (
    "low: 0.2 and 1.2", "advantage_high: 1.0 and 2.0", "dual: 3.0 and 4.0", "floor: -9.0 and -8.0"
)  # fmt: skip


def test_ranks_that_disagree_or_fail():
    first, second = of_ranks(2, troubles)
    for said in (first, second):
        assert "group: ranks 0 and 1 disagree about gate: DriftGate" in said[0]
        assert "block_size=4" in said[0] and "block_size=5" in said[0]
        assert "ranks 0 and 1 disagree about estimator: ppo and k3" in said[1]
        assert "disagree about the shape of labels: [40, 6] and [39, 6]" in said[2]
        assert "position_ids must name each valid position of a sequence once" in said[4]
        assert "position_ids must be given where parallel.context_parallel_group is" in said[5]
        assert said[5].endswith("got None")
        for clip, found in zip(CLIPS, said[6:], strict=True):
            assert f"ranks 0 and 1 disagree about {clip}" in found
    assert first[3].startswith("rank 0 stops, because rank 1 of ")
    assert "group failed: ValueError: labels must lie" in first[3]
    assert second[3].startswith("labels must lie in [0, 37)")


def test_arguments():
    whole = draw_whole()
    with pytest.raises(TypeError, match="parallel.group must be a torch.distributed.Proc"):
        run_part(whole, "opd", False, whole.weight, GATE, parallel=dg.Parallel(group=3))
