"""The error budget, which `drift-gate check` and `drift-gate fuzz` hold results to as well."""

from drift_gate.budget import assert_as_good_as

__all__ = ["assert_as_good_as"]
