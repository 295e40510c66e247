"""The Triton passes `divergence` and `divergence_grad` against float64, on a GPU or checked."""

from __future__ import annotations

import math

import pytest
import torch
from drift_gate.kernels.divergence import divergence
from drift_gate.kernels.divergence_grad import divergence_grad
from support.numerics import assert_as_good_as
from support.problems import peaked_logits
from torch import Tensor

from drift_gate import reference

DIRECTIONS = ["reverse", "forward", "jsd"]
EACH_DIRECTION = pytest.mark.parametrize("direction", DIRECTIONS)
SCALE, TEACHER_SCALE, BETA = 1.25, 0.8, 0.3


def eager(x: Tensor, y: Tensor, labels: Tensor, valid: Tensor, upstream: Tensor, direction: str):
    """Loss, log-probs, entropy and gradient [N, V], in the dtype of x; y [N, U]."""
    z = x.clone().requires_grad_()
    out = reference.full_loss(
        z, labels, None, y, direction=direction, beta=BETA, vocab_size=y.shape[1],
        temperature=1 / SCALE, teacher_temperature=1 / TEACHER_SCALE, gate=None,
        response_mask=valid, reduction="none", return_entropy=True,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, z, upstream.to(x.dtype))
    return out.loss.detach(), out.log_probs, out.entropy, grad


def differentiate(x, y, statistics, valid, upstream, direction: str, out: Tensor) -> None:
    divergence_grad(x, y, statistics, valid, upstream, SCALE, TEACHER_SCALE, direction, BETA, out)


def run(x: Tensor, y: Tensor, labels, valid: Tensor, upstream: Tensor, direction: str):
    """The same and the statistics from the kernels, for x [B, T, V] and y [B, T, U]."""
    loss, log_probs, statistics, entropy = divergence(
        x, y, labels, valid, SCALE, TEACHER_SCALE, direction, BETA, True
    )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    differentiate(x, y, statistics, valid, upstream, direction, out)
    return loss, log_probs, entropy, out, statistics


def check(x: Tensor, y: Tensor, directions=DIRECTIONS, valid: Tensor | None = None) -> None:
    """Every output on x [B, T, V] and y [B, T, U]; the gradient also in place."""
    n = x.shape[0] * x.shape[1]
    device, generator = x.device, torch.Generator().manual_seed(3)
    labels = torch.randint(y.shape[2], (n,), generator=generator)
    upstream = torch.randn(n, generator=generator)
    if n > 2:
        upstream[1] = 0
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    row_data = labels.to(device), valid.to(device), upstream.to(device)
    rows = [t.cpu().reshape(n, -1) for t in (x, y)]
    for direction in directions:
        got = run(x, y, *row_data, direction)
        narrow = eager(*(t.float() for t in rows), labels, valid, upstream, direction)
        truth = eager(*(t.double() for t in rows), labels, valid, upstream, direction)
        for i, name in enumerate(("loss", "log_probs", "entropy", "gradient")):
            actual = got[i].cpu().reshape(truth[i].shape)
            assert_as_good_as(
                actual, narrow[i].to(actual.dtype), truth[i], name=f"{direction} {name}"
            )
        copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        differentiate(copy, y, got[4], *row_data[1:], direction, copy)
        assert torch.equal(copy, got[3]), f"{direction}: in place differs"


def draw(*shape: int, dtype=torch.float32, teacher_dtype=None) -> tuple[Tensor, Tensor]:
    """Logits of a student, and of a teacher some way off, shifted by a constant."""
    generator = torch.Generator().manual_seed(0)
    x = peaked_logits(*shape, generator=generator)
    y = x + torch.randn(*shape, generator=generator) + 3
    return x.to(dtype), y.to(teacher_dtype or dtype)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),  # one layout for vectors of 8 and of 4
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_dtypes(kernels_on_cpu, dtype, teacher_dtype):
    """Two full tiles of the gradient and a partial third; three and more of the forward."""
    x, y = draw(1, 2, 9000, dtype=dtype, teacher_dtype=teacher_dtype)
    check(x.to(kernels_on_cpu), y.to(kernels_on_cpu))


