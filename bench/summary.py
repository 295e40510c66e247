"""Results as plain text, and as pictures where matplotlib is: for machines without rich.

`python -m drift_gate.bench.summary FILE [--no-pictures]`
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .record import Result, read
from .verdict import verdicts


def lines(results: list[Result]) -> list[str]:
    """A line for each measurement, under a line for each case."""
    found, heading, bad = [], "", verdicts(results)
    for r in results:
        if (title := f"{r.suite}: {r.size}") != heading:
            heading = title
            share = "" if r.live_rows is None else f", {r.live_rows / r.size.rows:.1%} of rows live"
            moved = f"; must move {r.bytes_must_move / 1e9:.4g} GB" if r.bytes_must_move else ""
            found += ["", f"{title}{moved}{share}"]
        if r.left_out is not None:
            found.append(f"  {r.implementation:42} left out: {r.left_out}")
            continue
        if id(r) in bad:
            found.append(f"  {r.implementation:42} wrong: {bad[id(r)]}")
            continue
        low, median, high = (1e3 * s for s in r.quartiles)
        device = f"device {1e3 * r.device:.5g} ms ({r.device_by}), " if r.device else ""
        ratio = f"{r.ratio_quartiles[1]:.4g}" if r.ratio_quartiles else "-"
        ratio += " (one call)" if r.one_call else ""
        if r.host is not None:
            counts = ", ".join(f"{count} {what}" for what, count in r.host.items())
            found.append(
                f"  {r.implementation:42} {median:.4g} ms, {ratio} of {r.baseline}, {counts}"
            )
            continue
        if r.step is not None:
            peak, held = (r.step[key] / (1 << 30) for key in ("peak_bytes", "held_bytes"))
            found.append(
                f"  {r.implementation:42} {median:.5g} ms ({low:.5g}-{high:.5g}), {ratio} of "
                f"{r.baseline}, peak {peak:.4g} GiB, {held:.4g} of them model and batch"
            )
            continue
        gemm = "" if r.fraction_of_gemm is None else f", {r.fraction_of_gemm:.3f} of GEMM rate"
        errors = ", ".join(
            f"{name} {e['max'] / (e['scale'] or 1):.1e}" for name, e in r.errors.items()
        )
        found.append(
            f"  {r.implementation:42} {device}{median:.5g} ms ({low:.5g}-{high:.5g}), "
            f"{ratio} of {r.baseline}, {r.fraction_of_copy:.3f} of copy{gemm}, "
            f"extra {(r.extra_bytes or 0) / 1e6:.5g} MB, errors: {errors or '-'}"
        )
        if r.note:
            found.append(f"  {'':42} {r.note}")
        if r.profile:
            found += [f"      {line}" for line in kernels(r.profile)]
    return found


def kernels(profile: dict[str, Any], most: int = 12) -> list[str]:
    """What the kernels of a call took, in microseconds, the longest first."""
    us = {name: round(1e6 * profile[name]) for name in ("busy", "span", "returned")}
    first = (
        f"kernels {us['busy']} us, from first to last {us['span']}, returned after "
        f"{us['returned']}, {profile['allocated']} allocations of the driver"
    )
    shown = list(profile["kernels"].items())[:most]
    return [first, *(f"{1e6 * s:9.1f} us  {n:.0f} x {name}" for name, (n, s) in shown)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--no-pictures", action="store_true")
    chosen = parser.parse_args()
    path = chosen.file
    if not path.exists():
        print(f"{path}: nothing was measured")
        return
    results = read(path)
    print(", ".join(f"{name} {value}" for name, value in results[0].machine.items()))
    rate = results[0].copy_bytes_per_s
    print(f"copy {rate / 1e9:.5g} GB/s", *lines(results), sep="\n")
    if chosen.no_pictures:
        return
    try:
        from .plots import draw
    except ModuleNotFoundError as missing:
        print(f"no pictures: {missing.name} is not installed")
        return
    print("", *draw(results, path), sep="\n")


if __name__ == "__main__":
    main()
