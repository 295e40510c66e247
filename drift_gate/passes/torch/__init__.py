"""The passes in plain PyTorch: any device, float64, no compiler. ATen's own threads do the work.

`rules` says what the row functions take and return. Invalid rows are not read, and are 0 in every
result.
"""

from .divergence import divergence, divergence_grad
from .rows import finish, measured_rows, valid_rows, weigh
from .select import select
from .sparse import by_word, head_gather, sum_words, weigh_words
from .topk import masses, topk_rows, topk_support
from .vocabulary import expand, expand_labels, gather, scan, scan_lists

__all__ = [
    "by_word",
    "divergence",
    "divergence_grad",
    "expand",
    "expand_labels",
    "finish",
    "gather",
    "head_gather",
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
