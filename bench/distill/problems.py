"""Problems with verifiable answers: reasoning-gym's, or those of JSONL files."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = ("chain_sum", "products", "simple_equations")  # reasoning-gym's names
LEVELS = ("level 1", "level 2", "level 3", "level 4")  # four benchmarks of rising difficulty
TRAIN, HELD_OUT = 0, 1  # two streams of problems

# reasoning-gym's settings of each source at each level.
_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "chain_sum": [
        dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2),
        dict(min_terms=3, max_terms=3, min_digits=2, max_digits=2),
        dict(min_terms=4, max_terms=4, min_digits=2, max_digits=2),
        dict(min_terms=4, max_terms=5, min_digits=3, max_digits=3),
    ],
    "products": [
        dict(min_terms=3, max_terms=3, min_digits=1, max_digits=1),
        dict(min_terms=2, max_terms=2, min_digits=2, max_digits=2),
        dict(min_terms=4, max_terms=4, min_digits=1, max_digits=1),
        dict(min_terms=5, max_terms=5, min_digits=1, max_digits=1),
    ],
    "simple_equations": [
        dict(min_terms=2, max_terms=2, max_value=most, operators_weights=[0.5, 0.5, 0.0])
        for most in (9, 20, 35, 50)
    ],
}
_STRIDE = 10**8  # reasoning-gym draws problem i of a data set from seed + i
EQUATION = re.compile(r"(\d)\*([a-z]) ([+-]) (\d+) = (\d+)")


class Problem(NamedTuple):
    """A question and its answer, both text; `source` is None where it comes from a file."""

    question: str
    answer: str
    source: str | None = None


class BadFile(ValueError):
    """A file of problems that cannot be read; the message names the file and the line."""


def draw(
    level: int, count: int, seed: int, *, stream: int, sources: tuple[str, ...] = SOURCES
) -> list[Problem]:
    """`count` distinct problems of a level (0 to 3), in equal shares of the sources, mixed.

    Fewer where a source has no more. No question is in both streams: a fifth of all questions
    belongs to HELD_OUT alone.
    """
    return list(_drawn(level, count, seed, stream, sources))


@functools.cache  # a second or two of symbolic algebra; a study asks for the same ones often
def _drawn(
    level: int, count: int, seed: int, stream: int, sources: tuple[str, ...]
) -> tuple[Problem, ...]:
    found: dict[Problem, None] = {}
    for i, source in enumerate(sources):
        wanted = len(found) + count // len(sources) + (i < count % len(sources))
        first = ((seed * 2 + stream) * len(LEVELS) + level) * _STRIDE
        for problem in itertools.islice(_stream(source, level, first), 20 * count):
            if len(found) == wanted:
                break
            if held_out(problem.question) == (stream == HELD_OUT):
                found[problem] = None
    mixed = list(found)
    random.Random(seed).shuffle(mixed)
    return tuple(mixed)


def held_out(question: str) -> bool:
    """Whether a question belongs to the benchmarks, and so to no training problem."""
    number = 0
    for character in question:
        number = (31 * number + ord(character)) % 1_000_003
    return number % 5 == 0


def _stream(source: str, level: int, seed: int) -> Iterator[Problem]:
    """Problems of one source without end, those that the worked solutions cover."""
    import reasoning_gym

    data = reasoning_gym.create_dataset(source, seed=seed, size=_STRIDE, **_SETTINGS[source][level])
    for i in range(_STRIDE):
        entry = data[i]
        question = entry["metadata"].get("expression") or entry["metadata"]["equation"]
        if _covered(source, question):
            yield Problem(question, entry["answer"], source)


def _covered(source: str, question: str) -> bool:
    """Natural numbers throughout: no running total below 0, no factor 0, a one-digit divisor."""
    if source == "simple_equations":
        match = EQUATION.fullmatch(question)
        return match is not None and match[1] not in "01"
    words = question.split()
    if source == "products":
        return "0" not in words
    total = int(words[0])
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        total += int(term) if sign == "+" else -int(term)
        if total < 0:
            return False
    return True


def read(path: Path) -> list[Problem]:
    """Problems of a JSONL file: objects with "problem" (or "question") and "answer".

    Raises:
        BadFile: the file is missing, empty, or has a malformed line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    problems = [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, 1)]
    if not problems:
        raise BadFile(f"{path} is empty; it must have one JSON object a line")
    return problems


def _parse(line: str, where: str) -> Problem:
    wanted = 'a JSON object with "problem" and "answer"'
    if not line.strip():
        raise BadFile(f"{where} is empty; it must be {wanted}")
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadFile(f"{where} is not JSON ({error.msg}); it must be {wanted}") from None
    if not isinstance(entry, dict):
        raise BadFile(f"{where} must be {wanted}; got {type(entry).__name__}")
    question, answer = entry.get("problem", entry.get("question")), entry.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise BadFile(f'{where} must have a text "problem" (or "question"); got {question!r}')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise BadFile(f'{where} must have an "answer", text or a number; got {answer!r}')
    return Problem(question, str(answer))


class Grader:
    """Says whether a response answers a problem; remembers what it has judged."""

    def __init__(self) -> None:
        self._known: dict[tuple[Problem, str], bool] = {}

    def __call__(self, problem: Problem, response: str) -> bool:
        """Drawn problems: the last line is `answer: N`. Problems of files: math-verify."""
        if problem.source is not None:
            return response.rstrip("\n").rpartition("\n")[2] == f"answer: {problem.answer}"
        key = problem, response
        if key not in self._known:
            self._known[key] = _verified(problem.answer, response)
        return self._known[key]

    def all(self, problems: Iterable[Problem], responses: Iterable[str]) -> list[bool]:
        """One verdict a pair."""
        return [self(p, r) for p, r in zip(problems, responses, strict=True)]


def _verified(answer: str, response: str) -> bool:
    from math_verify import parse, verify

    gold = parse(answer) or parse(f"${answer}$")
    return bool(verify(gold, parse(response)))
