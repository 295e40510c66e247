"""What suites share: from a loss to the run that is timed; the baseline and its compiled twin."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from .harness import Implementation
from .inputs import Work
from .names import BASELINE, COMPILED
from .peers.guard import LeftOut, Peer
from .truth import Outputs

Loss = Callable[..., Tensor]  # leaves -> loss []
Forward = Callable[..., Outputs]
GRADS = {1: ("grad",), 2: ("grad_hidden", "grad_weight")}  # by how many leaves there are


def train(loss: Loss) -> Forward:
    """Forward and backward: the loss and the gradients of the leaves."""

    def run(*leaves: Tensor) -> Outputs:
        value = loss(*leaves)
        grads = torch.autograd.grad(value, leaves)
        return {"loss": value.detach(), **dict(zip(GRADS[len(leaves)], grads, strict=True))}

    return run


def forward(compute: Forward) -> Forward:
    """Forward alone."""
    return torch.no_grad()(compute)


def compiled(function: Callable) -> Callable:
    """torch.compile for one size; what was compiled for others is forgotten.

    Raises:
        LeftOut: the environment turns the compiler off.
    """
    found = compiled_too(function)
    torch._dynamo.reset()
    return found


def compiled_too(function: Callable) -> Callable:
    """The same, beside what was compiled before."""
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
        raise LeftOut("TORCHDYNAMO_DISABLE is set")
    return torch.compile(function, dynamic=False)


def baseline(
    function: Callable[[Work], Callable], timed: Callable = train, temporaries: float = 14
) -> tuple[Implementation, Implementation]:
    """Eager, and torch.compile of it. `function(work)` is what the leaves are passed to."""
    plain = Implementation(BASELINE, lambda work: timed(function(work)), temporaries=temporaries)
    return plain, plain._replace(
        name=COMPILED, make=lambda work: timed(compiled(function(work))), compiles=True
    )


def finished(
    peer: Peer, finish: Callable[[Work, Callable], Loss], note: str, truth: str = "same",
    suffix: str = "",
) -> Implementation:  # fmt: skip
    """A peer's function, and eagerly what is missing to the loss."""
    return Implementation(
        peer.name + suffix, lambda work: train(finish(work, peer.load(work.device))), note, truth,
        peer.temporaries, peer.overwrites, peer.compiles,
    )  # fmt: skip


def ours(name: str) -> Callable:
    """A public function of this package.

    Raises:
        LeftOut: this version has none of that name.
    """
    import drift_gate

    found = getattr(drift_gate, name, None)
    if found is None:
        raise LeftOut(f"this version of drift_gate has no {name}")
    return found