@pytest.mark.parametrize(
    "vocab",
    [
        1,  # every loss is 0
        2,
        127,  # one under, at and over a tile of the smallest size
        128,
        129,
        4096,  # the tile of the forward (bf16) and of the backward
        4097,
        2053,  # odd: no row but the first starts on a 16-byte boundary
    ],
)
def test_tile_borders(kernels_on_cpu, vocab):
    x, y = draw(1, 5, vocab, dtype=torch.bfloat16)
    check(x.to(kernels_on_cpu), y.to(kernels_on_cpu))


@pytest.mark.parametrize(
    ("width", "teacher_width"),
    [
        (304, 320),  # aligned, with different strides
        (301, 309),  # rows at offsets that change alike in both
        (301, 304),  # or not: nothing is aligned
    ],
)
def test_strides(kernels_on_cpu, width, teacher_width):
    """Views of NaN-filled buffers: rows padded, a position left out, in place between them."""
    views = []
    for values, w in zip(draw(2, 3, 300), (width, teacher_width), strict=True):
        buffer = torch.full((2, 4, w), float("nan"), dtype=torch.bfloat16)
        views.append(buffer.to(kernels_on_cpu)[:, :-1, :300].copy_(values))
    check(*views, ["jsd", "forward"])
    valid = torch.ones(6, dtype=torch.bool, device=kernels_on_cpu)
    statistics = torch.ones(5, 6, device=kernels_on_cpu)
    differentiate(*views, statistics, valid, statistics[0], "jsd", views[0])
    for view in views:
        outside = torch.ones_like(view._base, dtype=torch.bool)
        outside[:, :-1, :300] = False
        assert view._base[outside].isnan().all()


def test_a_storage_that_starts_off_a_16_byte_boundary(kernels_on_cpu):
    x, y = draw(1, 3, 256, dtype=torch.bfloat16)
    storage = torch.empty(3 * 256 + 1, dtype=torch.bfloat16, device=kernels_on_cpu)
    check(storage[1:].view(1, 3, 256).copy_(x), y.to(kernels_on_cpu))


@pytest.mark.parametrize("shared", [100, 4096, 290])
def test_the_students_words_beyond_the_teachers_get_no_gradient(kernels_on_cpu, shared):
    """More padding than a tile, a border on one, and one within."""
    x, y = draw(1, 3, 300 if shared < 300 else 9000, dtype=torch.bfloat16)
    x[..., shared:] = float("nan")
    y = y[..., :shared].to(kernels_on_cpu)
    check(x.nan_to_num().to(kernels_on_cpu), y, ["forward"])
    labels = torch.zeros(3, dtype=torch.int64, device=kernels_on_cpu)
    arguments = labels, labels == 0, torch.ones(3, device=kernels_on_cpu)
    *_, grad, _ = run(
        x.to(kernels_on_cpu), y[..., :shared].to(kernels_on_cpu), *arguments, "reverse"
    )
    assert grad[..., :shared].isfinite().all()
    assert (grad[..., shared:] == 0).all()


@EACH_DIRECTION
def test_rows_that_are_not_valid_are_not_read(kernels_on_cpu, direction):
    x, y = (t.to(kernels_on_cpu) for t in draw(1, 6, 200))
    valid = torch.tensor([1, 0, 1, 0, 0, 1], dtype=torch.bool, device=kernels_on_cpu)
    labels = torch.arange(6, device=kernels_on_cpu)
    upstream = torch.ones(6, device=kernels_on_cpu)
    expected = [t.clone() for t in run(x, y, labels, valid, upstream, direction)]
    for t in (x, y):
        t[0, ~valid] = float("nan")
    labels[~valid], upstream[~valid] = -100, float("nan")
    results = run(x, y, labels, valid, upstream, direction)
    for got, wanted in zip(results[:4], expected, strict=False):
        assert torch.equal(got, wanted)
        assert (got.view(6, -1)[~valid] == 0).all()


