"""Results as plain text, and as pictures where matplotlib is: for machines without rich.

`python -m drift_gate.bench.summary FILE`
"""

from __future__ import annotations

import sys
from pathlib import Path

from .record import Result, read


def lines(results: list[Result]) -> list[str]:
    """A line for each measurement, under a line for each case."""
    found, heading = [], ""
    for r in results:
        if (title := f"{r.suite}: {r.size}") != heading:
            heading = title
            found += ["", f"{title}; must move {r.bytes_must_move / 1e9:.4g} GB"]
        if r.left_out is not None:
            found.append(f"  {r.implementation:42} left out: {r.left_out}")
            continue
        low, median, high = (1e3 * s for s in r.quartiles)
        ratio = f"{r.ratio_quartiles[1]:.4g}" if r.ratio_quartiles else "-"
        ratio += " (one call)" if r.one_call else ""
        gemm = "" if r.fraction_of_gemm is None else f", {r.fraction_of_gemm:.3f} of GEMM rate"
        errors = ", ".join(
            f"{name} {e['max'] / (e['scale'] or 1):.1e}" for name, e in r.errors.items()
        )
        found.append(
            f"  {r.implementation:42} {median:.5g} ms ({low:.5g}-{high:.5g}), {ratio} of eager, "
            f"{r.fraction_of_copy:.3f} of copy{gemm}, extra {(r.extra_bytes or 0) / 1e6:.5g} MB, "
            f"errors: {errors or '-'}"
        )
        if r.note:
            found.append(f"  {'':42} {r.note}")
    return found


def main() -> None:
    path = Path(sys.argv[1])
    if not path.exists():
        print(f"{path}: nothing was measured")
        return
    results = read(path)
    print(", ".join(f"{name} {value}" for name, value in results[0].machine.items()))
    rate = results[0].copy_bytes_per_s
    print(f"copy {rate / 1e9:.5g} GB/s", *lines(results), sep="\n")
    try:
        from .plots import draw
    except ModuleNotFoundError as missing:
        print(f"no pictures: {missing.name} is not installed")
        return
    print("", *draw(results, path), sep="\n")


if __name__ == "__main__":
    main()
