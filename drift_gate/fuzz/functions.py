"""The public functions that are fuzzed. A new one is one `Function` in FUNCTIONS.

A function's problem is its `student` (what carries the logits) and the `rest` of its arguments.
Its reference is the function itself with backend="reference", unless it has one of its own.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .. import (
    Clip,
    full_loss,
    gate_weights,
    gather_lse,
    linear_full_loss,
    linear_gather_lse,
    linear_opd_loss,
    linear_token_log_probs,
    linear_topk_loss,
    newline_spans,
    opd_loss,
    reference,
    token_log_probs,
    top_k_log_probs,
    topk_loss,
)
from ..choices import ADVANTAGES, DIRECTIONS, ESTIMATORS, FULL_DIRECTIONS, GRANULARITIES, SUPPORTS
from . import without_logits
from .choices import Choices
from .heads import draw_headed, headed, known_log_probs, two_heads
from .options import Arguments, Asked, Rows, Student, draw_gated, draw_rows, draw_student, row_data
from .parts import divided, in_parts, undivided
from .shapes import place
from .top_k import NOT_ASKED, through_head, top_k
from .values import draw_dtype, draw_logits, draw_specials

CLIPS = {
    "verl's": Clip(),
    "tight": Clip(low=0.0, high=0.0, dual=1.5, advantage=0.5),
    "loose": Clip(low=0.9, high=4.0, dual=20.0, advantage=2.0),
    "without dual": Clip(dual=None),
    "two bounds": Clip(low=0.1, high=0.3, advantage=(-0.5, 2.0)),
}
TEMPERATURES = (None, 1.0, 0.5, 3.0)
BETAS = (0.5, 0.1, 0.9, 0.0, 1.0)


class Function(NamedTuple):
    call: Callable[..., Any]
    rest: Callable[[Choices, Any], Asked]
    student: Callable[[Choices], Any] = draw_student
    reference: Callable[..., Any] | None = None
    """Takes the same arguments; None: `call` with backend="reference"."""
    not_asked: Mapping[str, float] = MappingProxyType({})
    """What results hold in rows that were not asked for, where that is not 0."""


def opd(choose: Choices, student: Student) -> Asked:
    rows = draw_rows(choose, student)
    estimator = choose("estimator", tuple(ESTIMATORS))
    if not ESTIMATORS[estimator].ratio:
        arguments = draw_gated(choose, student, rows)
        if choose.flag("unbounded k3"):
            arguments["clip"] = Clip(kl=False)
        given = False
    else:
        unit = choose("ratio", tuple(GRANULARITIES))
        arguments = draw_gated(choose, student, rows, unit) | {"ratio": unit}
        arguments["clip"] = CLIPS[choose("clip", tuple(CLIPS))]
        arguments["advantage"] = choose("advantage", ADVANTAGES)
        given = choose.flag("advantages")
    arguments["estimator"] = estimator
    return Asked(arguments | _target(choose, student, rows, given), rows.valid)


def _target(choose: Choices, student: Student, rows: Rows, given: bool) -> Arguments:
    """The teacher's log-probs, or advantages where these are given."""
    away = torch.randn(rows.labels.shape, generator=choose.generator)
    if given:
        advantages = row_data(choose, "advantages", away, rows, student.dtype)
        return {"advantages": advantages, "teacher_log_probs": None}
    teacher = rows.log_probs + away
    data = row_data(choose, "teacher_log_probs", teacher, rows, student.dtype)
    floor = choose("teacher_log_prob_min", (None, -1.0, -8.0))
    return {"teacher_log_probs": data, "teacher_log_prob_min": floor}


def _labels_optional(choose: Choices, student: Student) -> tuple[Rows, Arguments]:
    """Rows and shared arguments of the losses that need labels for the gate alone."""
    rows = draw_rows(choose, student)
    arguments = draw_gated(choose, student, rows)
    if arguments["old_log_probs"] is None and choose.flag("no labels"):
        mask = rows.arguments.get("response_mask")
        valid = torch.ones_like(rows.valid) if mask is None else mask.cpu().bool()
        arguments["labels"] = None
        known = rows.valid.to(choose.device)
        for name in ("gate", "row_weights"):  # what was ignored with its label is not
            if isinstance(arguments[name], torch.Tensor):
                arguments[name] = torch.where(known, arguments[name], 0.5)
        rows = rows._replace(valid=valid)
    return rows, arguments


