"""What tensors hold: logits, labels, masks, and log-probs of the old policy and the teacher."""

import torch
from torch import Tensor

from .choices import Choices
from .shapes import Shape

LOGITS = ("noise", "peaked", "certain", "equal", "wide", "offset", "negative offset", "integers")
SPECIALS = ("none", "-inf words", "-inf row", "+inf", "nan")
DRIFTS = ("near", "none", "far", "beyond the clamps", "1e30", "infinite", "nan")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def draw_dtype(choose: Choices, name: str) -> torch.dtype:
    names = tuple(DTYPES)
    return DTYPES[choose(name, names if choose.wide else names[:3])]


def _randn(choose: Choices, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=choose.generator)


def _rand(choose: Choices, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=choose.generator)


def draw_logits(choose: Choices, name: str, *shape: int) -> Tensor:
    """float32 [*shape] on the CPU, finite."""
    kind = choose(name, LOGITS)
    if kind == "equal":
        return torch.zeros(*shape)
    if kind == "integers":
        return torch.randint(-2, 3, shape, generator=choose.generator).float()
    logits = 2 * _randn(choose, *shape)
    if kind in ("peaked", "certain"):
        winner = torch.randint(shape[-1], (*shape[:-1], 1), generator=choose.generator)
        lift = 12 * _rand(choose, *shape[:-1], 1) if kind == "peaked" else 60.0
        logits += torch.zeros(*shape).scatter_(-1, winner, 1.0) * lift
    if kind == "wide":
        logits *= 20
    if kind.endswith("offset"):
        logits += -1e4 if kind.startswith("negative") else 1e4
    return logits


def draw_specials(choose: Choices, name: str, logits: Tensor) -> Tensor:
    """The logits with infinities or NaN in some places."""
    kind = choose(name, SPECIALS)
    rows = logits.reshape(-1, logits.shape[-1])
    if kind == "none" or not len(rows):
        return logits
    rows = rows.clone()
    row = len(rows) // 2
    if kind == "-inf words":
        hidden = _rand(choose, *rows.shape) < 0.3
        rows[hidden & (rows < rows.amax(-1, keepdim=True))] = -torch.inf  # each row keeps a word
    elif kind == "-inf row":
        rows[row] = -torch.inf
    else:
        rows[row, rows.shape[1] // 2] = torch.inf if kind == "+inf" else torch.nan
    return rows.view(logits.shape)


def draw_labels(choose: Choices, logits: Tensor) -> Tensor:
    """int64 words [...], sampled from finite logits or not."""
    kind = choose("labels", ("sampled", "any", "likeliest"))
    vocab = logits.shape[-1]
    if kind == "any":
        return torch.randint(vocab, logits.shape[:-1], generator=choose.generator)
    if kind == "likeliest":
        return logits.argmax(-1)
    noise = -torch.log(-torch.log(_rand(choose, *logits.shape).clamp(1e-9, 1 - 1e-7)))
    return (logits + noise).argmax(-1)


def draw_mask(choose: Choices, shape: Shape) -> Tensor | None:
    """bool [*lead], or None."""
    kind = choose("mask", ("absent", "all", "some", "late", "a hole", "nothing"))
    if kind == "absent":
        return None
    mask = torch.ones(shape.lead, dtype=torch.bool)
    rows = mask.view(-1)
    if kind == "some":
        rows &= _rand(choose, len(rows)) < 0.6
    elif kind == "late":
        mask[..., : mask.shape[-1] // 2] = False
    elif kind == "a hole":
        mask[..., mask.shape[-1] // 3 : mask.shape[-1] * 2 // 3] = False
    elif kind == "nothing":
        mask[:] = False
    return mask


def log_probs_of(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """float64 log-prob of each label."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[..., None])[..., 0]


def draw_old(choose: Choices, log_probs: Tensor) -> Tensor:
    """Log-probs of the old policy: the present ones and a drift."""
    kind = choose("drift", DRIFTS)
    if kind == "none":
        return log_probs.clone()
    size = {"near": 0.3, "far": 3.0, "beyond the clamps": 30.0}.get(kind, 1.0)
    old = log_probs + size * _randn(choose, *log_probs.shape)
    special = {"1e30": 1e30, "infinite": torch.inf, "nan": torch.nan}.get(kind)
    if special is not None and old.numel():
        struck = _rand(choose, *old.shape) < 0.4
        sign = torch.where(_rand(choose, *old.shape) < 0.5, -1.0, 1.0).double()
        old = torch.where(struck, sign * special, old)
    return old
