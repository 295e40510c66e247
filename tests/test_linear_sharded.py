"""Heads sharded by FSDP2: gathered once a call, gradients sharded again."""

from __future__ import annotations

from typing import Any

import torch
from support.heads import FORMS, draw_head, run_head
from support.ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

RANKS = 2
VOCAB = 51  # shards of 26 and 25 words


def problem(form: str, rank: int):
    """Rows of a rank; the head of all of them."""
    mine, first = (draw_head(form, 40, vocab=VOCAB, seed=seed) for seed in (rank, 0))
    mine.head = first.head
    return mine.to(torch.float64)


class Model(torch.nn.Module):
    def __init__(self, head: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(head.shape[1], head.shape[1], dtype=head.dtype)
        self.lm_head = torch.nn.Linear(*head.shape[::-1], bias=False, dtype=head.dtype)
        with torch.no_grad():
            self.lm_head.weight.copy_(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def gradients(rank: int) -> dict[str, Any]:
    """Whole gradients of the head: by form, of its weight and bias; and of an FSDP2 module's."""
    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {}
    for form in FORMS:
        mine = problem(form, rank)
        head = [distribute_tensor(x, mesh, [Shard(0)]) for x in (mine.weight, mine.bias)]
        weight, bias = (x.requires_grad_() for x in head)
        whole = mine.head_of(weight, bias)
        result = mine.function(mine.hidden, whole, *mine.rest, **mine.options)
        result.loss.backward()
        for x in head:
            assert isinstance(x.grad, DTensor) and x.grad.placements == (Shard(0),)
            assert x.grad.to_local().shape == x.to_local().shape
        found[form] = [x.grad.full_tensor() for x in head]
    mine = problem("opd", 0)
    model = Model(mine.weight)
    for module in (model.body, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    weight = model.lm_head.weight
    assert isinstance(weight, DTensor)
    head = mine.head_of(weight)
    mine.function(model(mine.hidden), head, *mine.rest, **mine.options).loss.backward()
    found["module"] = weight.grad.full_tensor()
    return found


def test_a_sharded_head_has_the_mean_gradient_of_the_ranks():
    """Where all have the same rows (the module's case) that is the gradient of one process."""
    every_rank = run_ranks(RANKS, gradients)
    for form in FORMS:
        apart = [run_head(problem(form, rank), "torch")[1][1:] for rank in range(RANKS)]
        for k in range(2):
            mean = torch.stack([grads[k] for grads in apart]).mean(0)
            for found in every_rank:
                torch.testing.assert_close(found[form][k], mean)
    mine = problem("opd", 0)
    model = Model(mine.weight)
    weight = model.lm_head.weight
    head = mine.head_of(weight)
    mine.function(model(mine.hidden), head, *mine.rest, **mine.options).loss.backward()
    for found in every_rank:
        torch.testing.assert_close(found["module"], weight.grad)
