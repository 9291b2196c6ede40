"""Figures of the experiment ``suggestion``: each image's gain kept and over-read, and their medians."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]

_ARMS = ("learned", "rules", "again")
_LINKS = (100, 1000)


def lines(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return head and lines of the table; the last line has the medians."""
    found = {(row["image"], row["trace"], row["rate_mbit"]): row for row in rows}
    images = sorted({row["image"] for row in rows})
    head = ("image", "MB recorded", "files", "100 Mbit/s", "1 Gbit/s", "over-read", "rules alone", "recorded again")
    table = []
    for image in images:
        slow, fast = (found[image, "learned", rate] for rate in _LINKS)
        others = [found[image, arm, _LINKS[0]] for arm in _ARMS[1:]]
        about = [image, f"{slow['recorded_mb']:.1f}", str(int(slow["files"]))]
        kept = [f"{row['kept']:.2f}" for row in (slow, fast)]
        table.append([*about, *kept, f"{slow['over_read']:.2f}", *(f"{row['kept']:.2f}" for row in others)])
    middle = [f"{_median(rows, 'learned', rate, 'kept'):.2f}" for rate in _LINKS]
    middle += [f"{_median(rows, 'learned', _LINKS[0], 'over_read'):.2f}"]
    middle += [f"{_median(rows, arm, _LINKS[0], 'kept'):.2f}" for arm in _ARMS[1:]]
    return head, [*table, ["median", "", "", *middle]]


def said(rows: Sequence[Row]) -> str:
    """Return the result in a sentence's words."""
    images = len({row["image"] for row in rows})
    kept, over = _median(rows, "learned", 100, "kept"), _median(rows, "learned", 100, "over_read")
    most = max(row["over_read"] for row in rows if row["trace"] == "learned")
    return (
        f"{images} images, in the median {kept:.0%} of the gain kept at 100 Mbit/s and 20 ms, "
        f"{over:.2f} bytes fetched for each byte recorded (at most {most:.2f})"
    )


def _median(rows: Sequence[Row], arm: str, rate: int, key: str) -> float:
    return median(row[key] for row in rows if row["trace"] == arm and row["rate_mbit"] == rate)
