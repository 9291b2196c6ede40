"""Stored rows of the evaluation's experiments, selected and summed up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from obdlab.lab.run.declaration import last_spec, open_experiment
from obdlab.lab.run.rows import AA_SUFFIX, RowStore
from obdlab.lab.run.spec import SpecError
from obdlab.lab.run.statistics import Estimate, median_interval, ratio_interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from obdlab.lab.paper.questions import Run
    from obdlab.lab.run.rows import Row

# With fewer samples an interval says nothing.
LEAST = 3


class Results:
    """The results below one directory, with a sub-directory of raw rows for each experiment."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._rows: dict[str, list[Row]] = {}

    def directory(self, run: Run) -> Path:
        """Return the directory of an experiment's rows."""
        return self.root / run.name

    def rows(self, run: Run, **where: Any) -> list[Row]:
        """Return the good rows of an experiment's last run with these values; [] if it was not run."""
        if run.name not in self._rows:
            self._rows[run.name] = self._load(run)
        return [row for row in self._rows[run.name] if all(row.get(key) == value for key, value in where.items())]

    def all_rows(self, run: Run) -> list[Row]:
        """Return every stored row, failed ones included."""
        directory = self.directory(run)
        return RowStore(directory).rows() if (directory / "rows.jsonl").is_file() else []

    def options(self, run: Run) -> dict[str, Any]:
        """Return the options of an experiment's last run; {} if it was not run."""
        directory = self.directory(run)
        if not (directory / "rows.jsonl").is_file():
            return {}
        try:
            return dict(last_spec(directory).options)
        except SpecError:
            return {}

    def why_not(self, run: Run) -> str:
        """Return why an experiment could not be run here; "" if it was run or not tried."""
        try:
            return (self.directory(run) / "not_run.txt").read_text().strip()
        except OSError:
            return ""

    def environments(self, run: Run) -> list[dict[str, Any]]:
        """Return the environments of the rows."""
        directory = self.directory(run)
        known = RowStore(directory).environments() if directory.is_dir() else {}
        used = dict.fromkeys(row.get("environment") for row in self.rows(run))
        return [known[each] for each in used if each in known]

    def _load(self, run: Run) -> list[Row]:
        directory = self.directory(run)
        if not (directory / "rows.jsonl").is_file():
            return []
        try:
            spec = last_spec(directory)
        except SpecError:
            return []
        good = [row for row in open_experiment(spec, directory).rows() if not row.get("error")]
        if isinstance(spec.baseline, str):
            return good
        # Figures over an axis of numbers have no place for the second arm of the baseline, which is a text.
        return [row for row in good if not isinstance(row[spec.arm_axis], str)]


def samples(rows: Iterable[Row], key: str) -> list[float]:
    """Return the value of ``key`` of each row that has it."""
    return [float(row[key]) for row in rows if row.get(key) is not None]


def estimate(rows: Iterable[Row], key: str) -> Estimate | None:
    """Return median and interval of the value of ``key``; None without rows."""
    values = samples(rows, key)
    return median_interval(values) if values else None


def ratio(rows: Sequence[Row], baseline: Sequence[Row], key: str) -> Estimate | None:
    """Return the ratio of medians; None if either side has no rows."""
    above, below = samples(rows, key), samples(baseline, key)
    return ratio_interval(above, below) if above and below else None


def floor(rows: Sequence[Row], baseline: str, axis: str, key: str) -> float | None:
    """Return the difference from 1 of the ratio of the baseline's second arm to its first; None without both."""
    again, first = ([row for row in rows if row.get(axis) == arm] for arm in (f"{baseline}{AA_SUFFIX}", baseline))
    found = ratio(again, first, key)
    return None if found is None else abs(found.median - 1)


def busy(rows: Iterable[Row]) -> bool:
    """Return True if any row was measured on a busy host."""
    return any(row.get("quiet") is False for row in rows)


def launch_s(row: Row) -> float:
    """Return the time of a start without its pull, in seconds."""
    return float(row["create_s"]) + float(row["start_s"]) + float(row["ready_s"])
