"""The loss L of a position, a function of its log-prob alone, and its slope dL/d logp.

    ppo         max(-r A, -clip(r, 1 - low, 1 + high) A), for A < 0 at most -dual A
    importance  -r A
    cispo       -sg(clip(r, 1 - low, 1 + high)) A logp          (MiniMax-M1, arXiv 2506.13585)
    k1, k2, k3  of the reverse KL, with x = target - logp: -x, x^2 / 2, exp(x) - x - 1
    given       the target itself

A is the advantage: target - old, target - logp held fixed, or the target. r is the ratio to the
sampling policy, of the token or the geometric mean over its block, span or sequence. Minima and
maxima drop NaN; a NaN input must not become a number.
"""

import triton
import triton.language as tl


@triton.jit
def _advantage(now, old, target, least, most, ADVANTAGE: tl.constexpr):
    """A, within [least, most]."""
    tl.static_assert(
        ADVANTAGE == "old" or ADVANTAGE == "current" or ADVANTAGE == "given", "unknown advantage"
    )
    if ADVANTAGE == "old":
        a = target - old
    elif ADVANTAGE == "current":
        a = target - now
    else:
        a = target
    return tl.where(a == a, tl.minimum(tl.maximum(a, least), most), a)


@triton.jit
def _ratio_loss(now, log_ratio, advantage, clip_low, clip_high, dual, ESTIMATOR: tl.constexpr):
    """Losses of the ratio r and the advantage; the slope; whether the clip is active.

    clip_low, clip_high: bounds of r. log_ratio: within +-20, beyond which r has no slope.
    """
    ratio = tl.exp(tl.minimum(tl.maximum(log_ratio, -20.0), 20.0))
    bounded = tl.minimum(tl.maximum(ratio, clip_low), clip_high)
    if ESTIMATOR == "cispo":
        slope = -bounded * advantage
        loss = slope * now
        clipped = (ratio < clip_low) | (ratio > clip_high)
    else:
        loss = -advantage * ratio
        slope = tl.where(tl.abs(log_ratio) <= 20.0, loss, 0.0)
        clipped = loss != loss
    if ESTIMATOR == "ppo":
        limit = -advantage * bounded
        clipped = limit > loss
        slope = tl.where(clipped, 0.0, slope)
        loss = tl.maximum(loss, limit)
        ceiling = -advantage * dual
        over = (advantage < 0.0) & (loss > ceiling)
        slope = tl.where(over, 0.0, slope)
        loss = tl.where(over, ceiling, loss)
    bad = (log_ratio != log_ratio) | (advantage != advantage)
    loss = tl.where(bad, float("nan"), loss)
    return loss, tl.where(bad, float("nan"), slope), clipped


@triton.jit
def _divergence_loss(now, target, ESTIMATOR: tl.constexpr, CLAMP: tl.constexpr):
    """k1, k2, k3 of the reverse KL (Schulman 2020); the slope. CLAMP: k3 as verl holds it."""
    log_ratio = now - target
    if ESTIMATOR == "k1":
        loss = log_ratio
        slope = log_ratio * 0.0 + 1.0
    elif ESTIMATOR == "k2":
        loss = 0.5 * log_ratio * log_ratio
        slope = log_ratio
    elif CLAMP:
        bounded = tl.minimum(tl.maximum(-log_ratio, -20.0), 20.0)
        ratio = tl.exp(bounded)
        loss = ratio - bounded - 1.0
        passes = (tl.abs(log_ratio) <= 20.0) & (loss <= 10.0)
        slope = tl.where(passes, 1.0 - ratio, 0.0)
        loss = tl.minimum(loss, 10.0)
        slope = tl.where(log_ratio == log_ratio, slope, log_ratio)
        loss = tl.where(log_ratio == log_ratio, loss, log_ratio)
    else:
        ratio = tl.exp(-log_ratio)
        loss = ratio + log_ratio - 1.0
        slope = 1.0 - ratio
    return loss, slope


@triton.jit
def position_loss(
    now,
    old,
    log_ratio,
    target,
    clip_low,
    clip_high,
    dual,
    least,
    most,
    ESTIMATOR: tl.constexpr,
    ADVANTAGE: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """L of each row, dL/d logp, and whether the clip is active."""
    RATIO: tl.constexpr = ESTIMATOR == "ppo" or ESTIMATOR == "importance" or ESTIMATOR == "cispo"
    DIRECT: tl.constexpr = ESTIMATOR == "k1" or ESTIMATOR == "k2" or ESTIMATOR == "k3"
    tl.static_assert(RATIO or DIRECT or ESTIMATOR == "given", "unknown estimator")
    if RATIO:
        advantage = _advantage(now, old, target, least, most, ADVANTAGE)
        loss, slope, clipped = _ratio_loss(
            now, log_ratio, advantage, clip_low, clip_high, dual, ESTIMATOR
        )
    elif DIRECT:
        loss, slope = _divergence_loss(now, target, ESTIMATOR, CLAMP)
        clipped = loss != loss
    else:
        loss = target
        slope = tl.full(target.shape, 1.0, tl.float32)
        clipped = loss != loss
    return loss, slope, clipped