def _direction(choose: Choices, directions: tuple[str, ...]) -> Arguments:
    return {"direction": choose("direction", directions), "beta": choose("beta", BETAS)}


def topk(choose: Choices, student: Student) -> Asked:
    rows, arguments = _labels_optional(choose, student)
    words = student.vocab
    several = words > 1
    support = choose("support", tuple(x for x in SUPPORTS if several or x != "renormalized"))
    fewest = 2 if support == "renormalized" else 1
    longest = min(words, choose.longest)
    k = choose("k", tuple(k for k in (2, 1, 3, 8, 17, 33, longest) if fewest <= k <= longest))
    noise = torch.randn(student.finite.shape, generator=choose.generator)
    log_q, ids = (student.finite + noise).log_softmax(-1).topk(k)
    log_q += choose("teacher share", (-0.01, -3.0, 0.0))
    if support == "renormalized" and choose.flag("raw teacher logits"):
        log_q += 50.0
    if k > 1 and choose.flag("a word twice"):
        ids[..., 1] = ids[..., 0]
        arguments["validate"] = False
    if k > 1 and choose.flag("words in any place again"):
        ids = ids.gather(-1, torch.randint(k, ids.shape, generator=choose.generator))
        arguments["validate"] = False
    arguments["ignore_unknown_ids"] = choose.flag("ignore_unknown_ids")
    if arguments["ignore_unknown_ids"]:
        unknown = torch.rand(ids.shape, generator=choose.generator) < 0.2
        ids = torch.where(unknown, choose("unknown ids", (words, 2**31 - 1)), ids)
    absent = torch.rand(ids.shape, generator=choose.generator) < 0.3
    missing = choose("missing entries", ("none", "id -1", "-inf", "all of a row"))
    if missing == "id -1":
        ids[absent] = -1
    elif missing == "-inf":
        log_q[absent] = -torch.inf
    elif missing == "all of a row" and ids.numel():
        ids.view(-1, k)[len(ids.view(-1, k)) // 2] = -1
    present = (ids >= 0) & (ids < words) & (log_q > -torch.inf)
    valid = rows.valid & present.any(-1)
    if choose.flag("garbage in ignored lists"):
        ids = torch.where(rows.valid[..., None], ids, 10**7)
    arguments |= _direction(choose, DIRECTIONS) | {"support": support}
    if support == "renormalized":
        arguments["teacher_temperature"] = choose("teacher temperature", TEMPERATURES)
    else:
        arguments["log_prob_floor"] = choose("log_prob_floor", (None, -2.0, -10.0))
        outside = support == "truncated" and arguments["direction"] in ("reverse", "mixed")
        if outside and arguments["log_prob_floor"] is None:
            arguments["zero_outside_topk"] = choose.flag("zero_outside_topk")
    arguments["teacher_topk_ids"] = (ids.int() if choose.flag("int32 ids") else ids).to(
        choose.device
    )
    dtype = getattr(torch, choose("teacher dtype", ("float32", "bfloat16", "float64")))
    arguments["teacher_topk_log_probs"] = log_q.to(dtype).to(choose.device)
    return Asked(arguments, valid)


def full(choose: Choices, student: Student) -> Asked:
    rows, arguments = _labels_optional(choose, student)
    *lead, words = student.finite.shape
    shared = words
    teacher_words = words
    if choose.flag("vocab_size"):
        shared = max(words - choose("padding words", (1, 0, 9)), 1)
        teacher_words = shared + choose("teacher padding words", (0, 1, 17))
        arguments["vocab_size"] = shared
    if arguments["labels"] is not None:  # sampled among all words
        labels = arguments["labels"]
        beyond = (labels >= shared) & rows.valid.to(labels.device)
        arguments["labels"] = torch.where(beyond, 0, labels)
        if arguments["ignore_index"] == 0:
            rows = rows._replace(valid=rows.valid & ~beyond.cpu())
    kind = choose("teacher", ("near", "equal", "far", "other"))
    teacher = torch.zeros(*lead, teacher_words)
    teacher[..., :shared] = student.finite[..., :shared]
    size = {"near": 0.5, "equal": 0.0, "far": 10.0, "other": 1.0}[kind]
    teacher += size * torch.randn(teacher.shape, generator=choose.generator)
    if kind == "other":
        teacher = draw_logits(choose, "teacher logits", *lead, teacher_words)
    dtype = draw_dtype(choose, "teacher dtype")
    teacher = draw_specials(choose, "teacher special", teacher.to(dtype).float())
    view, storage = place(choose, "teacher", teacher, dtype)
    arguments |= _direction(choose, FULL_DIRECTIONS) | {"teacher_logits": view}
    arguments["teacher_temperature"] = choose("teacher temperature", TEMPERATURES)
    return Asked(arguments, rows.valid, {"teacher_logits": storage})


def log_probs(choose: Choices, student: Student) -> Asked:
    rows = draw_rows(choose, student, masked=False)
    arguments = student.arguments | rows.arguments
    arguments["return_entropy"] = choose.flag("return_entropy")
    arguments["inplace_backward"] = choose.flag("inplace_backward")
    return Asked(arguments, rows.valid)


def lse(choose: Choices, student: Student) -> Asked:
    words = student.vocab
    longest = min(words, choose.longest)
    k = choose("k", tuple(k for k in (1, 2, 5, 17, 65, longest) if k <= longest))
    ids = torch.randint(words, (*student.shape.lead, k), generator=choose.generator)
    ids = ids.int() if choose.flag("int32 ids") else ids
    return Asked(student.arguments | {"ids": ids.to(choose.device)}, None)


def _unpacked(choose: Choices) -> Student:
    return draw_student(choose, ("flat", "padded"))


def _unpacked_head(choose: Choices) -> Student:
    return draw_headed(choose, ("flat", "padded"))


ROWS = "rows", "positions"
LOGITS = *ROWS, "words"

FUNCTIONS: dict[str, Function] = {
    "opd_loss": Function(in_parts(opd_loss), divided(opd, LOGITS, steps=True)),
    "topk_loss": Function(in_parts(topk_loss), divided(topk, LOGITS, steps=True)),
    "full_loss": Function(in_parts(full_loss), divided(full, ROWS, steps=True)),
    "token_log_probs": Function(
        in_parts(token_log_probs), divided(log_probs, ("words",)), _unpacked
    ),
    "gather_lse": Function(in_parts(gather_lse), divided(lse, ("words",)), _unpacked),
    "linear_opd_loss": Function(
        in_parts(linear_opd_loss), divided(headed(opd), ROWS, steps=True), draw_headed
    ),
    "linear_topk_loss": Function(
        in_parts(linear_topk_loss),
        divided(known_log_probs(headed(topk)), ROWS, steps=True),
        draw_headed,
    ),
    "linear_full_loss": Function(
        in_parts(linear_full_loss), divided(two_heads(headed(full)), ROWS, steps=True), draw_headed
    ),
    "linear_token_log_probs": Function(linear_token_log_probs, headed(log_probs), _unpacked_head),
    "linear_gather_lse": Function(linear_gather_lse, lse, _unpacked_head),
    "top_k_log_probs": Function(
        in_parts(top_k_log_probs), divided(top_k, ("words",)), _unpacked, not_asked=NOT_ASKED
    ),
    "linear_top_k_log_probs": Function(through_head, top_k, _unpacked_head, not_asked=NOT_ASKED),
    "gate_weights": Function(
        in_parts(gate_weights),
        divided(without_logits.gate_rest, ROWS),
        without_logits.draw_positions,
        undivided(reference.gate_weights),
        {"block_ids": -1.0},
    ),
    "newline_spans": Function(
        newline_spans,
        without_logits.spans_rest,
        without_logits.draw_positions,
        without_logits.reference_newline_spans,
    ),
}
