"""The task: add two four-digit numbers, with the carries worked out, character by character.

    prompt    4785+1236=
    response  5+6=11,8+3+1=12,7+2+1=10,4+1+1=6,6021\\n

The answer behind the last comma is right or wrong: nothing about the work before it is scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHARACTERS = "\n0123456789+=,"  # a token's id is its place here
END = 0  # "\n" ends a response, and fills what is left of its row
DIGITS = 4
PROMPT = 2 * DIGITS + 2  # tokens of a prompt


def encode(text: str) -> list[int]:
    """Ids of the characters."""
    return [CHARACTERS.index(c) for c in text]


def decode(ids: Tensor) -> str:
    """Characters of [T] ids, to the first end."""
    return "".join(CHARACTERS[i] for i in ids.tolist()).split("\n")[0]


def draw_pairs(count: int, generator: torch.Generator, *, held_out: bool) -> list[tuple[int, int]]:
    """Pairs of numbers; the held-out tenth of all pairs is never among the others."""
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        a, b = torch.randint(10**DIGITS, (2,), generator=generator).tolist()
        if ((7919 * a + 104729 * b) % 1009 < 101) == held_out:
            pairs.append((a, b))
    return pairs


def prompts(pairs: list[tuple[int, int]]) -> Tensor:
    """[B, PROMPT] ids."""
    return torch.tensor([encode(f"{a:0{DIGITS}}+{b:0{DIGITS}}=") for a, b in pairs])


def solution(a: int, b: int, forgotten: Sequence[bool] = (False,) * DIGITS) -> str:
    """A worked response, without its end; `forgotten` says at which places a carry is dropped."""
    columns, answer, carry = [], "", 0
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        carry = 0 if forgotten[place] else carry
        total = x + y + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        answer = f"{total % 10}{answer}"
        carry = total // 10
    return ",".join([*columns, f"{'1' if carry else ''}{answer}"])


RESPONSE = len(solution(10**DIGITS - 1, 10**DIGITS - 1)) + 1  # tokens of the longest response


def solutions(pairs: list[tuple[int, int]], forget: float, generator: torch.Generator) -> Tensor:
    """[B, RESPONSE] ids of worked responses, each carry dropped with probability `forget`."""
    forgotten = torch.rand(len(pairs), DIGITS, generator=generator) < forget
    rows = [
        encode(solution(a, b, drops))
        for (a, b), drops in zip(pairs, forgotten.tolist(), strict=True)
    ]
    return torch.tensor([row + [END] * (RESPONSE - len(row)) for row in rows])


def response_mask(responses: Tensor) -> Tensor:
    """[B, RESPONSE] bool: the characters and the first end."""
    return ((responses == END).cumsum(-1) - (responses == END).long()) == 0


def accuracy(pairs: list[tuple[int, int]], responses: Tensor) -> float:
    """Share of [B, RESPONSE] responses whose answer is exactly the sum."""
    texts = map(decode, responses)
    right = [
        text.split(",")[-1] == f"{a + b:0{DIGITS}}"
        for (a, b), text in zip(pairs, texts, strict=True)
    ]
    return sum(right) / len(right)
