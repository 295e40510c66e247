"""What a run showed, in words: `in_words` of report.json, and the last lines in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]  # of `report.summarize`


def in_words(rows: list[Row], labels: list[str]) -> list[str]:
    """How far policies drifted and how even weights were; and whether a gain is beyond chance.

    labels: the name of each row.
    """
    return [moved(rows), compared(rows, labels)]


def moved(rows: list[Row]) -> str:
    """Over the variants, in the last epoch of their rollout batches."""
    last = [{name: by_epoch[-1] for name, by_epoch in _movement(row)} for row in rows]
    drift = _range(movement["drift_abs"] for movement in last if movement)
    noise = [movement["drift_noise"] for movement in last if "drift_noise" in movement]
    found = f"The policy drifted by {drift} nats in the last epoch over a batch"
    if noise:  # earlier versions did not measure it
        found += f", of which rounding of the logits would show {_range(noise)}"
    gated = [movement for row, movement in zip(rows, last, strict=True) if row.get("gated")]
    if not gated:
        return f"{found}."
    shares = _range((movement["effective_share"] for movement in gated), ".1%")
    return f"{found}; the gates' weights were even to {shares} (100%: a gate weighs all alike)."


def _movement(row: Row) -> Iterable[tuple[str, list[float]]]:
    """The models before training have none."""
    return row.get("movement", {}).items()


def compared(rows: list[Row], labels: list[str]) -> str:
    """Of all gains of all metrics: which lie above and below 0 by their intervals."""
    gains = [
        (f"{label} in {metric}", gain)
        for row, label in zip(rows, labels, strict=True)
        for metric, gain in row.get("gain", {}).items()
    ]
    if not gains:
        return "No gated variant ran beside its ungated one: there is no gain to judge."
    if any(gain["interval"] is None for _, gain in gains):
        return (
            "Whether a gate gains or loses, one seed cannot say: two runs of one variant differ "
            "too, and with one pair nothing shows by how much (--seeds 5 does)."
        )
    above = [name for name, gain in gains if gain["interval"][0] > 0]
    below = [name for name, gain in gains if gain["interval"][1] < 0]
    if not above and not below:
        return f"None of {len(gains)} gains of a gate lies above or below 0 by its 95% interval."
    found = f"Of {len(gains)} gains of a gate {_those(above)} above 0 by the 95% interval, "
    return f"{found}{_those(below)} below; of {len(gains)} without any, {by_chance(len(gains))}."


def _those(names: list[str]) -> str:
    listed = f" ({', '.join(names)})" if names else ""
    return f"{len(names) or 'none'}{listed} lie{'s' if len(names) < 2 else ''}"


def by_chance(count: int) -> str:
    """How many of so many 95% intervals miss 0 where there is nothing to find."""
    return f"{count / 20:.1f} would lie above or below 0 by chance"


def _range(values: Iterable[float], form: str = ".4f") -> str:
    """The least and the greatest, or one number where they read alike."""
    known = list(values)
    low, high = f"{min(known):{form}}", f"{max(known):{form}}"
    return low if low == high else f"{low} to {high}"
