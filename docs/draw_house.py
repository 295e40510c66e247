"""Draw who imports whom: `make house` writes docs/house.svg from the code.

A box is a folder, or a file that lies in none, and lists its files. Nothing is drawn by hand: a box
stands above all that it imports, as near to it as can be, and an arrow that two others say together
is left out. An import against the arrows would close a circle, and raises.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Folder of the repository -> where it lies in the package, as setup.py says.
FOLDERS = {"drift_gate": (), "kernels": ("kernels",), "bench": ("bench",)}
PACKAGE = "drift_gate"
PUBLIC = "import drift_gate"  # the box of the names that a user imports
IN_A_ROW = 40  # letters of a line in a box
WIDTH, LINE = 3.0, 0.17  # of a box, and in it: inches
PASSAGE, ASIDE, BELOW = 0.1, 0.3, 0.5  # of an arrow beside boxes; between them
Arrows = dict[str, set[str]]
Point = tuple[float, float]


class Box(NamedTuple):
    name: str
    files: list[str]


def sources() -> dict[tuple[str, ...], Path]:
    """Every module of the package, its name in parts, without the package's own."""
    found = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[(*prefix, *(part for part in parts if part != "__init__"))] = path
    return found


def imported(module: tuple[str, ...], path: Path) -> Iterator[tuple[str, ...]]:
    """What a module imports of the package: modules, or names in them."""
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        name = tuple((node.module or "").split(".")) if node.module else ()
        if node.level:
            base = (*package[: len(package) - node.level + 1], *name)
        elif name[:1] == (PACKAGE,):
            base = name[1:]
        else:
            continue
        for alias in node.names:
            yield (*base, alias.name)


def box_of(module: tuple[str, ...], known: dict[tuple[str, ...], Path]) -> str:
    """The box in which a module, or a name of one, lies."""
    if not module or (len(module) == 1 and module not in known and not inside(module, known)):
        return PUBLIC
    name = "cli" if module[0] == "__main__" else module[0]
    return f"{name}/" if inside((name,), known) else f"{name}.py"


def inside(folder: tuple[str, ...], known: dict[tuple[str, ...], Path]) -> bool:
    """Whether there is such a folder."""
    return any(len(each) > len(folder) and each[: len(folder)] == folder for each in known)


def arrows() -> Arrows:
    """Which boxes each box imports."""
    known = sources()
    found: Arrows = {}
    for module, path in known.items():
        mine = box_of(module, known)
        others = {box_of(each, known) for each in imported(module, path)}
        found.setdefault(mine, set()).update(others - {mine})
    found = {box: {other for other in others if other in found} for box, others in found.items()}
    return joined(found)


def joined(graph: Arrows) -> Arrows:
    """The same, files that import nothing and would stand beside each other in one box."""
    level, groups = levels(graph), {}
    for box in sorted(graph):
        if box.endswith(".py") and not graph[box]:
            groups.setdefault(level[box], []).append(box.removesuffix(".py"))
    name = {f"{file}.py": " ".join(files) for files in groups.values() for file in files}
    return {
        name.get(box, box): {name.get(other, other) for other in others}
        for box, others in graph.items()
    }


def boxes() -> list[Box]:
    """All boxes and the files in them; those of a folder inside a folder as one."""
    known = sources()
    files: dict[str, list[str]] = {}
    for module, path in known.items():
        if path.name != "__init__.py":
            inner = module[1:] if inside(module[:1], known) else ()
            name = f"{inner[0]}/" if len(inner) > 1 else "".join(inner)
            files.setdefault(box_of(module, known), []).append(name)
    files.setdefault(PUBLIC, [])
    return [Box(name, list(dict.fromkeys(filter(None, inner)))) for name, inner in files.items()]


def below(box: str, graph: Arrows) -> set[str]:
    """All that a box imports, by others too."""
    found: set[str] = set()
    left = list(graph[box])
    while left:
        each = left.pop()
        if each not in found:
            found.add(each)
            left += graph[each]
    if box in found:
        raise ValueError(f"{box} imports itself by way of others: {sorted(found)}")
    return found


def drawn(graph: Arrows) -> list[tuple[str, str]]:
    """The arrows that no others say together."""
    reach = {box: below(box, graph) for box in graph}
    return sorted(
        (box, other)
        for box, others in graph.items()
        for other in others
        if not any(other in reach[between] for between in others)
    )


