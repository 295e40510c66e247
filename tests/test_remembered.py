"""Checks of options whose results are kept: what is found again is what would be found anew."""

from __future__ import annotations

import dataclasses
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from drift_gate import Clip
from drift_gate.call import lists, sampled

CHECKS = {"position": sampled._rule, "kind": lists.kind_of}
EACH_CHECK = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)

POSITION = ("ppo", 0.2, 0.2, 3.0, None, True, "old", "token", None, False)
OTHER_POSITIONS = {
    "estimator": "k3",
    "low": 0.1,
    "high": 0.3,
    "dual": None,
    "bounds": 2.0,
    "kl": False,
    "advantage": "current",
    "ratio": "block",
    "teacher_log_prob_min": -5.0,
    "given": True,
}
FULL, LISTED = ("reverse", "truncated", 0.5, None, None, False), ("jsd", "renormalized", 0.5)
OTHER_KINDS = {  # from where each can be changed alone
    "direction": (FULL, "mixed"),
    "support": (FULL, "tail"),
    "beta": (FULL, 0.25),
    "log_prob_floor": (FULL, -9.0),
    "teacher_temperature": ((*LISTED, None, None, False), 2.0),
    "zero_outside_topk": (FULL, True),
}
CLIPS = {"low": 0.1, "high": 0.3, "dual": 2.0, "advantage": 2.0, "kl": False}


def names_of(check: Any) -> list[str]:
    return list(inspect.signature(check.__wrapped__).parameters)


def kept_of(check: Any) -> Any:
    """The mapping, as `functools.lru_cache` shows it."""
    return inspect.getclosurevars(check).nonlocals["kept"]


def changed(options: tuple, name: str, value: object, check: Any) -> tuple:
    at = names_of(check).index(name)
    return (*options[:at], value, *options[at + 1 :])


CHANGES = [(CHECKS["position"], name, POSITION, x) for name, x in OTHER_POSITIONS.items()]
CHANGES += [(CHECKS["kind"], name, base, x) for name, (base, x) in OTHER_KINDS.items()]


def test_every_option_is_changed_below():
    assert list(OTHER_POSITIONS) == names_of(sampled._rule)
    assert list(OTHER_KINDS) == names_of(lists.kind_of)
    assert set(CLIPS) == {field.name for field in dataclasses.fields(Clip)}


@pytest.mark.parametrize(
    ("check", "name", "base", "value"), CHANGES, ids=lambda x: getattr(x, "__name__", str(x)[:24])
)
def test_an_option_that_differs_is_another_key(check, name, base, value):
    other = changed(base, name, value, check)
    for options in (base, other, base, other):  # the second time they are there
        assert check(*options) == check.__wrapped__(*options)
    assert check(*base) is check(*base) and check(*base) != check(*other)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Clip)])
def test_a_field_of_a_clip_that_differs_is_another_rule(field):
    clips = Clip(), Clip(**{field: CLIPS[field]})
    first, other = (sampled.position_of("ppo", clip, "old", "token", None, False) for clip in clips)
    assert first != other


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (Clip(low=1), Clip(low=True)),
        (Clip(dual=2.0), Clip(dual="2")),
        (Clip(advantage=1), Clip(advantage=True)),
        (Clip(advantage=(0, 1)), Clip(advantage=(False, 1))),
    ],
    ids=str,
)
def test_what_is_equal_but_no_number_is_refused_after_it(right, wrong):
    options = "old", "token", None, False
    sampled.position_of("ppo", right, *options)
    for _ in range(2):  # an error is not kept
        with pytest.raises(TypeError, match=r"^clip\.\w+ must be a number; got"):
            sampled.position_of("ppo", wrong, *options)


def test_a_bool_is_no_beta_after_an_integer():
    lists.kind_of("jsd", "tail", 1)
    with pytest.raises(TypeError, match="beta must be a number; got bool"):
        lists.kind_of("jsd", "tail", True)


def test_options_that_cannot_be_hashed_are_named():
    with pytest.raises(TypeError, match="beta must be a number; got list"):
        lists.kind_of("jsd", "tail", [0.5])


@EACH_CHECK
def test_errors_are_not_kept(check):
    before = kept_of(check).cache_info().currsize
    for _ in range(3):
        with pytest.raises(ValueError, match="must be one of"):
            check(*["unheard of"] * len(names_of(check)))
    assert kept_of(check).cache_info().currsize == before


def test_a_bounded_number_is_kept_and_threads_find_their_own():
    def found(i: int) -> bool:
        options = "jsd", "tail", i % 700 / 700
        return lists.kind_of(*options) == lists.kind_of.__wrapped__(*options)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(found, range(4000)))
    info = kept_of(lists.kind_of).cache_info()
    assert info.currsize == info.maxsize == 256


@EACH_CHECK
def test_nothing_is_kept_or_looked_up_where_a_call_is_traced(check, monkeypatch):
    options = POSITION if check is sampled._rule else FULL
    check(*options)
    before = kept_of(check).cache_info()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert check(*options) == check.__wrapped__(*options)
    assert kept_of(check).cache_info() == before
