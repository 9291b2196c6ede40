"""Looking through stored starts: distributions, phases and single starts. Needs the ``lab`` extra, no privileges.

:meth:`Explorer.show` and the methods it calls are plain calls; ``obdlab.contrib.widgets`` offers the same by
widgets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd

from obdlab.command import command
from obdlab.errors import ObdlabError
from obdlab.lab.kinds import START
from obdlab.lab.paper.tables import as_html
from obdlab.lab.run.declaration import last_spec
from obdlab.lab.run.rows import RowStore, last_attempts
from obdlab.lab.run.spec import SpecError
from obdlab.lab.run.starts import summaries_of
from obdlab.lab.run.summary import summary_records
from obdlab.lab.show.dots import draw_samples
from obdlab.lab.show.figures import draw_phases
from obdlab.lab.show.waterfall import waterfall
from obdlab.lab.workbench import default_results, folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.summary import Summary

#: The axes that starts are chosen by; a choice narrows the axes after it.
AXES = ("image", "rate_mbit", "rtt_ms", "disk", "start")
_UNITS = {"rate_mbit": " Mbit/s", "rtt_ms": " ms"}
_ORDER = {"disk": ("native",), "start": ("cold", "dropped", "warm")}


class ExplorerError(ObdlabError):
    """No stored starts match the request."""


class Starts:
    """The good starts of an experiment, measured under any code.

    If an arm was measured again under the same conditions with other code, another build of the image, another
    workload or compression, only the newest starts count: a median over both would describe neither. :meth:`note`
    reports the rows left out.
    """

    def __init__(self, directory: Path) -> None:
        """Read the starts. Raises ExplorerError without good ones, SpecError or RowsError for damaged results."""
        if not (directory / "rows.jsonl").is_file():
            raise ExplorerError(f"{directory}: no results of an experiment (wanted rows.jsonl in it)")
        spec = last_spec(directory)
        if spec.kind != START:
            raise ExplorerError(f"{directory}: of kind {spec.kind}, not container starts")
        stored = RowStore(directory).rows()
        rows = last_attempts(stored)
        good = _with_settings([{"disk": "native", **row} for row in rows if not row.get("error")])
        newest: dict[tuple[Any, ...], tuple[int, tuple[str, ...]]] = {}
        for row in good:
            one = (row["attempt"], _measured_under(row))
            newest[_group(row)] = max(newest.get(_group(row), one), one)
        self._spec = spec
        self.baseline = str(spec.baseline)
        self.rows: list[Row] = [row for row in good if _measured_under(row) == newest[_group(row)][1]]
        self.stored = len(stored)
        self.failed = sum(bool(row.get("error")) for row in stored)
        if not self.rows:
            raise ExplorerError(f"{directory}: no good start ({self.failed} failed)")

    def note(self) -> str:
        """Return in words how many of the stored rows are used, and why the others are left out."""
        others = self.stored - len(self.rows) - self.failed
        left = [f"{self.failed} failed"] if self.failed else []
        left += (
            [f"{others} were measured again, or of an older image, code, workload or compression"] if others else []
        )
        codes = len({row.get("context") for row in self.rows})
        said = f"{len(self.rows):,} of {self.stored:,} stored rows" + (
            f"; left out: {', '.join(left)}" if left else ""
        )
        return said + (f"; measured under {codes} states of code and host" if codes > 1 else "")

    def summaries(self, **chosen: Any) -> list[Summary]:
        """Return the summaries of a choice, which :meth:`choose` completes. Raises ExplorerError."""
        return summaries_of(self._spec, self.select(**chosen))

    def choices(self, axis: str, **chosen: Any) -> list[Any]:
        """Return the values on an axis (AXES or "arm") of the starts that match ``chosen``."""
        found = dict.fromkeys(row[axis] for row in self._like(chosen))
        first = [self.baseline] if axis == "arm" else _ORDER.get(axis, ())
        return [*(each for each in first if each in found), *sorted(set(found) - set(first))]

    def choose(self, **chosen: Any) -> dict[str, Any]:
        """Complete a choice: each axis not named gets its first value. Raises ExplorerError."""
        unknown = sorted(set(chosen) - set(AXES))
        if unknown:
            raise ExplorerError(f"no such axis (got {unknown[0]!r}, wanted among {', '.join(AXES)})")
        whole: dict[str, Any] = {}
        for axis in AXES:
            # Later axes narrow this one too: rtt_ms=20 alone finds a rate that was measured with it.
            rest = {key: value for key, value in chosen.items() if key not in whole and key != axis}
            known = self.choices(axis, **whole, **rest) or self.choices(axis, **whole)
            value = chosen.get(axis, known[0])
            if value not in known:
                others = ", ".join(label(key, each) for key, each in {**whole, **rest}.items() if key in chosen)
                beside = f" with {others}" if others else ""
                wanted = ", ".join(label(axis, each) for each in known)
                raise ExplorerError(f"{axis}: not measured{beside} (got {value!r}, wanted one of {wanted})")
            whole[axis] = value
        return whole

    def select(self, **chosen: Any) -> list[Row]:
        """Return the starts of a choice, which :meth:`choose` completes. Raises ExplorerError."""
        return self._like(self.choose(**chosen))

    def ranked(self, arm: str = "", **chosen: Any) -> list[Row]:
        """Return the starts of an arm under a choice, fastest first (default: the first arm other than the baseline).

        Raises ExplorerError.
        """
        whole = self.choose(**chosen)
        arms = self.choices("arm", **whole)
        if arm and arm not in arms:
            raise ExplorerError(f"arm: not measured (got {arm!r}, wanted one of {', '.join(arms)})")
        wanted = arm or next((each for each in arms if each != self.baseline), arms[0])
        return sorted(self._like({**whole, "arm": wanted}), key=lambda row: float(row["total_s"]))

    def _like(self, chosen: dict[str, Any]) -> list[Row]:
        return [row for row in self.rows if all(row[key] == value for key, value in chosen.items())]


class Explorer:
    """All experiments of starts below a results directory, and pictures of the one that is open."""

    def __init__(self, results: str | Path = "", experiment: str = "") -> None:
        """Find the experiments below ``results`` and open ``experiment`` (default: the first one).

        Default of ``results``: the checkout's results, or those measured for the documentation if it has no others.
        Raises ExplorerError.
        """
        places = [Path(results)] if results else [default_results(), folder("experiments") / "measured"]
        self.root, self.experiments = places[0], find_experiments(places[0])
        if not self.experiments and find_experiments(places[-1]):
            self.root, self.experiments = places[-1], find_experiments(places[-1])
        if not self.experiments:
            how = f"see: {command('lab', 'run')}, {command('lab', 'evaluate')}"
            raise ExplorerError(f"{self.root}: no results of container starts ({how})")
        self.open(experiment or next(iter(self.experiments)))

    def open(self, experiment: str) -> Starts:
        """Open another experiment. Raises ExplorerError."""
        if experiment not in self.experiments:
            known = ", ".join(self.experiments)
            raise ExplorerError(f"no such experiment (got {experiment!r}, wanted one of {known})")
        self.name = experiment
        self.starts = Starts(self.experiments[experiment])
        return self.starts

    def contents(self) -> pd.DataFrame:
        """Return the number of arms and good starts for each combination of axes."""
        frame = pd.DataFrame(self.starts.rows)
        groups = frame.groupby(list(AXES), sort=False)
        return groups.agg(arms=("arm", "nunique"), starts=("arm", "size")).reset_index()

    def distribution(self, **chosen: Any) -> Figure:
        """Draw the starts of a choice: each arm's distribution on the left, its median by phase on the right."""
        whole = self.starts.choose(**chosen)
        rows = self.starts.select(**whole)
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 3.9), layout="constrained")
        totals = {
            arm: [float(row["total_s"]) for row in rows if row["arm"] == arm]
            for arm in self.starts.choices("arm", **whole)
        }
        draw_samples(left, totals, "from before the pull until ready", "seconds")
        title = "medians with 95 % intervals (below six: range), by phase"
        draw_phases(right, self.starts.summaries(**whole), title)
        for label in right.get_xticklabels():
            label.set(rotation=12 if len(totals) > 3 else 0)
        figure.suptitle(self.title(whole), fontsize=12.5, x=0.01, ha="left")
        return figure

    def waterfall(self, arm: str = "", rank: int = 0, **chosen: Any) -> Figure:
        """Draw the ``rank``-th fastest start of an arm, from 1 (default: the middle one).

        Raises ExplorerError.
        """
        ranked = self.starts.ranked(arm, **chosen)
        if not 0 <= rank <= len(ranked):
            raise ExplorerError(f"rank: wanted 1 to {len(ranked)} (got {rank})")
        return waterfall(ranked[rank - 1 if rank else (len(ranked) - 1) // 2])

    def table(self, **chosen: Any) -> pd.DataFrame:
        """Return medians and intervals of a choice, a row for each arm."""
        records = summary_records(self.starts.summaries(**chosen))
        return pd.DataFrame(records).drop(columns=["image", "network", "start"])

    def title(self, chosen: dict[str, Any]) -> str:
        """Return a choice in words."""
        link = f"{chosen['rate_mbit']:g} Mbit/s, {chosen['rtt_ms']:g} ms round trip"
        disk = "" if chosen["disk"] == "native" else f", {chosen['disk']} disk"
        return f"{self.name}: {chosen['image']}, {chosen['start']} start over {link}{disk}"

    def show(self, arm: str = "", rank: int = 0, **chosen: Any) -> None:
        """Show distribution, table and one start in a notebook."""
        from IPython import display

        from obdlab.lab.show.notebook import show_figure

        shown: Any = display  # untyped
        for figure in (self.distribution(**chosen), self.waterfall(arm, rank, **chosen)):
            show_figure(figure, self.title(self.starts.choose(**chosen)))
            plt.close(figure)
        shown.display(shown.HTML(as_html(self.table(**chosen)) + f"<p>{self.starts.note()}</p>"))


# If starts differ in their settings, the settings were compared: they become part of the arm's name.
def _with_settings(rows: list[Row]) -> list[Row]:
    if len({json.dumps(row.get("settings", {}), sort_keys=True) for row in rows}) < 2:
        return rows
    named = []
    for row in rows:
        changed = ", ".join(f"{key}={value}" for key, value in sorted(row.get("settings", {}).items()))
        named.append({**row, "arm": f"{row['arm']} ({changed})"} if changed else row)
    return named


# A context holds neither image nor workload nor compression: they are a cell's.
def _measured_under(row: Row) -> tuple[str, ...]:
    keys = ("context", "image_digest", "workload", "algorithm", "block_size")
    return tuple(str(row.get(key, "")) for key in keys)


def _group(row: Row) -> tuple[Any, ...]:
    return (*(row[axis] for axis in AXES), row["arm"])


def find_experiments(root: Path) -> dict[str, Path]:
    """Return the directories of stored starts at, one or two levels below ``root``, by name."""
    found = {}
    for path in sorted({root, *root.glob("*/"), *root.glob("*/*/")}):
        if not (path / "rows.jsonl").is_file():
            continue
        try:
            spec = last_spec(path)
        except SpecError:
            continue  # stopped before spec.json was written, or written by another version
        if spec.kind == START:
            found[path.name if path == root else str(path.relative_to(root))] = path
    return found


def label(axis: str, value: Any) -> str:
    """Return a value of an axis with its unit."""
    return f"{value:g}{_UNITS[axis]}" if axis in _UNITS else str(value)
