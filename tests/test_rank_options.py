"""Ranks that differ in an option: every one of every function is told, or is a rank's own.

Ranks are threads here, see `drift_gate.fuzz.local_ranks`.
"""

from __future__ import annotations

import dataclasses
import inspect
import threading
from typing import Any

import pytest
import torch
from support.calls import FUNCTIONS, LOSSES, arguments_of

import drift_gate as dg
from drift_gate.fuzz.local_ranks import run_ranks
from drift_gate.fuzz.tensors import replaced

SHAPE = (2, 9)
PLACES = torch.arange(9).expand(SHAPE)
SPANS = {"span_ids": PLACES // 3}
OWN = {
    "logits", "hidden_states", "head.weight", "teacher_logits", "teacher_hidden_states",
    "teacher_head.weight", "teacher_topk_ids", "teacher_topk_log_probs", "teacher_log_probs",
    "ids", "response_mask", "cu_seqlens", "span_ids", "head", "teacher_head", "parallel",
    "reduction", "backend", "validate", "inplace_backward", "teacher_head.chunk_size",
}  # fmt: skip
"""A rank's data, or how it computes; what must be None; objects, whose fields are looked at."""
OBJECTS = {"clip": dg.Clip, "gate": dg.DriftGate, "head": dg.Head, "teacher_head": dg.Head}
OBJECTS["reduction"] = dg.Reduction
Options = dict[str, Any]
BY_TOKENS = {"reduction.mode": "token-mean"}
BY_SEQUENCES = {"reduction.mode": "seq-mean-token-sum-norm"}
TOLD: dict[str, tuple[Any, Any, Options]] = {
    "k": (3, 4, {}),
    "labels": (..., None, {"gate": None, "old_log_probs": None}),
    "old_log_probs": (..., None, {"gate": None}),
    "position_ids": (PLACES, None, {}),
    "log_probs": (-torch.ones(SHAPE), None, {}),
    "row_weights": (torch.ones(SHAPE), None, {}),
    "gate": (dg.DriftGate(), None, {}),
    "gate.granularity": ("block", "token", {}),
    "gate.block_size": (64, 3, {}),
    "gate.tau": (1.0, 1.5, {}),
    "gate.aggregate": ("mean", "rms", {}),
    "gate.normalize": ("batch", "none", {}),
    "gate.sample_every": (1, 2, {}),
    "estimator": ("ppo", "importance", {}),
    "clip": (dg.Clip(), dg.Clip(kl=False), {}),
    "clip.low": (0.2, 0.25, {}),
    "clip.high": (0.2, 0.25, {}),
    "clip.dual": (3.0, None, {}),
    "clip.advantage": (None, (-1.0, 2.0), {}),
    "clip.kl": (True, False, {}),
    "advantages": (None, torch.ones(SHAPE), {}),
    "advantage": ("old", "current", {}),
    "ratio": ("token", "sequence", {}),
    "teacher_log_prob_min": (None, -9.0, {}),
    "direction": ("reverse", "forward", {}),
    "support": ("truncated", "tail", {}),
    "beta": (0.5, 0.25, {"direction": "jsd"}),
    "teacher_temperature": (1.0, 2.0, {}),
    "log_prob_floor": (None, -9.0, {"support": "tail"}),
    "zero_outside_topk": (False, True, {"support": "truncated"}),
    "ignore_unknown_ids": (False, True, {}),
    "vocab_size": (21, 20, {"labels": torch.zeros(SHAPE, dtype=torch.long)}),
    "temperature": (1.0, 2.0, {}),
    "ignore_index": (-100, None, {}),
    "return_entropy": (False, True, {}),
    "reduction.mode": ("token-mean", "token-sum", {}),
    "reduction.dp_size": (1, 2, BY_TOKENS),
    "reduction.batch_num_tokens": (37, torch.tensor(38.0), BY_TOKENS),
    "reduction.global_batch_size": (4, torch.tensor([5]), BY_SEQUENCES),
    "reduction.loss_scale_factor": (7.0, 8.0, BY_SEQUENCES),
    "head.bias": (..., None, {}),
    "head.softcap": (5.0, None, {}),
    "head.logit_scale": (1.0, 2.0, {}),
    "head.chunk_size": (4, 5, {}),
    "head.logits_dtype": (None, torch.float32, {}),
    "teacher_head.bias": (torch.zeros(21), None, {}),
    "teacher_head.softcap": (5.0, 6.0, {}),
    "teacher_head.logit_scale": (1.0, 2.0, {}),
    "teacher_head.logits_dtype": (None, torch.float32, {}),
}
"""Options in which ranks may not differ: two values, and what else they need. ...: as it is."""


def options_of(name: str) -> list[str]:
    found = []
    for option, parameter in inspect.signature(getattr(dg, name)).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        found.append(option)
        fields = dataclasses.fields(OBJECTS[option]) if option in OBJECTS else ()
        found += [f"{option}.{field.name}" for field in fields]
    if name == "gate_weights":  # its data, which elsewhere may be absent
        found = [x for x in found if x not in ("log_probs", "old_log_probs", "gate")]
    return found


def is_asked(name: str, option: str) -> bool:
    """Whether ranks may try to differ: some functions need labels."""
    parameter = inspect.signature(getattr(dg, name)).parameters.get(option)
    needed = option == "labels" and "None" not in str(parameter.annotation)
    return option in TOLD and not needed


CASES = [
    (name, option) for name in FUNCTIONS for option in options_of(name) if is_asked(name, option)
]


def test_every_option_is_told_or_a_rank_s_own():
    for name in FUNCTIONS:
        unknown = set(options_of(name)) - TOLD.keys() - OWN
        assert not unknown, (name, unknown)


def call(name: str, option: str, value: Any, group: Options) -> None:
    """The function with this value of the option."""
    signature = inspect.signature(getattr(dg, name)).parameters
    arguments = dict(zip(signature, arguments_of(name, *SHAPE), strict=False))
    arguments |= {"k": 3} if "k" in signature else {}
    arguments |= {k: form() for k, form in OBJECTS.items() if k in signature and k not in arguments}
    changed = {k: x for k, x in TOLD[option][2].items() if k.partition(".")[0] in signature}
    changed |= {} if value is ... else {option: value}
    getattr(dg, name)(**replaced(arguments, changed), parallel=dg.Parallel(**group))


@pytest.mark.parametrize(("name", "option"), CASES)
def test_ranks_that_differ_in_an_option_are_refused(name: str, option: str):
    values = TOLD[option][:2]
    field = "group" if name in LOSSES or name == "gate_weights" else "vocab_parallel_group"
    said: list[str] = []
    everyone = threading.Barrier(2, timeout=30)

    def work(rank: int, group: Options) -> None:
        try:
            call(name, option, values[rank], group)
        except ValueError as error:
            said.append(str(error))
        everyone.wait()

    run_ranks(2, work, {field: [[0, 1]]})
    first, second = (x.partition(": ")[2] for x in said)
    assert first == second and first.startswith("ranks 0 and 1 disagree about"), said


def test_ranks_that_share_their_options_agree():
    """Numbers of another type, tensors of one among them, are the same number."""
    sizes = 37, torch.tensor(37.0)

    def work(rank: int, group: Options) -> torch.Tensor:
        reduction = dg.Reduction(batch_num_tokens=sizes[rank])
        options = {"reduction": reduction, "temperature": (1, 1.0)[rank]}
        parallel = dg.Parallel(**group)
        return dg.opd_loss(*arguments_of("opd_loss", *SHAPE), parallel=parallel, **options).loss

    assert all(loss.isfinite() for loss in run_ranks(2, work))


@pytest.mark.parametrize("name", ["topk_loss"])
def test_ranks_that_share_words_list_as_many(name: str):
    """Of other rows lists may be of any length."""

    def work(rank: int, group: Options) -> str:
        arguments = list(arguments_of(name, *SHAPE))
        arguments[3:] = [x[..., : 2 + rank] for x in arguments[3:]]
        try:
            getattr(dg, name)(*arguments, parallel=dg.Parallel(**group))
        except ValueError as error:
            return str(error)
        return ""

    for said in run_ranks(2, work, {"vocab_parallel_group": [[0, 1]]}):
        assert "disagree about words_of_a_row: 2.0 and 3.0" in said
    assert run_ranks(2, work) == ["", ""]
