"""The Triton passes `scan` and `expand` against float64, on a GPU or checked on the CPU."""

from __future__ import annotations

import pytest
import torch
from conftest import KERNELS
from drift_gate.kernels import expand as expand_pass
from drift_gate.kernels import lanes
from drift_gate.kernels import scan as scan_pass
from drift_gate.kernels.expand import expand
from drift_gate.kernels.scan import scan
from support.numerics import assert_as_good_as
from support.problems import peaked_logits
from torch import Tensor

NAMES = ("gathered", "log_probs", "maximum", "log_sum", "entropy")


def scan_eager(z: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    """The definition, in the dtype of z [N, V]."""
    top = z.amax(-1)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0 * p).sum(-1)
    log_sum = (z - top[:, None]).exp().sum(-1).log()
    return z.gather(1, ids), log_p.gather(1, ids), top, log_sum, entropy


def expand_eager(z: Tensor, ids: Tensor, alpha: Tensor, beta: Tensor, scale: float) -> Tensor:
    grad = alpha[:, None] * z.softmax(-1)
    return scale * grad.scatter_add(1, ids, beta)


def check(
    logits: Tensor, ids: Tensor, scale: float = 1.0, *, alpha_is_zero: bool = False, name: str = ""
) -> None:
    """Both passes on logits [B, T, V] with ids [N, K]; the gradient out of place and in place."""
    n, k = ids.shape
    rows = logits.cpu().reshape(n, -1)
    wide = ids.cpu().long()
    generator = torch.Generator().manual_seed(7)
    beta = torch.randn(n, k, generator=generator)
    alpha = -beta.sum(-1)  # as a log-prob has it
    if alpha_is_zero:
        alpha[::2] = 0
    results = scan(logits, ids, None, scale, True)
    eager = scan_eager(rows.float() * scale, wide)
    truth = scan_eager(rows.double() * scale, wide)
    for triple in zip(results, eager, truth, NAMES, strict=True):
        assert_as_good_as(triple[0].cpu(), *triple[1:3], name=f"{name} {triple[3]}")

    gathered, _, maximum, log_sum, _ = results
    coefficients = alpha.to(logits.device), beta.to(logits.device)
    arguments = ids, maximum, log_sum, gathered, None, *coefficients, scale
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    expand(logits, *arguments, out)
    expected = expand_eager(rows.float() * scale, wide, alpha, beta, scale).to(logits.dtype)
    exact = expand_eager(rows.double() * scale, wide, alpha.double(), beta.double(), scale)
    assert_as_good_as(out.cpu().view(n, -1), expected, exact, name=f"{name} gradient")
    expand(logits, *arguments, logits)
    assert torch.equal(logits, out), f"{name}: in place differs"


SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@SHORT
@pytest.mark.parametrize(
    ("vocab", "k"),
    [
        (5000, 1),  # aligned for both dtypes; two tiles and a part
        (2053, 1),  # rows start anywhere
        (300, 3),  # the second launch
    ],
)
def test_a_shorter_gradient_is_the_float32_one_rounded(kernels_on_cpu, dtype, vocab, k):
    """As float32 logits of a head have it."""
    logits = draw_logits(1, 4, vocab).to(kernels_on_cpu)
    ids = ids_for(logits, k)
    gathered, _, maximum, log_sum, _ = scan(logits, ids, None, 1.3, False)
    beta = torch.linspace(-1, 1, 4 * k, device=kernels_on_cpu).view(4, k)
    alpha = -beta.sum(-1)
    alpha[1] = 0
    outs = [torch.empty_like(logits, dtype=x) for x in (torch.float32, dtype)]
    for out in outs:
        expand(logits, ids, maximum, log_sum, gathered, None, alpha, beta, 1.3, out)
    assert torch.equal(outs[0].to(dtype), outs[1])


