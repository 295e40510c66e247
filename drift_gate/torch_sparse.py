"""Sparse products of a head in PyTorch: see `sparse`.

Bytes that must move, with e bytes an element: N K H e in each; `sum_words` writes V H e.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from . import gradients
from .threads import share
from .torch_passes import bad_ids

CHUNK_WORDS = 1 << 18  # elements of the head that a thread gathers at a time: 1 MiB of float32
DEVICE_WORDS = 1 << 26


@torch.no_grad()
def gather(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    ids: Tensor,  # [N, K] int64 or int32
    valid: Tensor,  # [N] bool
) -> Tensor:
    """hidden . W[ids] + bias[ids], [N, K] in float32 (float64); 0 on invalid rows.

    Raises ValueError for an id outside [0, V) in a valid row on the CPU; elsewhere it gives NaN.
    """
    bad = bad_ids(ids, valid, weight.shape[0])
    unread = bad | ~valid[:, None]
    index = ids.masked_fill(unread, 0)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    (n, k), width = ids.shape, hidden.shape[1]
    out = torch.zeros(n, k, dtype=dtype, device=hidden.device)
    on_cpu = hidden.device.type == "cpu"
    workers = torch.get_num_threads() if on_cpu else 1
    step = max(1, (CHUNK_WORDS if on_cpu else DEVICE_WORDS) // max(1, k * width))
    rows = [slice(i, min(i + step, n)) for i in range(0, n, step)]
    picked = weight.new_empty(workers, step * k, width)
    widened = picked if weight.dtype == dtype else torch.empty_like(picked, dtype=dtype)

    def work(at: slice, worker: int) -> None:
        words = picked[worker, : (at.stop - at.start) * k]
        torch.index_select(weight, 0, index[at].flatten(), out=words)
        wide = widened[worker, : len(words)].copy_(words).view(-1, k, width)
        torch.bmm(wide, hidden[at].to(dtype)[:, :, None], out=out[at, :, None])

    share(rows, work, workers)
    if bias is not None:
        out += bias[index.long()]
    return out.masked_fill_(unread, 0).masked_fill_(bad, torch.nan)


@torch.no_grad()
def weigh_words(
    weight: Tensor,  # [V, H]
    ids: Tensor,  # [N, K]; outside [0, V): no word
    slope: Tensor,  # [N, K]
) -> Tensor:
    """sum_k slope_k W[ids_k], [N, H] in the dtype of W."""
    none = (ids < 0) | (ids >= weight.shape[0])
    slope = slope.masked_fill(none, 0).to(weight.dtype)
    return embedding_bag(ids.masked_fill(none, 0), weight, per_sample_weights=slope, mode="sum")


@torch.no_grad()
def sum_words(
    hidden: Tensor,  # [N, H]
    slope: Tensor,  # [N, K]
    starts: Tensor,  # [V + 1], from by_word
    order: Tensor,  # [N K], from by_word
) -> Tensor:
    """Row v: the sum of slope * hidden over the entries of word v; [V, H] like hidden."""
    if hidden.device.type == "cpu":
        return _sum_touched(hidden, slope, starts, order)
    bags = _bags(order, starts, hidden, slope)  # the last holds the entries without a word
    return bags[: len(starts) - 1]


def _sum_touched(hidden: Tensor, slope: Tensor, starts: Tensor, order: Tensor) -> Tensor:
    """`sum_words` that touches the rows of the listed words alone, and otherwise writes zeros."""
    shape = len(starts) - 1, hidden.shape[1]
    out = gradients.empty(shape, hidden.dtype, hidden.device).zero_()
    words = starts.diff().nonzero()[:, 0]
    begins = torch.cat([starts[words], starts[-1:]])
    borders = begins.tolist()
    step = max(1, CHUNK_WORDS // max(1, shape[1]))
    slabs = [(i, min(i + step, len(words))) for i in range(0, len(words), step)]

    def work(slab: tuple[int, int], worker: int) -> None:
        i, j = slab
        entries = order[borders[i] : borders[j]]
        out.index_copy_(0, words[i:j], _bags(entries, begins[i:j] - borders[i], hidden, slope))

    share(slabs, work, torch.get_num_threads())
    return out


def _bags(order: Tensor, starts: Tensor, hidden: Tensor, slope: Tensor) -> Tensor:
    """Sums of slope * hidden over the entries of each bag, which begin at `starts`."""
    weights = slope.flatten()[order].to(hidden.dtype)
    rows = order.div(slope.shape[1], rounding_mode="floor")
    return embedding_bag(rows, hidden, starts, per_sample_weights=weights, mode="sum")


def by_word(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Entries of ids [N, K] sorted by word: where each word's start [V + 1], and their order.

    The entries of a word keep their order; those without a word come last.
    """
    flat = ids.flatten().to(torch.int64)
    flat = torch.where((flat < 0) | (flat >= vocab), vocab, flat)
    ordered, order = flat.sort(stable=True)
    words = torch.arange(vocab + 1, device=ids.device)
    return torch.searchsorted(ordered, words), order
