"""A claim of a paper as a check over rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from obdlab.lab.paper.results import Results
from obdlab.lab.paper.verdicts import Outcome

Check = Callable[[Results], Outcome]


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim: its figure, its statement, the paper's numbers in words, and the check.

    ``refuted`` is the result that would refute it, chosen by the paper's numbers and not by rows.
    """

    key: str
    figure: str
    question: str
    says: str
    paper: str
    check: Check
    refuted: str = ""
