"""Problems of the `linear_` forms: hidden states and a head in place of the logits.

In float32 and float64; and in float16 with float32 logits. Else the eager code rounds logits of
shorter dtypes, and softcap rounds them three times more: which of two results is nearer the truth
is chance, which the tests average over seeds. Not in bfloat16, of which oneDNN's products carry a
NaN into the row before it where rows have an odd length.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Head
from .choices import Choices
from .options import Arguments, Asked, Student
from .shapes import draw_shape, draw_vocab, place
from .values import DTYPES

WIDTHS = (3, 1, 8, 33)
CHUNKS = (None, 1, 2, 7, 33)
HEAD_ONLY = "inplace_backward"


def draw_headed(choose: Choices, kinds: tuple[str, ...] = ("flat", "padded", "packed")) -> Student:
    """Hidden states and a head; NaN in one row of the hidden states, or not."""
    shape = draw_shape(choose, kinds)
    vocab, width = draw_vocab(choose, max(shape.rows, 8)), choose("width", WIDTHS)
    wanted = DTYPES.get(choose("logits dtype", ("of the head", "float32")))
    names = ("float32", "float64") if choose.wide else ("float32",)
    dtype = DTYPES[choose("dtype", names if wanted is None else (*names, "float16"))]
    choose.generator.manual_seed(choose("seed", range(1 << 16)))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=choose.generator)

    size = choose("head", (1.0, 0.0, 4.0))
    hidden, weight = normal(*shape.lead, width), size * normal(vocab, width)
    head, finite = _draw_head(choose, normal, hidden, weight, dtype, wanted)
    temperature = choose("temperature", (1.0, 0.7, 2.0))
    rows = hidden.reshape(-1, width)
    if choose.flag("nan row") and len(rows):
        rows[len(rows) // 2] = torch.nan
    given, around = place(choose, "hidden_states", rows.view(hidden.shape), dtype)
    arguments: Arguments = {"temperature": temperature, "hidden_states": given, "head": head.given}
    leaves = ("hidden_states", *head.storages)
    storages = {"hidden_states": around, **head.storages}
    return Student(arguments, leaves, storages, finite, shape, dtype, temperature)


class Drawn(NamedTuple):
    given: Head | Tensor
    storages: dict[str, Tensor]
    """Memory of its tensors, by path."""


def _draw_head(
    choose: Choices,
    normal: Any,
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    wanted: torch.dtype | None,
) -> tuple[Drawn, Tensor]:
    """A head of this weight, or the weight alone; and the logits."""
    finite = hidden @ weight.T
    view, around = place(choose, "weight", weight, dtype)
    if wanted is None and choose.flag("a weight as head"):
        return Drawn(view, {"head": around}), finite
    storages, bias = {"head.weight": around}, None
    if choose.flag("bias"):
        drawn = normal(len(weight))
        finite = finite + drawn
        bias = storages["head.bias"] = drawn.to(dtype).to(choose.device)
    softcap = choose("softcap", (None, 5.0, 0.5))
    if softcap is not None:
        finite = softcap * torch.tanh(finite / softcap)
    scale = choose("logit scale", (1.0, 0.25, 3.0))
    head = Head(view, bias, softcap, scale, choose("chunk size", CHUNKS), wanted)
    return Drawn(head, storages), scale * finite


def headed(rest: Any) -> Any:
    """The rest of a loss's arguments as its `linear_` form takes them."""

    def drawn(choose: Choices, student: Student) -> Asked:
        arguments, valid, storages = rest(choose, student)
        arguments.pop(HEAD_ONLY, None)
        return Asked(arguments, valid, storages)

    return drawn


def known_log_probs(rest: Any) -> Any:
    """And the current log-probs, where the caller has them."""

    def drawn(choose: Choices, student: Student) -> Asked:
        arguments, valid, storages = rest(choose, student)
        if arguments["labels"] is not None and choose.flag("log_probs"):
            labels = arguments["labels"]
            values = -torch.rand(labels.shape, generator=choose.generator)
            arguments["log_probs"] = values.to(choose.device)
        return Asked(arguments, valid, storages)

    return drawn


def two_heads(rest: Any) -> Any:
    """A teacher's head in place of its logits."""

    def drawn(choose: Choices, student: Student) -> Asked:
        arguments, valid, storages = rest(choose, student)
        logits = arguments.pop("teacher_logits")
        storages = {k: v for k, v in storages.items() if k != "teacher_logits"}
        width, generator = choose("teacher width", (2, 9)), choose.generator
        hidden = torch.randn(*logits.shape[:-1], width, generator=generator)
        weight = torch.randn(logits.shape[-1], width, generator=generator)
        arguments["teacher_hidden_states"] = hidden.to(student.dtype).to(choose.device)
        weight = weight.to(student.dtype).to(choose.device)
        short = student.dtype.itemsize < 4
        if not short and choose.flag("a weight as teacher head"):
            return Asked(arguments | {"teacher_head": weight}, valid, storages)
        bias = None
        if choose.flag("teacher bias"):
            bias = torch.randn(len(weight), generator=generator).to(student.dtype)
        arguments["teacher_head"] = Head(
            weight,
            None if bias is None else bias.to(choose.device),
            choose("teacher softcap", (None, 2.0)),
            choose("teacher logit scale", (1.0, 0.25, 3.0)),
            logits_dtype=DTYPES.get(
                choose("teacher logits dtype", ("of the head", "float32")[short:])
            ),
        )
        return Asked(arguments, valid, storages)

    return drawn
