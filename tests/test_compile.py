"""The kernels, compiled as their launchers call them, for GPUs that need not be here.

Static facts stand in for timings: registers, no spills, 16-byte loads and stores, and no barrier in
the loop over the vocabulary. `make compile-check` repeats them under other versions of Triton.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton
from conftest import KERNELS
from drift_gate.kernels import gather, head, lanes, rows, sparse
from drift_gate.kernels import scan as scan_pass
from drift_gate.kernels import select as selection
from drift_gate.kernels.expand import expand
from drift_gate.kernels.measured import measured_rows
from drift_gate.kernels.scan import scan
from drift_gate.kernels.select import select
from drift_gate.kernels.topk import topk_rows, topk_support
from support.compile_check import TARGETS, Report, report
from support.launches import compile_only
from support.row_truth import GateRule, PositionRule, ReduceRule, RowData

pytestmark = [
    pytest.mark.skipif(KERNELS == "interpret", reason="interpreted kernels do not compile"),
    pytest.mark.parametrize("target", TARGETS),
]
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
ROWS = 4
ALIGNED, ODD = 151_936, 50_257  # Qwen3; GPT-2, whose rows start anywhere
SHORT = 32_000  # Llama 2: rows of smaller programs
EACH_VOCAB = pytest.mark.parametrize("vocab", [ALIGNED, ODD])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def lanes_are_threads(target, monkeypatch):
    for module in (lanes, selection):
        monkeypatch.setattr(module, "WARP", TARGETS[target].warp_size)


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


@pytest.mark.parametrize("vocab", [ALIGNED, ODD, SHORT])
@EACH_DTYPE
def test_scan(target, dtype, vocab):
    logits = torch.empty(1, ROWS, vocab, dtype=dtype)
    ids, valid = torch.zeros(ROWS, 1, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
    result = compiled(target, "_scan", lambda: scan(logits, ids, valid, 1.0, True))
    # 128 registers leave 16 warps a multiprocessor, each with 4 loads of 16 bytes a thread.
    # Triton before 3.7 takes up to 72 on AMD, which leave 7 waves a SIMD in the place of 8.
    few = 72 if target.startswith("gfx") and TRITON < (3, 7) else 64
    assert_streams(result, 128 if vocab == ODD else few)


def test_scan_of_several_ids_split_over_programs(target, monkeypatch):
    monkeypatch.setattr(scan_pass, "programs_wanted", lambda device: 4 * ROWS)
    logits = torch.empty(1, ROWS, ALIGNED, dtype=torch.bfloat16)
    ids = torch.zeros(ROWS, 64, dtype=torch.int32)
    for name in ("_scan", "_combine"):
        result = compiled(target, name, lambda: scan(logits, ids, None, 1.0, True))
        assert result.spill_bytes == 0


@pytest.mark.parametrize(
    ("dtype", "vocab"), [(torch.bfloat16, ALIGNED), (torch.float32, ODD)], ids=str
)
def test_select(target, dtype, vocab):
    """The pass over the row, without a barrier but for the bound, and those over parts of it."""
    logits, valid = torch.empty(1, ROWS, vocab, dtype=dtype), torch.ones(ROWS, dtype=torch.bool)
    with compile_only(target) as launches:
        select(logits, 64, valid, 1.0)
    bounds, candidates, exactly, _ = (report(launch.kernel) for launch in launches)
    assert [x.spill_bytes for x in (bounds, candidates, exactly)] == [0, 0, 0]
    assert bounds.widest_load >= 128
    # Triton 3.7: four programs of 8 warps a multiprocessor; of float32, which need no conversion,
    # three. Later ones take up to 80 and 71: three. Earlier ones up to 83 and 128: two.
    few = (64 if dtype == torch.bfloat16 else 80), 64
    most = few if TRITON == (3, 7) else (80, 72) if TRITON > (3, 7) else (96, 128)
    assert bounds.registers <= most[0] and candidates.registers <= most[1]


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


@EACH_VOCAB
@EACH_DTYPE
def test_expand_with_the_slope_of_the_entropy(target, dtype, vocab):
    logits = torch.empty(1, ROWS, vocab, dtype=dtype)
    ids, entries, row = (
        torch.zeros(ROWS, 64, dtype=torch.int64),
        torch.zeros(ROWS, 64),
        torch.zeros(ROWS),
    )
    with compile_only(target) as launches:
        expand(logits, ids, row, row, entries, None, row, entries, 1.0, logits, row)
    tiles, listed = (report(launch.kernel) for launch in launches)
    assert_streams(tiles, 64 if vocab == ALIGNED else 128)
    assert tiles.widest_store >= 128 and listed.spill_bytes == 0


@EACH_VOCAB
def test_expand_of_float32_logits_to_a_shorter_gradient(target, vocab):
    logits, row = torch.empty(1, ROWS, vocab), torch.zeros(ROWS)
    out = torch.empty(1, ROWS, vocab, dtype=torch.bfloat16)
    ids, entry = torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(ROWS, 1)
    result = compiled(
        target,
        "_expand",
        lambda: expand(logits, ids, row, row, entry, None, row, entry, 1.0, out),
    )
    assert_streams(result, 64 if vocab == ALIGNED else 128)
    assert result.widest_store >= (64 if target.startswith("gfx") else 128)


@pytest.mark.parametrize(
    ("direction", "support", "k"),
    [
        ("reverse", "renormalized", 64),
        ("forward", "truncated", 256),
        ("jsd", "tail", 64),
        ("mixed", "renormalized", 64),
    ],
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
    valid = torch.ones(64, dtype=torch.bool)
    bias = weight[:, 0].contiguous()
    with compile_only(target) as launches:
        gather.gather(hidden, weight, bias, ids, valid)
        if k > 1:
            gather.sliced(hidden, weight, bias, ids, valid.view(torch.uint8))
        sparse.weigh_words(weight, ids, slope)
        entries = torch.zeros(vocab + 1, dtype=torch.int64), ids.flatten(), ids.flatten().int()
        sparse.sum_words(hidden, slope, *entries)
    several = k > 1
    expected = ["_gather", *["_gather_slice", "_sum_slices"] * several, "_weigh_words"]
    expected += ["_sum_segments"] * several + ["_sum_words"]  # 64 entries make no segment
    assert [launch.name for launch in launches] == expected
    for launch in launches:
        found = report(launch.kernel)
        if launch.name == "_gather_slice":  # of one warp, whose barriers take no time
            found = dataclasses.replace(found, barriers_in_loops=0)
        # Triton 3.5 takes 171 on AMD for one kernel: two waves a SIMD in the place of four.
        old = target.startswith("gfx") and TRITON < (3, 6)
        assert_streams(found, 192 if old else 128)


@EACH_VOCAB
@EACH_DTYPE
def test_exponentials_of_a_chunk(target, monkeypatch, dtype, vocab):
    monkeypatch.setattr(head, "programs_wanted", lambda device: ROWS)
    logits, row = torch.empty(ROWS, vocab, dtype=dtype), torch.zeros(ROWS)
    ids = torch.zeros(ROWS, 64, dtype=torch.int32)
    with compile_only(target) as launches:
        for listed in (ids[:, :1].contiguous(), ids):
            head.exp_rows(logits, listed, row, 1.0)
    assert len(launches) == 5
    for launch in launches:
        result = report(launch.kernel)
        assert result.spill_bytes == 0
        if launch.name == "_exp_rows":
            assert_streams(result, 64 if vocab == ALIGNED else 128)
            assert result.widest_store >= 128


@EACH_DTYPE
def test_sums_are_finished_as_a_copy_is_made(target, dtype):
    total, factor = torch.empty(100, 4096), torch.ones(())
    with compile_only(target) as launches:
        head.finish_sum(total, factor, dtype)
        head.scale_unless_one([total.to(dtype)], factor)
    for launch in launches:
        result = report(launch.kernel)
        assert_streams(result, 64)
        assert result.widest_store >= 128


ROW_KINDS = [  # gate, position, reduce; with row weights and packed; rows
    (GateRule(), PositionRule(dual=3.0), ReduceRule(), False, 2048),
    (GateRule(), PositionRule(dual=3.0), ReduceRule(1.0, "sequences", True), True, 70_000),
    (GateRule("span", 64, "rms"), PositionRule("cispo", ratio="span"), ReduceRule(), True, 70_000),
    (GateRule("span", 64, "max_abs", 1.0, "none"), PositionRule("k3"), ReduceRule(), False, 1000),
    (
        GateRule("sequence", 64, "rms", 1.0, "sequence"),
        PositionRule("importance", ratio="sequence"),
        ReduceRule(1.0, "tokens", True),
        True,
        70_000,
    ),
    (GateRule("token"), PositionRule("k3", clamp=False), ReduceRule(), False, 70_000),
    (GateRule(normalize="off"), PositionRule("given"), ReduceRule(), False, 70_000),
    (GateRule(sample_every=8), PositionRule("given"), ReduceRule(), True, 70_000),
    (GateRule("span", sample_every=8), PositionRule(ratio="span"), ReduceRule(), False, 2048),
]


@pytest.mark.parametrize("kind", ROW_KINDS, ids=str)
def test_rows(target, kind):
    gate, position, reduce, packed, n = kind
    x, valid = torch.zeros(n), torch.ones(n, dtype=torch.bool)
    spans = torch.zeros(n, dtype=torch.int64)
    borders = torch.tensor([0, n // 2, n]) if packed else None
    measured = valid if gate.sample_every > 1 else None
    data = RowData(valid, x, x, spans, borders, n, measured)
    with compile_only(target) as launches:
        if measured is not None and gate.granularity == "block":
            measured_rows(data, gate)
        rows.finish(data, gate, None, x if packed else None, x, position, reduce)
    assert len(launches) >= 1
    for launch in launches:
        result = report(launch.kernel)
        # Programs of 32 warps have 64 registers; Triton after 3.7 keeps two numbers elsewhere.
        assert result.spill_bytes <= (8 if TRITON > (3, 7) else 0), launch.name
        assert result.registers <= 128, launch.name


@pytest.mark.parametrize("k", [2, 64, 300])
def test_topk_support(target, k):
    ids, valid = torch.zeros(8192, k, dtype=torch.int64), torch.ones(8192, dtype=torch.bool)
    with compile_only(target) as launches:
        topk_support(ids, ids.float(), valid)
    assert {launch.name for launch in launches} == {"_topk_support"}
    for launch in launches:
        result = report(launch.kernel)
        assert result.spill_bytes == 0, launch.name
        assert result.registers <= 128, launch.name
