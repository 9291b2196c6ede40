"""Published figures, shown beside measurements.

``data/paper_figures.csv`` holds numbers read off the papers and their documents, each with its certainty.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, slots=True)
class PaperValue:
    """One published number: ``series`` and ``x`` say which bar or point, ``certainty`` how it was read."""

    source: str
    figure: str
    series: str
    x: str
    y: str
    unit: str
    certainty: str


def paper_values(figure_prefix: str, source: str = "DADI-ATC20") -> list[PaperValue]:
    """Return the rows of one source whose figure name starts with ``figure_prefix`` followed by a blank."""
    return [each for each in published() if each.source == source and each.figure.startswith(figure_prefix + " ")]


def published() -> list[PaperValue]:
    """Return the rows of all sources."""
    text = (resources.files("obdlab.lab") / "data" / "paper_figures.csv").read_text()
    return [PaperValue(**row) for row in csv.DictReader(text.splitlines())]
