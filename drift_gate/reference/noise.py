"""What rounding of the logits does to a drift.

Logits of a dtype lie u(z) apart at z: 2^(floor(log2 |z|) - bits of the mantissa). Each is taken to
be off by an even error within +-u / 2, independent of the others; the error of log p_y is then

    e_y - sum_v p_v e_v = (1 - p_y) e_y - sum over the others of p_v e_v

and the drift has two such errors, of the old log-prob and of the current one. The difference of two
even errors has the mean size u / 3, so the mean |drift| of unmoved policies is about

    sqrt(((1 - p_y) u(z_y))^2 + sum over the others of (p_v u(z_v))^2) / 3

Of the other words the largest counts as it is. The rest of the mass is taken to halve from word to
word, with squares that sum to rest^2 / 3, and to rest times the largest p at most; its logits lie
as far apart as those of the largest.
"""

import torch
from torch import Tensor

BITS = {torch.bfloat16: 7, torch.float16: 10}
"""Of the mantissa, without the leading one. Longer dtypes are taken not to be rounded."""
TIED = 1e-4
"""Nats within which a label counts as the largest word."""


def spacing(z: Tensor, bits: int, scale: float) -> Tensor:
    """How far apart logits lie where scale times one of them is z; 0 at 0 and at infinities."""
    size = (z / scale).abs() * (1 + 2.0**-13)  # z, divided and multiplied, may lie below a power
    power = torch.exp2(torch.floor(torch.log2(size)))
    return torch.where((size == 0) | size.isinf(), 0, power * 2.0**-bits * scale)


def noise(
    z: Tensor,  # [..., V]
    log_p: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    rows: Tensor,  # [...] bool: where it is wanted
    dtype: torch.dtype,  # of the logits
    scale: float,  # z is so many times the logits
) -> Tensor:
    """The mean |drift| that rounding alone would show, [...]; 0 on other rows."""
    if dtype not in BITS:
        return torch.zeros_like(z[..., 0])
    words = torch.where(rows, labels, 0).long()[..., None]
    own, p = z.gather(-1, words)[..., 0], log_p.gather(-1, words)[..., 0].exp()
    top, largest = z.amax(-1), log_p.amax(-1).exp()
    beside = torch.where(top - own < TIED, 0, largest)
    rest = (1 - p - beside).clamp(min=0)
    squares = torch.minimum(rest.square() / 3, rest * largest) + beside.square()
    apart = spacing(own, BITS[dtype], scale) * (1 - p)
    others = spacing(top, BITS[dtype], scale)
    return torch.where(rows, (apart.square() + others.square() * squares).sqrt() / 3, 0)