@EACH_DIRECTION
@pytest.mark.parametrize("vocab", [5000, 2053])  # aligned; rows that start anywhere
def test_a_shorter_gradient_is_the_float32_one_rounded(kernels_on_cpu, direction, vocab):
    """As float32 logits of a head have it; the teacher lacks three words."""
    x, y = (t.to(kernels_on_cpu) for t in draw(1, 3, vocab))
    y = y[..., : vocab - 3]
    labels, upstream = (torch.arange(3, device=kernels_on_cpu) for _ in range(2))
    valid, upstream = labels >= 0, upstream.float()
    *_, expected, statistics = run(x, y, labels, valid, upstream, direction)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    differentiate(x, y, statistics, valid, upstream, direction, out)
    assert torch.equal(out, expected.bfloat16())


def test_rows_whose_upstream_is_0_are_not_read(kernels_on_cpu):
    x = torch.full((1, 2, 150), float("nan"), device=kernels_on_cpu)
    out, statistics = torch.full_like(x, float("nan")), torch.zeros(5, 2, device=kernels_on_cpu)
    valid = statistics[0] == 0
    divergence_grad(x, x, statistics, valid, statistics[0], 1.0, 1.0, "jsd", 0.5, out)
    assert (out == 0).all()


def test_labels_outside_the_vocabulary_give_nan_and_none_give_0(kernels_on_cpu):
    x, y = (t.to(kernels_on_cpu) for t in draw(1, 3, 100))
    labels = torch.tensor([100, -1, 2**40], device=kernels_on_cpu)
    valid, upstream = labels != 7, torch.ones(3, device=kernels_on_cpu)
    loss, log_probs, *_ = run(x, y, labels, valid, upstream, "reverse")
    assert log_probs.isnan().all() and loss.isfinite().all()
    other, log_probs, *_ = run(x, y, None, valid, upstream, "reverse")
    assert torch.equal(loss, other) and (log_probs == 0).all()


