"""Problems and references of the functions that see no logits: gate weights and spans."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .choices import Choices
from .options import Arguments, Asked, Student, draw_borders, draw_gate, draw_spans
from .shapes import draw_shape, spread_rows
from .values import draw_dtype, draw_mask, draw_old


def draw_positions(choose: Choices) -> Student:
    """Positions alone."""
    shape = draw_shape(choose)
    dtype = draw_dtype(choose, "dtype")
    choose.generator.manual_seed(choose("seed", range(1 << 16)))
    return Student({}, (), {}, torch.zeros(*shape.lead, 1), shape, dtype, 1.0)


def _mask_and_borders(choose: Choices, student: Student) -> tuple[Tensor | None, Arguments]:
    mask = draw_mask(choose, student.shape)
    strided = choose.flag("strided row data")
    moved = None if mask is None else spread_rows(choose, mask, strided)
    borders = draw_borders(choose, student.shape)
    return mask, {"response_mask": moved, "cu_seqlens": borders}


def gate_rest(choose: Choices, student: Student) -> Asked:
    mask, arguments = _mask_and_borders(choose, student)
    gate = draw_gate(choose)
    spans = draw_spans(choose, student.shape, gate.granularity)
    log_probs = -3 * torch.rand(student.shape.lead, generator=choose.generator).double()
    old = draw_old(choose, log_probs)
    if mask is not None:
        log_probs, old = (torch.where(mask, x, torch.nan) for x in (log_probs, old))
    arguments |= spans | {"gate": gate}
    arguments["log_probs"] = log_probs.to(student.dtype).to(choose.device)
    arguments["old_log_probs"] = old.to(student.dtype).to(choose.device)
    return Asked(
        arguments, torch.ones(student.shape.lead, dtype=torch.bool) if mask is None else mask
    )


def spans_rest(choose: Choices, student: Student) -> Asked:
    _, arguments = _mask_and_borders(choose, student)
    labels = torch.randint(6, student.shape.lead, generator=choose.generator)
    if choose.flag("negative labels"):
        labels[labels == 4] = -100
    kind = choose("newline ids", ("one", "several", "a tensor", "absent"))
    ids: Any = {"one": 5, "several": [5, 0], "a tensor": torch.tensor([5, 1]), "absent": []}[kind]
    shortest = choose("min_length", (16, 1, 2, 5))
    arguments |= {
        "labels": labels.to(choose.device),
        "newline_ids": ids,
        "min_length": shortest,
        "max_length": shortest + choose("max_length", (112, 0, 1, 7)),
    }
    return Asked(arguments, None)


def reference_newline_spans(
    labels: Tensor,
    newline_ids: Any,
    response_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    min_length: int,
    max_length: int,
) -> Tensor:
    """Walks the tokens one by one: as the docstring of `newline_spans` tells it."""
    lines = {newline_ids} if isinstance(newline_ids, int) else {int(i) for i in newline_ids}
    valid = labels >= 0 if response_mask is None else response_mask.bool()
    tokens, inside = labels.reshape(-1).tolist(), valid.reshape(-1).tolist()
    length = max(labels.shape[-1], 1)
    borders = [*range(0, len(tokens), length), len(tokens)]
    borders = borders if cu_seqlens is None else cu_seqlens.tolist()
    out = [-1] * len(tokens)
    for start, stop in pairwise(borders):
        response = [i for i in range(start, stop) if inside[i]]
        if not response:
            continue
        spans: list[list[int]] = [[]]
        for i in range(response[0], response[-1] + 1):
            spans[-1].append(i)
            if tokens[i] in lines and len(spans[-1]) >= min_length:
                spans.append([])
        if len(spans) > 1 and len(spans[-1]) < min_length:  # what is left joins the span before it
            rest = spans.pop()
            spans[-1] += rest
        number = 0
        for span in spans:
            while span:
                cut = max_length
                if max_length < len(span) < max_length + min_length:
                    cut = len(span) - len(span) // 2  # the last two pieces, evened out
                for i in span[:cut]:
                    out[i] = number
                span, number = span[cut:], number + 1
    return torch.tensor(out, dtype=torch.int64, device=labels.device).view(labels.shape)
