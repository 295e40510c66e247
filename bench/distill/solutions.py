"""Worked solutions, a line an operation, digit by digit from the right.

    47 * 36                                     question
    47*6: 7*6=42 4*6+4=28 282                   columns, then the result
    47*30: 7*3=21 4*3+2=14 1410
    282+1410: 2+0=2 8+1=9 2+4=6 0+1=1 1692
    answer: 1692

A sloppy solver forgets some carries, borrows and remainders, and goes on with what that gives.
"""

from __future__ import annotations

import random

from .problems import EQUATION, Problem


class Solver:
    """Writes solutions; forgets each carry with probability `forget`."""

    def __init__(self, forget: float, seed: int) -> None:
        self.forget = forget
        self._random = random.Random(seed)

    def solve(self, problem: Problem) -> str:
        """The worked solution of a drawn problem."""
        lines: list[str] = []
        if problem.source == "chain_sum":
            words = problem.question.split()
            value = int(words[0])
            for sign, term in zip(words[1::2], words[2::2], strict=True):
                value = (self._add if sign == "+" else self._subtract)(value, int(term), lines)
        elif problem.source == "products":
            value, *factors = map(int, problem.question.split(" * "))
            for factor in factors:
                value = self._multiply(value, factor, lines)
        else:
            match = EQUATION.fullmatch(problem.question)
            assert match is not None
            by, constant, right = int(match[1]), int(match[4]), int(match[5])
            undo = self._subtract if match[3] == "+" else self._add
            value = self._divide(undo(right, constant, lines), by, lines)
        return "\n".join([*lines, f"answer: {value}"])

    def _keep(self, carry: int) -> int:
        """The carry, or 0 where it is forgotten."""
        return 0 if carry and self._random.random() < self.forget else carry

    def _add(self, a: int, b: int, lines: list[str]) -> int:
        columns, result, carry = [], "", 0
        width = max(len(str(a)), len(str(b)))
        for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
            total = x + y + carry
            columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
            result = f"{total % 10}{result}"
            carry = self._keep(total // 10)
        return _finish(f"{a}+{b}", columns, f"{carry or ''}{result}", lines)

    def _subtract(self, a: int, b: int, lines: list[str]) -> int:
        """Borrows write the upper digit with a 1 before it; the last borrow has nothing to take."""
        columns, result, borrow = [], "", 0
        width = max(len(str(a)), len(str(b)))
        for x, y in zip(_digits(a, width), _digits(b, width), strict=True):
            owed = y + borrow
            upper = x + 10 if x < owed else x
            columns.append(f"{upper}-{y}{'-1' if borrow else ''}={upper - owed}")
            result = f"{upper - owed}{result}"
            borrow = self._keep(int(upper != x))
        return _finish(f"{a}-{b}", columns, result, lines)

    def _multiply(self, a: int, b: int, lines: list[str]) -> int:
        if b < 10:
            return self._times_digit(a, b, 0, lines)
        parts = [
            self._times_digit(a, digit, place, lines)
            for place, digit in enumerate(_digits(b, len(str(b))))
            if digit
        ]
        return parts[0] if len(parts) == 1 else self._add(parts[0], parts[1], lines)

    def _times_digit(self, a: int, b: int, place: int, lines: list[str]) -> int:
        columns, result, carry = [], "0" * place, 0
        for x in _digits(a, len(str(a))):
            total = x * b + carry
            columns.append(f"{x}*{b}{f'+{carry}' if carry else ''}={total}")
            result = f"{total % 10}{result}"
            carry = self._keep(total // 10)
        return _finish(f"{a}*{b}{'0' * place}", columns, f"{carry or ''}{result}", lines)

    def _divide(self, a: int, b: int, lines: list[str]) -> int:
        """Long division; what is left at the end of a wrong dividend is dropped."""
        columns, result, rest = [], "", 0
        for digit in str(a):
            part = 10 * rest + int(digit)
            if part < b and not result:
                rest = part
                continue
            columns.append(f"{part}={part // b}*{b}+{part % b}")
            result += str(part // b)
            rest = self._keep(part % b)
        return _finish(f"{a}/{b}", columns, result or "0", lines)


def _digits(number: int, width: int) -> list[int]:
    """Decimal digits from the right, padded with 0."""
    return [number // 10**i % 10 for i in range(width)]


def _finish(work: str, columns: list[str], result: str, lines: list[str]) -> int:
    value = int(result)
    lines.append(" ".join([f"{work}:", *columns, str(value)]))
    return value
