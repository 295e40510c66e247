"""What the suites of fused heads share: the size that is quoted, and the products alone."""

from __future__ import annotations

from torch import Tensor

from .cases import Case
from .harness import Implementation
from .inputs import Work
from .names import GEMM, GEMMS
from .runs import forward
from .truth import Outputs

GRADIENTS = ("hidden", "weight")


def head(on_gpu: bool, what: str, k: int = 0) -> Case:
    """The size of design and README: 8192 tokens and H = 4096 on a GPU."""
    rows, hidden = (8192, 4096) if on_gpu else (1024, 1024)
    return Case(what, rows, 151_936, "bfloat16", k=k, hidden=hidden)


def bare_gemms(count: int) -> Implementation:
    """The products that a head cannot do without, one or three, and nothing else."""

    def make(work: Work):
        def compute(hidden: Tensor, weight: Tensor) -> Outputs:
            logits = hidden @ weight.T
            if count == 1:
                return {"logits": logits}
            return {"grad_hidden": logits @ weight, "grad_weight": logits.T @ hidden}

        return forward(compute)

    name = GEMMS if count == 3 else GEMM
    return Implementation(name, make, "no loss; all logits in memory", "nothing", temporaries=2)
