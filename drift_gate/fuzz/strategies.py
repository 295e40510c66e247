"""Problems as hypothesis strategies, for the command and for the tests."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from .evaluate import Problem, build


@functools.cache
def _sampled(options: Sequence[Any], kinds: tuple[type, ...]) -> st.SearchStrategy[Any]:
    """`kinds` are the options' own: 1, 1.0 and True are equal."""
    return st.sampled_from(options)


@st.composite
def problems(
    draw: st.DrawFn, names: tuple[str, ...], backends: tuple[str, ...], device: torch.device
) -> Problem:
    """Any problem of one of these functions."""

    def pick(name: str, options: Sequence[Any]) -> Any:
        if isinstance(options, range):
            return draw(_sampled(options, (int,)))
        return draw(_sampled(tuple(options), tuple(map(type, options))))

    return build(draw(_sampled(names, (str,))), pick, backends, device)