def levels(graph: Arrows) -> dict[str, int]:
    """Of each box, above all that it imports; what imports nothing stands right below the lowest
    of its importers."""
    found: dict[str, int] = {}

    def level(box: str) -> int:
        if box not in found:
            found[box] = 1 + max((level(other) for other in graph[box]), default=0)
        return found[box]

    for box in graph:
        level(box)
    for box in graph:
        above = [found[other] for other in graph if box in graph[other]]
        if not graph[box] and above:
            found[box] = min(above) - 1
    return found


def place(graph: Arrows) -> list[list[str]]:
    """Rows from the top: boxes, and the arrows that pass between them, named "BOX > BOX"."""
    level = levels(graph)
    order = sorted({*level.values()}, reverse=True)
    rows = {i: sorted(box for box in graph if level[box] == i) for i in order}
    links: list[tuple[tuple[int, str], tuple[int, str]]] = []
    for box, other in drawn(graph):
        steps = [i for i in order if level[box] > i > level[other]]
        for i in steps:
            rows[i].append(f"{box} > {other}")
        passed = [(i, f"{box} > {other}") for i in steps]
        links += pairwise([(level[box], box), *passed, (level[other], other)])
    for _ in range(12):
        for i in order:  # the middle of what it is joined to
            at = {(j, name): x for j, row in rows.items() for name, x in middles(row).items()}

            def pull(name: str, i: int = i, at: dict[Any, float] = at) -> float:
                here = i, name
                ends = [b if a == here else a for a, b in links if here in (a, b)]
                return sum(at[end] for end in ends) / max(len(ends), 1)

            rows[i].sort(key=pull)
    return list(rows.values())


def middles(row: list[str]) -> dict[str, float]:
    """Where the boxes and arrows of a row stand, to the left and right of 0."""
    found, x = {}, 0.0
    for name in row:
        wide = PASSAGE if " > " in name else WIDTH
        found[name] = x + wide / 2
        x += wide + ASIDE
    return {name: at - (x - ASIDE) / 2 for name, at in found.items()}


def draw(path: str) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "house"})
    from matplotlib.figure import Figure

    graph = arrows()
    files = {box.name: "  ".join(box.files) for box in boxes()}
    texts = {box: textwrap.wrap(files.get(box, ""), IN_A_ROW) for box in graph}
    tall = {name: 0.34 + LINE * len(lines) for name, lines in texts.items()}
    rows = place(graph)
    width = 2 * max(abs(x) + WIDTH / 2 + 0.1 for row in rows for x in middles(row).values())
    height = sum(max(tall.get(name, 0) for name in row) + BELOW for row in rows)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    at: dict[str, Point] = {}  # middle of a box's upper edge
    passed: dict[str, list[Point]] = {}  # where an arrow passes rows
    top = height - BELOW / 2
    for row in rows:
        bottom = top - max(tall.get(name, 0) for name in row)
        for name, x in middles(row).items():
            if name in tall:
                at[name] = width / 2 + x, top
                _draw_box(axes, name, at[name], texts[name], tall[name])
            else:
                passed.setdefault(name, []).extend([(width / 2 + x, y) for y in (top, bottom)])
        top = bottom - BELOW
    for box, other in drawn(graph):
        name, (x, y) = f"{box} > {other}", at[box]
        _draw_arrow(axes, [(x, y - tall[box]), *passed.get(name, ()), at[other]], name)
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def _draw_box(axes: Any, name: str, at: Point, lines: list[str], tall: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, top = at
    look = {"boxstyle": "round,pad=0,rounding_size=.08", "facecolor": "#f4f1ea"}
    corner = x - WIDTH / 2, top - tall
    box = FancyBboxPatch(corner, WIDTH, tall, edgecolor="#555555", zorder=2, **look)
    box.set_gid(f"box {name}")
    axes.add_patch(box)
    words = {"ha": "center", "va": "center", "zorder": 3}
    axes.text(x, top - 0.19, name, size=11, weight="bold", **words)
    for i, line in enumerate(lines):
        axes.text(x, top - 0.39 - LINE * i, line, size=8, **words)


def _draw_arrow(axes: Any, points: list[Point], name: str) -> None:
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": "#777777", "linewidth": 0.9}
    arrow = FancyArrowPatch(path=Line(points), zorder=1, **look)
    arrow.set_gid(name)
    axes.add_patch(arrow)


if __name__ == "__main__":
    draw(sys.argv[1])