@EACH_DIRECTION
@pytest.mark.parametrize("vocab", [40, 5000])
def test_minus_infinity_and_nan(kernels_on_cpu, vocab, direction):
    """Values are those of the definition; whole rows of NaN where it has one."""
    x, y = draw(1, 11, vocab)
    inf = float("inf")
    x[0, 0, : vocab - 1] = -inf  # one word has all the mass; infinite for "forward"
    x[0, 1, ::2] = -inf
    y[0, 1, ::2] = -inf  # words that neither has
    y[0, 2, ::3] = -inf  # infinite for "reverse"
    x[0, 3], y[0, 4] = -inf, -inf
    x[0, 5, 7], y[0, 6, 7] = float("nan"), float("nan")
    x[0, 7, vocab // 2], y[0, 8, vocab // 2] = inf, inf
    x[0, 9, 3] = -1e4  # its probability underflows, and it is no -inf
    y[0, 9, 3] = -inf
    labels = torch.full((11,), vocab - 1)
    valid, ones = torch.ones(11, dtype=torch.bool), torch.ones(11)
    truth = eager(x[0].double(), y[0].double(), labels, valid, ones, direction)
    data = (t.to(kernels_on_cpu) for t in (x, y, labels, valid, ones))
    loss, _, entropy, grad, _ = (t.cpu() for t in run(*data, direction))
    torch.testing.assert_close(loss.double(), truth[0], equal_nan=True, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy.double(), truth[2], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert loss[[3, 4, 5, 6, 7, 8]].isnan().all()
    finite = loss.isfinite()
    # The slope is a log-ratio less the loss: where one word has all the mass, a unit of either.
    unit = SCALE * torch.finfo(torch.float32).eps * float(loss[finite].max())
    torch.testing.assert_close(
        grad[0, finite].double(), truth[3][finite], rtol=1e-3, atol=max(1e-6, unit)
    )
    assert grad[0, loss.isnan()].isnan().all()


@EACH_DIRECTION
@pytest.mark.parametrize("vocab", [40, 5000])
def test_masks_of_the_lowest_finite_number(kernels_on_cpu, vocab, direction):
    """Count as -inf where that is finite; where it is infinite, the loss is huge and no NaN."""
    x, y = draw(1, 4, vocab, dtype=torch.bfloat16)
    lowest = torch.finfo(torch.bfloat16).min
    x[0, :2, : vocab // 2] = lowest
    y[0, 1:3, : vocab // 2] = lowest
    huge = {"reverse": [2], "forward": [0], "jsd": []}[direction]
    labels = torch.full((4,), vocab - 1)
    valid, ones = torch.ones(4, dtype=torch.bool), torch.ones(4)
    truth = eager(x[0].double(), y[0].double(), labels, valid, ones, direction)
    data = (t.to(kernels_on_cpu) for t in (x, y, labels, valid, ones))
    loss, _, entropy, grad, _ = (t.cpu() for t in run(*data, direction))
    assert (loss > 1e20).nonzero()[:, 0].tolist() == huge
    good = [row for row in range(4) if row not in huge]
    torch.testing.assert_close(loss[good].double(), truth[0][good], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy.double(), truth[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad[0, good].double(), truth[3][good], rtol=1e-2, atol=1e-6)


def test_equal_models_have_no_divergence(kernels_on_cpu):
    x, _ = draw(1, 4, 3000)
    x = x.to(kernels_on_cpu)
    valid = torch.ones(4, dtype=torch.bool, device=kernels_on_cpu)
    for direction in ("reverse", "forward"):
        arguments = valid, 1.0, 1.0, direction, 0.5
        loss, _, statistics, _ = divergence(x, x, None, *arguments, False)
        out = torch.empty_like(x)
        divergence_grad(x, x, statistics, valid, torch.ones_like(loss), *arguments[1:], out)
        assert (loss == 0).all() and (out == 0).all()


@EACH_DIRECTION
def test_a_constant_added_to_the_logits_changes_no_bit(kernels_on_cpu, direction):
    """It leaves in an exact difference; large products would round where the sums did not."""
    pair = [t + 1e5 for t in draw(1, 4, 300)]
    labels = torch.arange(4, device=kernels_on_cpu)
    row_data = labels, labels >= 0, torch.ones(4, device=kernels_on_cpu)
    x, y = (t.to(kernels_on_cpu) for t in pair)
    results = run(x, y, *row_data, direction)
    expected = run(x - 1e5, y - 1e5, *row_data, direction)
    for got, wanted in zip(results[:4], expected, strict=False):
        assert torch.equal(got, wanted)


def test_masses_sum_to_1_where_the_scale_is_large(kernels_on_cpu):
    """Logits of 100 at a temperature of 1 / 20, models that share no word: the JSD is log 2."""
    x, y = (20 * t + 100 for t in draw(1, 4, 600))
    y = y.flip(-1)
    data = [t.to(kernels_on_cpu) for t in (x, y)]
    valid = torch.ones(4, dtype=torch.bool, device=kernels_on_cpu)
    loss, *_ = divergence(*data, None, valid, 20.0, 20.0, "jsd", 0.5, False)
    torch.testing.assert_close(loss.cpu(), torch.full((4,), math.log(2)), rtol=1e-6, atol=0)


def test_no_rows(kernels_on_cpu):
    x = torch.empty(2, 0, 7, device=kernels_on_cpu)
    row = torch.empty(0, device=kernels_on_cpu)
    *_, out, _ = run(x, x, row.long(), row.bool(), row, "reverse")
    assert out.shape == x.shape
