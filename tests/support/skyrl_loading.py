"""Imports SkyRL, on Python 3.11 too: there pydantic refuses the standard library's TypedDict."""

from __future__ import annotations

import sys
import typing

import pytest

pytest.importorskip("skyrl", reason="make test-integrations installs it")
pytest.importorskip("ray", reason="SkyRL needs ray, which the pinned set has up to Python 3.12")
if sys.version_info < (3, 11):
    pytest.skip("SkyRL needs StrEnum", allow_module_level=True)

import typing_extensions

stock = typing.TypedDict
if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict  # type: ignore[misc]
from skyrl.backends.skyrl_train.utils import ppo_utils  # noqa: E402, F401

typing.TypedDict = stock  # type: ignore[misc]
