"""Imports verl as its processes do: with this package's module named in their environment."""

from __future__ import annotations

import os
import sys

MODULE = "drift_gate.integrations.verl"

os.environ["VERL_USE_EXTERNAL_MODULES"] = MODULE
import verl  # noqa: E402, F401

loaded = MODULE in sys.modules
del os.environ["VERL_USE_EXTERNAL_MODULES"]