def ids_for(logits: Tensor, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """K distinct words a row, the likeliest first."""
    n = logits.shape[0] * logits.shape[1]
    return logits.reshape(n, -1).float().topk(k).indices.to(dtype)


def draw_logits(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return peaked_logits(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(kernels_on_cpu, dtype):
    """Two full tiles of `expand` and a partial third; a row that `scan` cuts at 8192 (bf16)."""
    logits = draw_logits(1, 4, 9000, dtype=dtype).to(kernels_on_cpu)
    check(logits, ids_for(logits, 1))


@pytest.mark.parametrize(
    "vocab",
    [
        1,  # the only word has probability 1
        2,
        127,  # one under, at and over a tile of the smallest size
        128,
        129,
        4095,  # the tile of `expand`
        4096,
        4097,
        2053,  # odd: no row but the first starts on a 16-byte boundary
    ],
)
def test_tile_borders(kernels_on_cpu, vocab):
    logits = draw_logits(1, 5, vocab, dtype=torch.bfloat16).to(kernels_on_cpu)
    check(logits, ids_for(logits, 1))


@pytest.mark.parametrize(
    "k",
    [
        2,
        37,  # not a power of two
        70,  # more than one block of 64 entries
    ],
)
def test_several_ids(kernels_on_cpu, k):
    logits = draw_logits(2, 3, 300).to(kernels_on_cpu)
    check(logits, ids_for(logits, k, torch.int32), scale=1.3, alpha_is_zero=True)


def test_an_id_listed_twice_receives_both_betas(kernels_on_cpu):
    logits = draw_logits(1, 3, 100).to(kernels_on_cpu)
    ids = ids_for(logits, 5)
    ids[:, 4] = ids[:, 0]
    check(logits, ids)


def test_strides(kernels_on_cpu):
    """A view of a NaN-filled buffer: rows padded, a position left out, in place between them."""
    for width in (304, 301):  # 16-byte aligned rows; rows at changing offsets
        buffer = torch.full((2, 4, width), float("nan"), dtype=torch.bfloat16)
        view = buffer.to(kernels_on_cpu)[:, :-1, :300]
        view.copy_(draw_logits(2, 3, 300))
        ids = ids_for(view, 1)
        check(view, ids, name=f"width {width}")
        outside = torch.ones_like(view._base, dtype=torch.bool)
        outside[:, :-1, :300] = False
        assert view._base[outside].isnan().all()


def test_a_storage_that_starts_off_a_16_byte_boundary(kernels_on_cpu):
    storage = torch.empty(3 * 256 + 1, dtype=torch.bfloat16, device=kernels_on_cpu)
    view = storage[1:].view(1, 3, 256).copy_(draw_logits(1, 3, 256))
    check(view, ids_for(view, 1))


def test_rows_shared_by_programs(kernels_on_cpu, monkeypatch):
    """Few rows: 5 tiles over 2 programs a row, 10 of rows that start anywhere over 4."""
    for wanted, vocab in ((8, 20_000), (2, 39_001)):
        monkeypatch.setattr(scan_pass, "programs_wanted", lambda device, n=wanted: n)
        logits = draw_logits(1, 2, vocab, dtype=torch.bfloat16).to(kernels_on_cpu)
        check(logits, ids_for(logits, 3), name=f"{wanted} programs")


def test_rows_that_are_not_valid_are_not_read(kernels_on_cpu):
    logits = draw_logits(1, 6, 200).to(kernels_on_cpu)
    valid = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool, device=kernels_on_cpu)
    ids = ids_for(logits, 2)
    expected = [x.clone() for x in scan(logits, ids, valid, 1.0, True)]
    logits[0, ~valid] = float("nan")
    ids[~valid] = -100
    results = scan(logits, ids, valid, 1.0, True)
    for got, wanted, name in zip(results, expected, NAMES, strict=True):
        assert torch.equal(got, wanted), name
        assert (got[~valid] == 0).all(), name
    gathered, _, maximum, log_sum, _ = results
    out = torch.full_like(logits, float("nan"))
    ones = torch.ones(6, 2, device=kernels_on_cpu)
    expand(logits, ids, maximum, log_sum, gathered, valid, ones[:, 0], ones, 1.0, out)
    assert (out[0, ~valid] == 0).all()
    assert out[0, valid].isfinite().all()


def test_rows_whose_alpha_is_0_are_not_read(kernels_on_cpu):
    logits = torch.full((1, 2, 150), float("nan"), device=kernels_on_cpu)
    ids = torch.tensor([[3, 149], [0, 7]], device=kernels_on_cpu)
    stats = torch.zeros(2, device=kernels_on_cpu)
    beta = torch.tensor([[1.0, -2.0], [0.5, 4.0]], device=kernels_on_cpu)
    out = torch.full_like(logits, float("nan"))
    expand(logits, ids, stats, stats, torch.zeros_like(beta), None, stats, beta, 2.0, out)
    expected = torch.zeros(2, 150, device=kernels_on_cpu).scatter(1, ids, 2 * beta)
    assert torch.equal(out[0], expected)


def test_ids_outside_the_vocabulary_give_nan_and_write_nothing(kernels_on_cpu):
    logits = draw_logits(1, 3, 100).to(kernels_on_cpu)
    for k in (1, 2):
        ids = torch.tensor([[100, 1], [-1, 1], [2**40, 1]], device=kernels_on_cpu)[:, :k]
        ids = ids.contiguous()
        gathered, log_probs, maximum, log_sum, _ = scan(logits, ids, None, 1.0, False)
        assert gathered[:, 0].isnan().all() and log_probs[:, 0].isnan().all()
        assert maximum.isfinite().all() and log_sum.isfinite().all()
        beta = torch.ones(3, k, device=kernels_on_cpu)
        out = torch.empty_like(logits)
        zero = torch.zeros(3, device=kernels_on_cpu)
        expand(logits, ids, maximum, log_sum, gathered, None, zero, beta, 1.0, out)
        assert out.sum() == 3 * (k - 1)


@pytest.mark.parametrize("vocab", [40, 5000])
def test_infinities_and_nan(kernels_on_cpu, vocab):
    """As log_softmax has it; -inf at the start of a row must not become inf - inf."""
    logits = draw_logits(1, 6, vocab)
    logits[0, 0, : vocab - 1] = -float("inf")  # one word has all the mass
    logits[0, 1, ::2] = -float("inf")
    logits[0, 2] = -float("inf")
    logits[0, 3, vocab // 2] = float("inf")
    logits[0, 4, vocab // 2] = float("nan")
    ids = torch.full((6, 1), vocab - 1)
    _, log_probs, _, _, entropy = scan(
        logits.to(kernels_on_cpu), ids.to(kernels_on_cpu), None, 1.0, True
    )
    expected = logits[0].log_softmax(-1)[:, -1:]
    torch.testing.assert_close(log_probs.cpu(), expected, equal_nan=True)
    assert entropy[0] == 0
    assert entropy[1].isfinite() and entropy[5].isfinite()
    assert entropy[2:5].isnan().all()


def test_large_offsets_and_near_certainty(kernels_on_cpu):
    """A constant of 1e4 costs no digits; where p is nearly 1 the gradient is -expm1(log p)."""
    base = draw_logits(1, 4, 600).double()
    base[..., 3] = base.amax(-1) + torch.tensor([6.0, 9.0, 12.0, 14.0])
    logits = (base.float() * 16).round() / 16 + 1e4  # exact in float32
    ids = torch.full((4, 1), 3)
    truth = logits.double()[0].log_softmax(-1)[:, 3]
    gathered, log_probs, maximum, log_sum, _ = scan(
        logits.to(kernels_on_cpu), ids.to(kernels_on_cpu), None, 1.0, False
    )
    torch.testing.assert_close(log_probs.cpu()[:, 0].double(), truth, rtol=0, atol=3e-7)
    one = torch.ones(4, device=kernels_on_cpu)
    out = torch.empty(logits.shape, device=kernels_on_cpu)
    expand(
        logits.to(kernels_on_cpu), ids.to(kernels_on_cpu), maximum, log_sum, gathered, None,
        -one, one[:, None], 1.0, out,
    )  # fmt: skip
    grad = out.cpu()[0, :, 3].double()
    torch.testing.assert_close(grad, -torch.expm1(truth), rtol=0.05, atol=2e-7)


def test_the_gradient_of_a_likely_label_keeps_its_digits(kernels_on_cpu):
    """1 - p for p from 0.51 to nearly 1, to the rounding of its own log-prob."""
    logits = torch.zeros(1, 40, 8)
    logits[0, :, 3] = torch.linspace(2.0, 16.0, 40)
    logits, ids = logits.to(kernels_on_cpu), torch.full((40, 1), 3, device=kernels_on_cpu)
    gathered, log_probs, maximum, log_sum, _ = scan(logits, ids, None, 1.0, False)
    one, out = torch.ones(40, device=kernels_on_cpu), torch.empty_like(logits)
    expand(
        logits, ids, maximum, log_sum, gathered, None, -one, one[:, None], 1.0, out
    )  # fmt: skip
    expected = -torch.expm1(log_probs[:, 0].double())
    assert 0.48 < expected[0] < 0.49 and expected[-1] < 1e-5
    torch.testing.assert_close(out[0, :, 3].double(), expected, rtol=4e-7, atol=0)


def test_a_constant_added_to_the_logits_changes_no_log_prob(kernels_on_cpu):
    """It leaves in an exact difference; scaled first, logits of 1e5 would round by 0.004."""
    logits = (draw_logits(1, 4, 300) + 1e5).to(kernels_on_cpu)
    ids = ids_for(logits, 3)
    _, log_probs, _, *others = scan(logits, ids, None, 1.3, True)
    _, expected, _, *expected_others = scan(logits - 1e5, ids, None, 1.3, True)
    assert torch.equal(log_probs, expected)
    assert all(map(torch.equal, others, expected_others))


@pytest.fixture
def kernels_unchecked():
    """A GPU, or the plain interpreter: bounds checks would need memory for every element."""
    if torch.cuda.is_available() and KERNELS != "interpret":
        yield torch.device("cuda")
        return
    if KERNELS != "interpret":
        pytest.skip("runs on a GPU and in the interpreter (test_interpreted.py)")
    from drift_gate.fuzz.interpreter import corrected

    with corrected():
        yield torch.device("cpu")


def test_offsets_beyond_32_bits(kernels_unchecked):
    """Rows more than 2^31 elements apart, with no memory touched between them."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=kernels_unchecked)
    view = storage.as_strided((3, 1, 64), (2**30, 64, 1))
    view.copy_(draw_logits(3, 1, 64))
    check(view, ids_for(view, 1))


@pytest.mark.parametrize("rows", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("vocab", [32_000, 151_936])
def test_few_rows_are_shared_by_enough_programs(rows, vocab):
    """What all of them have in flight covers a device's bandwidth times its latency, or is half of
    all that there is to read."""
    at_once, needed = 8 * 132, 4 << 20  # an H200: programs of 256 threads; bytes, of a microsecond
    warps, loads = next(tile[1:] for tile in scan_pass.TILES if vocab <= tile[0])
    tile = lanes.lanes(vocab, 8, warps, loads)
    bytes_of_tile = 2 * tile["LOADS"] * tile["LANES"] * tile["VECTOR"]
    tiles = -(-2 * vocab // bytes_of_tile)
    programs = rows * scan_pass._splits(rows, tiles, at_once)
    assert programs * bytes_of_tile >= min(needed, rows * vocab)
    wide = -(-2 * vocab // expand_pass.TILE_BYTES)
    share = expand_pass.shares(rows, wide, expand_pass.TILES_PER_PROGRAM, at_once)
    assert rows * share * expand_pass.TILE_BYTES >= min(needed, rows * vocab)
