"""`backend="reference"`: the specification in the place of a loss."""

from collections.abc import Callable, Mapping
from typing import Any

# Of the public functions alone: where and how they run, and what their checks have seen to.
NOT_OF_THE_REFERENCE = (
    "position_ids", "parallel", "inplace_backward", "validate", "backend", "ignore_unknown_ids",
)  # fmt: skip


def by_reference(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What the reference's function of the same name returns; `given` has the arguments by name."""
    from .. import reference

    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    run = getattr(reference, function.__name__)
    return run(**{name: given[name] for name in names if name not in NOT_OF_THE_REFERENCE})
