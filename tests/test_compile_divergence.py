"""The passes over both vocabularies, compiled for GPUs not here: see `test_compile`."""

from __future__ import annotations

import pytest
import torch
from conftest import KERNELS
from drift_gate.kernels import divergence_grad as backward
from drift_gate.kernels import lanes
from drift_gate.kernels.divergence import divergence
from drift_gate.kernels.divergence_grad import divergence_grad
from support.compile_check import TARGETS, report
from support.launches import compile_only

pytestmark = [
    pytest.mark.skipif(KERNELS == "interpret", reason="interpreted kernels do not compile"),
    pytest.mark.parametrize("target", TARGETS),
]
ROWS = 4
ALIGNED, ODD = 151_936, 50_257  # Qwen3; GPT-2, whose rows start anywhere
EACH_DIRECTION = pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
EACH_INPUT = pytest.mark.parametrize(
    ("vocab", "dtype", "teacher_dtype"),
    [
        (ALIGNED, torch.bfloat16, torch.bfloat16),
        (ALIGNED, torch.float32, torch.float32),
        (ALIGNED, torch.bfloat16, torch.float32),
        (ODD, torch.bfloat16, torch.bfloat16),
    ],
    ids=["bfloat16", "float32", "mixed", "odd"],
)


@pytest.fixture(autouse=True)
def as_on_the_device(target, monkeypatch):
    """Lanes are threads, and NVIDIA has its own logarithm, though the tensors lie on the CPU."""
    monkeypatch.setattr(lanes, "WARP", TARGETS[target].warp_size)
    monkeypatch.setattr(backward, "has_fast_log2", lambda x: target.startswith("sm"))


def reports(target: str, run):
    with compile_only(target) as launches:
        run()
    return {launch.name: report(launch.kernel) for launch in launches}


@EACH_INPUT
@EACH_DIRECTION
def test_divergence(target, direction, vocab, dtype, teacher_dtype):
    x, y = (torch.empty(1, ROWS, vocab, dtype=d) for d in (dtype, teacher_dtype))
    labels, valid = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
    results = reports(
        target, lambda: divergence(x, y, labels, valid, 1.0, 1.0, direction, 0.5, True)
    )
    assert len(results) == 1 + (direction == "jsd")
    for result in results.values():
        assert result.spill_bytes == 0
        assert result.registers <= 128  # 16 warps a multiprocessor
        assert result.widest_load >= 128
        assert result.barriers_in_loops == 0


@EACH_INPUT
@EACH_DIRECTION
def test_divergence_grad(target, direction, vocab, dtype, teacher_dtype):
    x, y = (torch.empty(1, ROWS, vocab, dtype=d) for d in (dtype, teacher_dtype))
    row, valid = torch.zeros(ROWS), torch.ones(ROWS, dtype=torch.bool)
    arguments = torch.zeros(5, ROWS), valid, row, 1.0, 1.0, direction, 0.5
    (result,) = reports(target, lambda: divergence_grad(x, y, *arguments, x)).values()
    assert result.spill_bytes == 0
    assert result.registers <= 128
    assert result.barriers_in_loops == 0
    if vocab == ODD and target.startswith("gfx"):  # half the tile among twice the threads
        assert result.widest_load >= 64
        return
    assert result.widest_load >= 128
    if dtype == teacher_dtype:
        assert result.widest_store >= 128
