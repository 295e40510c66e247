"""The functions in C between pages that cannot be touched: nothing beyond their rows is."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_native import DTYPES, needs_library, softmax, statistics

from drift_gate.passes import native
from drift_gate.passes.rules import GateRule, PositionRule, ReduceRule, RowData

ROOT = Path(__file__).resolve().parent.parent
PROT_NONE = 0  # of mprotect
INF = float("inf")


def page_of(data: torch.Tensor, at_end: bool) -> tuple[mmap.mmap, torch.Tensor]:
    """The data at the end, or the beginning, of memory between two pages that cannot be touched."""
    page, size = mmap.PAGESIZE, data.nbytes
    inner = -(-size // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (0, page + inner):
        address = ctypes.c_void_p(whole.data_ptr() + guard)
        assert libc.mprotect(address, ctypes.c_size_t(page), PROT_NONE) == 0
    begin = page + (inner - size if at_end else 0)
    placed = whole[begin : begin + size].view(data.dtype).view(data.shape)
    return memory, placed.copy_(data)


def touch_every_border() -> None:
    """Run every function between pages that cannot be touched: in a process that may die."""
    for at_end in (False, True):
        for dtype in DTYPES:
            for vocab in (1, 15, 16, 17, 64, 100, 2049):
                data = torch.randn(2, vocab).to(dtype)
                kept = [page_of(data, at_end) for _ in range(3)]
                x, y, out = (tensor[None] for _, tensor in kept)
                on, ones = torch.ones(2, dtype=torch.bool), torch.ones(2)
                top, log_sum, _ = statistics(x, on)
                softmax(x, top, log_sum, ones, out, on)
                softmax(x, top, log_sum, ones, out, ~on)
                for direction in ("reverse", "forward", "jsd"):
                    options = 1.0, 1.0, direction, 0.5
                    found = native.divergence(x, y, None, on, *options, True)
                    native.divergence_grad(x, y, found[2], on, ones, *options, out)
                touch_entries(x, out, at_end)
    for at_end in (False, True):
        for n, k in ((1, 1), (3, 5), (2, 64), (5, 130)):
            touch_lists(n, k, at_end)
        for n in (1, 7, 64):
            touch_rows(n, at_end)


class Pages:
    """Tensors between pages that cannot be touched."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.kept: list[object] = []

    def place(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        pages = [page_of(x, self.at_end) for x in tensors]
        self.kept += pages
        return [x for _, x in pages]


def touch_entries(x: torch.Tensor, out: torch.Tensor, at_end: bool) -> None:
    vocab, pages = x.shape[2], Pages(at_end)
    ids = torch.tensor([[0, vocab - 1, 0], [vocab - 1, 0, vocab - 1]])
    ids, on = pages.place(ids.int(), torch.ones(2, dtype=torch.bool))
    gathered, _, top, log_sum, _ = native.scan(x, ids, on, 1.0, False)
    for k in (1, vocab, vocab + 3):
        native.select(x, k, on, 1.0)
    ids[1, 1], ids[0, 2] = vocab, -1  # write nothing
    for alpha in (torch.ones(2), torch.zeros(2)):
        row_data = pages.place(top, log_sum, gathered, alpha, torch.ones(2, 3))
        top_, log_sum_, gathered_, alpha_, beta_ = row_data
        native.expand(x, ids, top_, log_sum_, gathered_, on, alpha_, beta_, 1.0, out)


def touch_lists(n: int, k: int, at_end: bool) -> None:
    pages = Pages(at_end)
    scores, teacher = pages.place(-torch.rand(n, k) - k, -torch.rand(n, k) - k)
    (ids,) = pages.place(torch.arange(n * k).view(n, k))
    here, on = pages.place(torch.ones(n, k) > 0, torch.ones(n) > 0)
    native.topk_support(ids, teacher, on, n * k, True, True)
    for direction in ("reverse", "jsd"):
        for support in ("renormalized", "truncated", "tail"):
            native.topk_rows(scores, scores, teacher, here, on, direction, support, 0.5)
    hidden, starts, order = pages.place(torch.rand(n, 5), *native.by_word(ids, n * k))
    native.sum_words(hidden, scores, starts, order)


def touch_rows(n: int, at_end: bool) -> None:
    pages = Pages(at_end)
    now, old, target, by, mask = pages.place(*(-torch.rand(n) for _ in range(4)), torch.ones(n))
    spans, borders, labels = pages.place(
        torch.arange(n), torch.tensor([0, n // 2, n]), torch.ones(n).int()
    )
    valid = native.valid_rows(labels, mask, -100, 9, borders, n, labels.device, True)
    (valid,) = pages.place(valid)
    for cuts, granularity in ((borders, "span"), (None, "block")):
        data = RowData(valid, now, old, spans, cuts, 3)
        gate = GateRule(granularity, 2, "rms", 1.0, "sequence", False)
        position = PositionRule("ppo", 0.2, 0.2, 3.0, -INF, INF, "old", "span", True, -INF)
        native.finish(data, gate, None, by, target, position, ReduceRule(1.0, "tokens", True))


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_nothing_beyond_the_rows_is_touched():
    code = "import test_native_guards; test_native_guards.touch_every_border(); print('alive')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert run.stdout == "alive\n", run.stderr


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="protects pages as Linux does")
def test_a_touch_beyond_the_rows_is_seen():
    """The test of the test: a vocabulary of one word more than there is."""
    code = (
        "import torch, test_native_guards; "
        "memory, x = test_native_guards.page_of(torch.randn(1, 64), True); "
        "test_native_guards.statistics(x.as_strided((1, 1, 65), (65, 65, 1)), None); print('alive')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert run.returncode < 0 and "alive" not in run.stdout
