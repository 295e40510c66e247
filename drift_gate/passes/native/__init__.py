"""The passes in C, for CPU tensors of up to 32 bits: a row passes through the cache once.

ATen goes over a row once for each operation, and stores what lies between in memory; here a tile of
a row is read, computed on in registers, and written. `setup.py` builds the library where there is a
C compiler. Where there is none, or `DRIFT_GATE_NATIVE=0` in the environment, the passes go through
ATen, slower and to the same formulas.

Arithmetic on logits and lists is float32, sums of rows are float64, and each result is rounded
once; what is done once a row is float64. A function is one call into the library, by this thread
where there is little to do, else by as many threads as ATen has. The same bits for any number.
"""

import os

from ..torch.sparse import head_gather, weigh_words
from ..torch.topk import masses
from . import library
from .divergence import divergence, divergence_grad
from .library import KINDS
from .rows import finish, measured_rows, valid_rows, weigh
from .sparse import by_word, sum_words
from .topk import topk_rows, topk_support
from .vocabulary import expand, expand_labels, gather, scan, scan_lists, select

__all__ = [
    "KINDS",
    "by_word",
    "divergence",
    "divergence_grad",
    "expand",
    "expand_labels",
    "finish",
    "gather",
    "head_gather",
    "instruction_set",
    "masses",
    "measured_rows",
    "scan",
    "scan_lists",
    "select",
    "sum_words",
    "topk_rows",
    "topk_support",
    "valid_rows",
    "weigh",
    "weigh_words",
]

enabled = os.environ.get("DRIFT_GATE_NATIVE", "1") != "0"


def instruction_set() -> str | None:
    """ "avx512", "avx2" or "any": what the functions were compiled for; None without them."""
    return library.instruction_set() if enabled and library.find() else None
