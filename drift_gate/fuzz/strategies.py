"""Problems as hypothesis strategies, for the command and for the tests."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from .evaluate import Problem, build


@functools.cache
def _sampled(options: Sequence[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(options)


@st.composite
def problems(
    draw: st.DrawFn, names: tuple[str, ...], backend: str, device: torch.device
) -> Problem:
    """Any problem of one of these functions."""

    def pick(name: str, options: Sequence[Any]) -> Any:
        return draw(_sampled(tuple(options) if isinstance(options, list) else options))

    return build(draw(_sampled(names)), pick, backend, device)
