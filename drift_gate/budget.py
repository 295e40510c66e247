"""The error budget: results are judged by a float64 truth, with eager PyTorch's error as yardstick.

One place for `drift-gate check`, `drift-gate fuzz` and the tests.
"""

from typing import TypeVar

import torch
from torch import Tensor

X = TypeVar("X", Tensor, float)
FACTOR = 2.0
"""How many times the largest error of the eager result is allowed."""


def allowed(
    truth: Tensor, eager_error: Tensor, dtype: torch.dtype, factor: float = FACTOR
) -> Tensor:
    """Largest error that a result of this dtype may have, for each element of `truth` (finite).

    `factor` times the largest eager error, plus half a unit in the last place of the element, plus
    four float32 units (float64 for float64) of the largest value, for an eager result that happens
    to be exact.
    """
    size = truth.abs()
    return allowed_of(size, size.max(), eager_error.max(), dtype, factor)


def allowed_of(
    size: X, largest: X, eager_error: X, dtype: torch.dtype, factor: float = FACTOR
) -> X:
    """`allowed` of elements of this size, beside the largest element and eager error."""
    info = torch.finfo(dtype)
    slack = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest
    return factor * eager_error + info.eps / 2 * size + info.tiny + slack


def share_of_budget(
    got: Tensor, baseline: Tensor, truth64: Tensor, factor: float = FACTOR
) -> Tensor:
    """The error of each element as a fraction of what is allowed: over 1 fails; NaN is infinite.

    Args:
        got: the result, float dtype.
        baseline: what plain eager PyTorch computes from the same inputs, in the dtype of `got`.
        truth64: the float64 result, from the same inputs (rounded to their dtype, then widened).
    """
    error = (got.double() - truth64).abs()
    eager_error = (baseline.double() - truth64).abs()
    shares = error / allowed(truth64, eager_error, got.dtype, factor)
    return shares.nan_to_num(nan=torch.inf)


def assert_as_good_as(
    actual: Tensor,
    baseline: Tensor,
    truth64: Tensor,
    *,
    factor: float = FACTOR,
    name: str = "result",
    together: int = 1,
) -> None:
    """Assert that `actual` is about as accurate as `baseline`, and rounds without bias.

    Arguments as `share_of_budget` has them, any shape; `name` is what the message calls the result.
    `together` neighbours share roundings of what they are made of, as the columns of a word's
    gradient share that of its coefficients: what chance leaves of a mean is judged by their means.

    Fails unless NaN and infinities are where the truth, rounded to the dtype, has them; the largest
    and the rms error are within `factor` of the baseline's plus half a unit in the last place; and
    the mean error towards or away from zero is what unbiased rounding leaves. Errors below a few
    float32 units of the largest value are not seen: a float32 result truncated by one unit passes.
    Nor is a bias seen in a tensor of few elements.
    """
    assert actual.dtype == baseline.dtype, f"{name}: {actual.dtype}, baseline {baseline.dtype}"
    assert actual.shape == baseline.shape == truth64.shape, (
        f"{name}: shape {tuple(actual.shape)}, baseline {tuple(baseline.shape)}, "
        f"truth {tuple(truth64.shape)}"
    )
    dtype = actual.dtype
    got, eager, truth = (t.detach().cpu().double().flatten() for t in (actual, baseline, truth64))
    _assert_same_specials(got, truth.to(dtype).double(), name)

    finite = truth.isfinite() & got.isfinite()
    got, eager, truth = got[finite], eager[finite], truth[finite]
    if not truth.numel():
        return
    error, budget = got - truth, (eager - truth).nan_to_num(0.0, 0.0, 0.0)  # no credit for inf
    limit = allowed(truth, budget.abs(), dtype, factor)
    over = error.abs() - limit
    at = int(over.argmax())
    assert over[at] <= 0, (
        f"{name}: error {error[at].abs():.3e} where the truth is {truth[at]:.6g} and the result "
        f"{got[at]:.6g} (finite element {at}); the eager maximum is {budget.abs().max():.3e}, "
        f"allowed are {factor:g} times that; {int((over > 0).sum())} of {over.numel()} are over"
    )
    rounding = allowed(truth, torch.zeros_like(truth), dtype)
    rms_limit = factor * _rms(budget) + _rms(rounding)
    assert _rms(error) <= rms_limit, (
        f"{name}: rms error {_rms(error):.3e}, eager {_rms(budget):.3e}, allowed {rms_limit:.3e}"
    )
    bias, eager_bias = outward(error, truth), outward(budget, truth)
    means = error
    if together > 1 and bool(finite.all()):
        means = (error * truth.sign()).view(-1, together).mean(1)
    chance = 6 * _rms(means) / means.numel() ** 0.5  # six standard errors of the mean
    slack = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * truth.abs().max()
    bias_limit = chance + factor * eager_bias.abs() + slack
    assert bias.abs() <= bias_limit, (
        f"{name}: biased by {bias:.2e} (negative: towards zero), eager {eager_bias:.2e}, allowed "
        f"{bias_limit:.2e}: truncated instead of rounded?"
    )


def _assert_same_specials(got: Tensor, truth: Tensor, name: str) -> None:
    for kind, wrong in (
        ("NaN", got.isnan() != truth.isnan()),
        ("infinity", (got.isinf() | truth.isinf()) & (got != truth) & ~truth.isnan()),
    ):
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise AssertionError(
                f"{name}: {kind} differs at {int(wrong.sum())} of {wrong.numel()} elements, first "
                f"at flat index {at}: {got[at]:g}, truth {truth[at]:g}"
            )


def _rms(errors: Tensor) -> Tensor:
    return errors.square().mean().sqrt()


def outward(errors: Tensor, truth: Tensor) -> Tensor:
    """The mean error away from zero."""
    return (errors * truth.sign()).mean()
