"""The report of container starts: headline, table of arms, findings."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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
        summaries = summarise(rows, baseline=spec.baseline)
        head = [*wrapped(headlines(summaries)), "", *text_table(summaries).splitlines(), ""]
        return head + wrapped([LEGEND, *(findings(summaries) if details else ())])

    def facts(self, spec: Any, rows: Sequence[Row]) -> dict[str, Any]:
        """Return headlines, summaries and findings."""
        good = any(not row.get("error") for row in rows)
        summaries: list[Summary] = summarise(rows, baseline=spec.baseline) if good else []
        return {
            "headlines": headlines(summaries),
            "summaries": [asdict(summary) for summary in summaries],
            "findings": findings(summaries),
        }

    def caveats(self, spec: Any, rows: Sequence[Row]) -> list[str]:
        """Return sentences about failed starts, busy hosts, starts that asked the registry, and far outliers."""
        return caveats(rows)
