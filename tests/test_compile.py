"""The kernels, compiled as their launchers call them, for GPUs that need not be here.

Static facts stand in for timings: registers, no spills, 16-byte loads and stores, and no barrier in
the loop over the vocabulary. `make compile-check` repeats them under other versions of Triton.
"""

from __future__ import annotations

import pytest
import torch
from conftest import KERNELS
from drift_gate.kernels import scan as scan_pass
from drift_gate.kernels import sparse
from drift_gate.kernels.blocks import row_blocks
from drift_gate.kernels.expand import expand
from drift_gate.kernels.sampled_token import sampled_token
from drift_gate.kernels.scan import scan
from drift_gate.kernels.topk import topk_rows
from support.compile_check import TARGETS, Report, report
from support.launches import compile_only

pytestmark = [
    pytest.mark.skipif(KERNELS == "interpret", reason="interpreted kernels do not compile"),
    pytest.mark.parametrize("target", TARGETS),
]
ROWS = 4
ALIGNED, ODD = 151_936, 50_257  # Qwen3; GPT-2, whose rows start anywhere
EACH_VOCAB = pytest.mark.parametrize("vocab", [ALIGNED, ODD])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def compiled(target: str, name: str, run) -> Report:
    with compile_only(target) as launches:
        run()
    (launch,) = (launch for launch in launches if launch.name == name)
    return report(launch.kernel)


def assert_streams(result: Report, registers: int) -> None:
    """Nothing in the way of the memory: enough programs at once, wide accesses, no spills."""
    assert result.spill_bytes == 0
    assert result.registers <= registers
    assert result.widest_load >= 128
    assert result.barriers_in_loops == 0


@EACH_VOCAB
@EACH_DTYPE
def test_scan(target, dtype, vocab):
    logits = torch.empty(1, ROWS, vocab, dtype=dtype)
    ids, valid = torch.zeros(ROWS, 1, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
    result = compiled(target, "_scan", lambda: scan(logits, ids, valid, 1.0, True))
    # 128 registers leave 16 warps a multiprocessor: two programs of 8 loads of 16 bytes a thread.
    assert_streams(result, 64 if vocab == ALIGNED else 128)


def test_scan_of_several_ids_split_over_programs(target, monkeypatch):
    monkeypatch.setattr(scan_pass, "programs_wanted", lambda device: 4 * ROWS)
    logits = torch.empty(1, ROWS, ALIGNED, dtype=torch.bfloat16)
    ids = torch.zeros(ROWS, 64, dtype=torch.int32)
    for name in ("_scan", "_combine"):
        result = compiled(target, name, lambda: scan(logits, ids, None, 1.0, True))
        assert result.spill_bytes == 0


@EACH_VOCAB
@EACH_DTYPE
@pytest.mark.parametrize("k", [1, 64])
def test_expand(target, dtype, vocab, k):
    logits = torch.empty(1, ROWS, vocab, dtype=dtype)
    ids, entries = torch.zeros(ROWS, k, dtype=torch.int64), torch.zeros(ROWS, k)
    row, valid = torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool)
    with compile_only(target) as launches:
        expand(logits, ids, row, row, entries, valid, row, entries, 1.0, logits)
    tiles, *others = (report(launch.kernel) for launch in launches)
    assert_streams(tiles, 64 if vocab == ALIGNED else 128)
    assert tiles.widest_store >= 128
    assert len(others) == (k > 1)
    assert all(entries.spill_bytes == 0 for entries in others)


@pytest.mark.parametrize(
    ("direction", "support", "k"),
    [("reverse", "renormalized", 64), ("forward", "truncated", 256), ("jsd", "tail", 64)],
)
def test_topk_rows(target, direction, support, k):
    lists, valid = torch.zeros(64, k), torch.ones(64, dtype=torch.bool)
    result = compiled(
        target,
        "_topk_rows",
        lambda: topk_rows(lists, lists, lists, lists > 0, valid, direction, support, 0.5),
    )
    assert result.spill_bytes == 0
    assert result.registers <= 128


@EACH_DTYPE
@pytest.mark.parametrize("k", [1, 65])
def test_sparse(target, dtype, k):
    width, vocab = 4096, 1000
    hidden, weight = torch.empty(64, width, dtype=dtype), torch.empty(vocab, width, dtype=dtype)
    ids, slope = torch.zeros(64, k, dtype=torch.int64), torch.zeros(64, k)
    valid, starts = torch.ones(64, dtype=torch.bool), torch.zeros(vocab + 1, dtype=torch.int64)
    with compile_only(target) as launches:
        sparse.gather(hidden, weight, weight[:, 0].contiguous(), ids, valid)
        sparse.weigh_words(weight, ids, slope)
        sparse.sum_words(hidden, slope, starts, ids.flatten())
    assert [launch.name for launch in launches] == ["_gather", "_weigh_words", "_sum_words"]
    for launch in launches:
        assert_streams(report(launch.kernel), 128)


@pytest.mark.parametrize(
    ("granularity", "aggregate"),
    [("block", "mean"), ("span", "rms"), ("span", "max_abs"), ("sequence", "mean_abs")],
)
def test_row_blocks(target, granularity, aggregate):
    x, valid = torch.zeros(64), torch.ones(64, dtype=torch.bool)
    packed = granularity == "span"
    spans = torch.zeros(64, dtype=torch.int64) if packed else None
    borders = torch.tensor([0, 64]) if packed else None
    result = compiled(
        target,
        "_row_blocks",
        lambda: row_blocks(x, x, valid, spans, borders, 64, granularity, 64, aggregate, True),
    )
    assert result.spill_bytes == 0
    assert result.registers <= 192


@pytest.mark.parametrize(
    ("normalize", "estimator"),
    [("batch", "ppo"), ("sequence", "ppo"), ("none", "k3"), ("off", "importance")],
)
def test_sampled_token(target, normalize, estimator):
    n = 2048  # the widest tile
    x, valid, blocks = torch.zeros(n), torch.ones(n, dtype=torch.bool), torch.zeros(4, n)
    clips = 0.2, 0.2, 3.0, 5.0
    result = compiled(
        target,
        "_sampled_token",
        lambda: sampled_token(
            x, x, x, valid, blocks, None, 64, 1.0, normalize, estimator, *clips,
            1.0, "sequences", True,
        ),
    )  # fmt: skip
    assert result.spill_bytes == 0
