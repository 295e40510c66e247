"""Arguments that the losses share: the student's logits, row data, gate and reduction."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..choices import AGGREGATES, GRANULARITIES, NORMALIZE, REDUCTIONS
from ..gate import DriftGate
from ..options import Reduction, as_reduction
from .choices import Choices
from .shapes import OVERLAPS, Shape, draw_shape, draw_vocab, overlapping, place, spread_rows
from .values import (
    draw_dtype,
    draw_labels,
    draw_logits,
    draw_mask,
    draw_old,
    draw_specials,
    log_probs_of,
)

MASK_DTYPES = {
    "bool": torch.bool,
    "int64": torch.int64,
    "float32": torch.float32,
    "uint8": torch.uint8,
}
BLOCK_SIZES = (64, 1, 2, 3, 7, 32, 10**9)
GRANULARITY = ("block", *(x for x in GRANULARITIES if x != "block"))
SIZES: dict[str, Any] = {
    "a number": 37,
    "a tensor": 37.0,
    "0": 0,
    "a tensor of 0": 0.0,
}
"""Denominators of the caller. One of 0 is that of a batch without rows; else the loss is none."""
Arguments = dict[str, Any]


class Student(NamedTuple):
    """Where the logits come from: the arguments that carry them, and what they hold."""

    arguments: Arguments
    leaves: tuple[str, ...]
    """Arguments that get gradients."""
    storages: dict[str, Tensor]
    """Memory of arguments that are views."""
    finite: Tensor
    """The logits without specials, float32 on the CPU: what labels are sampled from."""
    shape: Shape
    dtype: torch.dtype
    temperature: float

    @property
    def vocab(self) -> int:
        return self.finite.shape[-1]


class Rows(NamedTuple):
    """The positions of a batch: who is valid, what was sampled."""

    arguments: Arguments
    labels: Tensor  # [*lead] int64, all of them words
    valid: Tensor  # [*lead] bool
    log_probs: Tensor  # [*lead] float64, of the labels


class Asked(NamedTuple):
    """All arguments of a function, and which rows were asked for; the others must give 0."""

    arguments: Arguments
    valid: Tensor | None  # [*lead] bool; None: all
    storages: Mapping[str, Tensor] = MappingProxyType({})
    """Memory of arguments that are views, the student's left out."""


def draw_student(choose: Choices, kinds: tuple[str, ...] = ("flat", "padded", "packed")) -> Student:
    """Logits that a model has produced."""
    shape = draw_shape(choose, kinds)
    vocab = draw_vocab(choose, shape.rows)
    dtype = draw_dtype(choose, "dtype")
    choose.generator.manual_seed(choose("seed", range(1 << 16)))
    finite = draw_logits(choose, "logits", *shape.lead, vocab).to(dtype).float()
    values = draw_specials(choose, "special", finite)
    overlap = choose("logits overlap", OVERLAPS)
    if overlap == "no":
        logits, storage = place(choose, "logits", values, dtype)
    else:
        finite = overlapping(overlap, finite)[0].clone()
        logits, storage = overlapping(overlap, values.to(dtype).to(choose.device))
    temperature = choose("temperature", (1.0, 0.7, 2.0, 0.05, 100.0))
    arguments = {"logits": logits, "temperature": temperature}
    leaves = "logits"
    return Student(arguments, (leaves,), {leaves: storage}, finite, shape, dtype, temperature)


def draw_rows(choose: Choices, student: Student, *, masked: bool = True) -> Rows:
    """Labels, and with `masked` a response mask and borders."""
    words = draw_labels(choose, student.finite)
    log_probs = log_probs_of(student.finite, words, student.temperature)
    ignore_index = choose("ignore index", (-100, 0, -1, 10**6, None))
    labels = words.clone()
    if choose.flag("ignored labels") and ignore_index is not None:
        share = torch.rand(labels.shape, generator=choose.generator)
        labels = torch.where(share < 0.3, ignore_index, labels)
    valid = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        valid = labels != ignore_index
    strided = choose.flag("strided row data")
    arguments: Arguments = {"ignore_index": ignore_index}
    if masked:
        mask = draw_mask(choose, student.shape)
        if mask is not None:
            valid = valid & mask
            labels = torch.where(mask, labels, choose("masked labels", (0, 10**8, -7)))
            mask = mask.to(MASK_DTYPES[choose("mask dtype", tuple(MASK_DTYPES))])
            arguments["response_mask"] = spread_rows(choose, mask, strided)
        arguments["cu_seqlens"] = draw_borders(choose, student.shape)
    if choose.flag("int32 labels"):
        labels = labels.int()
    arguments["labels"] = spread_rows(choose, labels, strided)
    return Rows(arguments, words, valid, log_probs)


def draw_borders(choose: Choices, shape: Shape) -> Tensor | None:
    if shape.cu_seqlens is None:
        return None
    dtype = torch.int32 if choose.flag("int32 cu_seqlens") else torch.int64
    return torch.tensor(shape.cu_seqlens, dtype=dtype, device=choose.device)


