"""`newline_spans`: lines become spans, short ones joined, long ones cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_gate import newline_spans

NEWLINE = 7


def lengths_of(ids: torch.Tensor) -> list[int]:
    return torch.unique_consecutive(ids[ids >= 0], return_counts=True)[1].tolist()


def line(length: int) -> list[int]:
    return [1] * (length - 1) + [NEWLINE]


def spans(tokens: list[int], **options) -> list[int]:
    return lengths_of(newline_spans(torch.tensor(tokens), NEWLINE, **options))


def test_a_line_is_a_span():
    assert spans(line(20) + line(30) + [1] * 17) == [20, 30, 17]


def test_short_lines_are_joined():
    assert spans(line(5) + line(5) + line(6) + line(40)) == [16, 40]
    assert spans(line(20) + line(3)) == [23]  # what is left at the end joins the span before
    assert spans(line(3)) == [3]  # and alone is a span of its own


def test_long_lines_are_cut():
    assert spans(line(300), max_length=128) == [128, 128, 44]
    assert spans(line(129), max_length=128) == [65, 64]  # not 128 and 1


def test_text_without_newlines_falls_into_fixed_blocks():
    assert spans([1] * 192, max_length=64) == [64, 64, 64]


def test_spans_begin_and_end_with_the_response():
    tokens = torch.tensor([[1] * 10 + line(20) + line(20) + [0] * 5])
    mask = torch.zeros(1, 55, dtype=torch.bool)
    mask[0, 10:50] = True
    mask[0, 30:33] = False  # masked inside: it counts, and has an id
    ids = newline_spans(tokens, NEWLINE, response_mask=mask)
    assert ids[0].tolist() == [-1] * 10 + [0] * 20 + [1] * 20 + [-1] * 5
    tokens[0, :10] = -100  # negative labels end a response as a mask does
    tokens[0, 50:] = -100
    assert torch.equal(newline_spans(tokens, NEWLINE), ids)


def test_packed_sequences_are_cut_apart():
    tokens = torch.tensor(line(20) * 3)
    borders = torch.tensor([0, 30, 30, 60])
    ids = newline_spans(tokens, NEWLINE, cu_seqlens=borders)
    assert ids.tolist() == [0] * 30 + [0] * 30  # 20 and a rest of 10; 10 and 20
    padded = newline_spans(tokens.view(2, 30), NEWLINE)
    assert torch.equal(padded.flatten(), ids)


def test_several_newline_tokens():
    tokens = torch.tensor([1] * 19 + [8] + [1] * 19 + [9])
    for newline_ids in ([8, 9], (8, 9), torch.tensor([8, 9])):
        assert lengths_of(newline_spans(tokens, newline_ids)) == [20, 20]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tokens=st.lists(st.sampled_from([1, 1, 1, NEWLINE]), min_size=1, max_size=200),
    min_length=st.integers(1, 20),
    extra=st.integers(0, 40),
)
def test_bounds(tokens, min_length, extra):
    """No span exceeds the maximum; with room for it none is shorter than the minimum."""
    max_length = min_length + extra
    lengths = spans(tokens, min_length=min_length, max_length=max_length)
    assert sum(lengths) == len(tokens)
    assert max(lengths) <= max_length
    if len(tokens) >= min_length and max_length >= 2 * min_length - 1:
        assert min(lengths) >= min_length


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_length": 0}, ValueError, "min_length must be at least 1"),
        ({"min_length": 9, "max_length": 8}, ValueError, "at most max_length"),
        ({"min_length": 1.5}, TypeError, "min_length must be an int"),
        ({"newline_ids": ["\n"]}, TypeError, "newline_ids must be ints"),
        ({"labels": torch.rand(4)}, TypeError, "labels must be int64 or int32"),
        ({"response_mask": torch.ones(5)}, ValueError, "response_mask must have the shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must rise from 0 to 4"),
    ],
)
def test_bad_input(options, error, message):
    arguments = {"labels": torch.ones(4, dtype=torch.int64), "newline_ids": NEWLINE, **options}
    labels, newline_ids = arguments.pop("labels"), arguments.pop("newline_ids")
    with pytest.raises(error, match=message):
        newline_spans(labels, newline_ids, **arguments)
