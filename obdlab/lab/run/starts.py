"""The report of container starts: headline, table of arms, findings."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from obdlab.lab.images.recipe import image_label
from obdlab.lab.run.pairs import always_valid
from obdlab.lab.run.summary import (
    LEGEND,
    caveats,
    findings,
    headlines,
    summarise,
    text_table,
    wrapped,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.summary import Summary


class StartReport:
    """Arms are compared under the same image, network, disk and start."""

    def lines(self, spec: Any, rows: Sequence[Row], *, details: bool) -> list[str]:
        """Return headline, table and legend; with ``details`` a sentence for each comparison."""
        if not any(not row.get("error") for row in rows):
            return []
        summaries = summaries_of(spec, rows)
        head = [*wrapped(headlines(summaries)), "", *text_table(summaries).splitlines(), ""]
        return head + wrapped([LEGEND, *(findings(summaries) if details else ())])

    def facts(self, spec: Any, rows: Sequence[Row]) -> dict[str, Any]:
        """Return headlines, summaries and findings."""
        good = any(not row.get("error") for row in rows)
        summaries: list[Summary] = summaries_of(spec, rows) if good else []
        return {
            "headlines": headlines(summaries),
            "summaries": [asdict(summary) for summary in summaries],
            "findings": findings(summaries),
        }

    def caveats(self, spec: Any, rows: Sequence[Row]) -> list[str]:
        """Return sentences about failed starts, busy hosts, starts that asked the registry, and far outliers."""
        return caveats(rows)


def summaries_of(spec: Any, rows: Sequence[Row]) -> list[Summary]:
    """Return the summaries; ratios of a run that could stop early have the intervals that it stopped on."""
    summaries = summarise(rows, baseline=spec.baseline)
    if not spec.precision:
        return summaries
    ratios = always_valid(spec, rows)
    # A summary has the image's name for readers.
    shown = {(image_label(str(point["image"])), *(point[axis] for axis in _AXES)): each for point, each in ratios}
    return [
        summary
        if summary.start != "cold" or summary.ratio is None
        else replace(summary, ratio=shown.get(_axes_of(summary), summary.ratio))
        for summary in summaries
    ]


_AXES = ("rate_mbit", "rtt_ms", "disk", "arm")


def _axes_of(summary: Summary) -> tuple[Any, ...]:
    return (summary.image, *(getattr(summary, axis) for axis in _AXES))