def row_data(choose: Choices, name: str, values: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Log-probs as an argument: rounded to a dtype, and anything where no row is valid."""
    kind = choose(f"{name} dtype", ("float32", "as the logits", "float64"))
    values = values.to(dtype if kind == "as the logits" else getattr(torch, kind))
    if not rows.valid.all():
        ignored = float(choose(f"ignored {name}", ("nan", "inf", "-1e30")))
        values = torch.where(rows.valid, values, ignored)
    return spread_rows(choose, values, choose.flag(f"strided {name}"))


def draw_gate(choose: Choices, unit: str = "token") -> DriftGate:
    """A gate; `unit` is that of the ratio, which shares its block size."""
    granularity: Any = choose("granularity", GRANULARITY)
    of_blocks = "block" in (granularity, unit)
    return DriftGate(
        granularity,
        block_size=choose("block size", BLOCK_SIZES) if of_blocks else 64,
        tau=choose("tau", (1.0, 0.0, 0.1, 30.0, 1e6)),
        aggregate=choose("aggregate", AGGREGATES),  # type: ignore[arg-type]
        normalize=choose("normalize", NORMALIZE),  # type: ignore[arg-type]
        sample_every=choose("sample_every", (1, 2, 3, 8)),
    )


def draw_spans(choose: Choices, shape: Shape, *units: str) -> Arguments:
    """Span ids, where a unit is the span."""
    if "span" not in units:
        return {}
    far = choose("span ids", (0, -3, 1 << 40, 1 << 62))
    ids = far + torch.randint(4, shape.lead, generator=choose.generator)  # not adjacent
    return {"span_ids": ids.to(choose.device)}


def draw_row_weights(choose: Choices, rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """Weights of the caller beside the gate's; a row of weight 0 is not read."""
    kind = choose("row weights", ("absent", "some 0", "any sign"))
    if kind == "absent":
        return None
    weights = torch.randn(rows.labels.shape, generator=choose.generator)
    if kind == "some 0":
        kept = torch.rand(weights.shape, generator=choose.generator) < 0.6
        weights = weights.abs() * kept
    return row_data(choose, "row_weights", weights, rows, dtype)


def draw_reduction(choose: Choices, shape: Shape) -> Arguments:
    """`reduction`: a mode as a string or an object, or with the caller's denominators."""
    mode = choose("reduction", tuple(REDUCTIONS))
    options: Arguments = {}
    given = choose("denominator", ("of the call", *SIZES))
    if given != "of the call":
        size = SIZES[given]
        if given.startswith("a tensor"):
            size = torch.tensor(size, device=choose.device)
        options["global_batch_size" if mode.startswith("seq-") else "batch_num_tokens"] = size
        options["dp_size"] = choose("dp_size", (1, 4))
    packed = shape.cu_seqlens is not None
    if mode == "seq-mean-token-sum-norm":
        own = choose("loss_scale_factor", (11.0, 0.5) if packed else (None, 11.0, 0.5))
        options |= {} if own is None else {"loss_scale_factor": own}
    if not options and not choose.flag("reduction as an object"):
        return {"reduction": mode}
    return {"reduction": Reduction(mode, **options)}


def divides_by_0(arguments: Arguments) -> bool:
    """Whether the caller's denominator is 0."""
    how = as_reduction(arguments.get("reduction", "token-mean"))
    return any(x is not None and x == 0 for x in (how.batch_num_tokens, how.global_batch_size))


def draw_gated(choose: Choices, student: Student, rows: Rows, unit: str = "token") -> Arguments:
    """What every loss takes beside its teacher; `unit` is that of the ratio."""
    shape = student.shape
    arguments = {**student.arguments, **rows.arguments, **draw_reduction(choose, shape)}
    gate: DriftGate | Tensor | None = None
    if choose.flag("weights as gate"):
        weights = 2 * torch.rand(shape.lead, generator=choose.generator)
        weights = -weights if choose.flag("negative weights") else weights
        gate = row_data(choose, "weights", weights, rows, student.dtype)
    elif not choose.flag("no gate"):
        gate = draw_gate(choose, unit)
    arguments["gate"] = gate
    granularity = gate.granularity if isinstance(gate, DriftGate) else "token"
    arguments |= draw_spans(choose, shape, granularity, unit)
    arguments["row_weights"] = draw_row_weights(choose, rows, student.dtype)
    arguments["old_log_probs"] = None
    if isinstance(gate, DriftGate) or not choose.flag("no old log-probs"):
        old = draw_old(choose, rows.log_probs)
        arguments["old_log_probs"] = row_data(choose, "old_log_probs", old, rows, student.dtype)
    arguments["return_entropy"] = choose.flag("return_entropy")
    arguments["inplace_backward"] = choose.flag("inplace_backward")
    arguments["validate"] = choose.flag("validate")
    return arguments
