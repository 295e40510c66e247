"""Plain values as text, which is what an op can take of them: JSON.

Python's own parser will not do: in CPython 3.11 `ast.literal_eval` raises SystemError where a
garbage collection lets another thread parse at the same time.
"""

import json
from typing import Any


def written(x: Any) -> str:
    """Strings, numbers, None, and lists of them, in a way that `torch.compile` can trace."""
    if isinstance(x, (list, tuple)):
        return "[" + ",".join([written(y) for y in x]) + "]"
    if isinstance(x, str):
        return '"' + x.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if x is None:
        return "null"
    if isinstance(x, bool):
        return "true" if x else "false"
    return f"{x!r}"


def read(text: str) -> Any:
    """What was written; tuples have become lists."""
    return json.loads(text)
