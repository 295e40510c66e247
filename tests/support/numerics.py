"""Judge a result by a float64 truth, with the error of eager PyTorch as the budget."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_good_as(
    actual: Tensor, baseline: Tensor, truth64: Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """Assert that `actual` is about as accurate as `baseline`, and rounds without bias.

    Args:
        actual: the result under test, any shape, float dtype.
        baseline: what plain eager PyTorch computes from the same inputs, in the dtype of `actual`.
        truth64: the float64 result, from the same inputs (rounded to their dtype, then widened).
        factor: how many times the baseline's error is allowed.
        name: what the failure message calls the result.

    Fails unless NaN and infinities are where the truth, rounded to the dtype, has them; the largest
    and the rms error are within `factor` of the baseline's plus half a unit in the last place; and
    the mean error towards or away from zero is what unbiased rounding leaves. The slack for a
    baseline that happens to be exact is four float32 units (float64 for float64 results) of the
    largest value. Errors below that are not seen: a float32 result truncated by one unit passes.
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
    slack = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * truth.abs().max()
    half_ulp = torch.finfo(dtype).eps / 2 * truth.abs() + torch.finfo(dtype).tiny + slack
    error, budget = got - truth, (eager - truth).nan_to_num(0.0, 0.0, 0.0)  # no credit for inf

    over = error.abs() - (factor * budget.abs().max() + half_ulp)
    at = int(over.argmax())
    assert over[at] <= 0, (
        f"{name}: error {error[at].abs():.3e} where the truth is {truth[at]:.6g} and the result "
        f"{got[at]:.6g} (finite element {at}); the eager maximum is {budget.abs().max():.3e}, "
        f"allowed are {factor:g} times that; {int((over > 0).sum())} of {over.numel()} are over"
    )
    rms_limit = factor * _rms(budget) + _rms(half_ulp)
    assert _rms(error) <= rms_limit, (
        f"{name}: rms error {_rms(error):.3e}, eager {_rms(budget):.3e}, allowed {rms_limit:.3e}"
    )
    bias, eager_bias = _outward(error, truth), _outward(budget, truth)
    chance = 6 * _rms(error) / truth.numel() ** 0.5  # six standard errors of the mean
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


def _outward(errors: Tensor, truth: Tensor) -> Tensor:
    """The mean error away from zero."""
    return (errors * truth.sign()).mean()
