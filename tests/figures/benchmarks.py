"""What benchmarks printed, from the rows that ``tests.benchmarks.keep`` kept: the median of each number over runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

PLACE = Path(__file__).parents[2] / "experiments" / "measured" / "benchmarks"
#: The benchmarks that pages show, each with its arguments.
SHOWN: dict[str, tuple[str, ...]] = {
    "zfile": (),
    "merge": (),
    "cache": (),
    "device": (),
    "device_images": (),
    "turbo_device": (),
    "many_devices": (),
    "live": (),
    "graduation": (),
    "tcmu": (),
    "native": (),
    "device_kinds": (),
    "snapshotter_starts": (),
    "nbd": (),
    "http_libraries": (),
    "remote": (),
}
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.]*\d)")


def table(name: str, place: Path = PLACE) -> str:
    """Return a benchmark's lines as a table, or a sentence if no run of it is kept.

    The runs of the newest commit count. Numbers that differ between them are medians.
    """
    command = f"`python -m tests.benchmarks.{' '.join((name, *SHOWN.get(name, ())))}`"
    rows = _rows(place / f"{name}.jsonl")
    if not rows:
        return f"{command}: no run is kept yet."
    loads = [row["load_1m"] for row in rows]
    load = f"{min(loads):g}" if min(loads) == max(loads) else f"{min(loads):g} to {max(loads):g}"
    about = f"{_count(len(rows))}, commit {rows[0]['git_commit'][:7]}, {rows[0]['started'][:10]}, load {load}"
    if cores := rows[0].get("cores"):
        about = f"{cores} cores of {rows[0]['cpu_model']}, {about}"
    lines = [_cell(line) for line in _medians([row["printed"] for row in rows])]
    return "\n".join((f"| {command}: {about} |", "|---|", *(f"| {line} |" for line in lines)))


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    newest = max(rows, key=lambda row: row["started"])["git_commit"]
    return [row for row in rows if row["git_commit"] == newest]


# Runs print the same lines with other numbers. A line that not all runs have stays as the first printed it.
def _medians(runs: list[list[str]]) -> list[str]:
    shapes = [[_NUMBER.sub("#", line).split() for line in run] for run in runs]
    if any(shape != shapes[0] for shape in shapes):
        return runs[0]
    return [_median(same) for same in zip(*runs, strict=True)]


def _median(lines: tuple[str, ...]) -> str:
    numbers = iter(list(zip(*(_NUMBER.findall(line) for line in lines), strict=True)))

    def middle(match: re.Match[str]) -> str:
        places = len(match[0].partition(".")[2])
        return f"{median(map(float, next(numbers))):.{places}f}"

    return _NUMBER.sub(middle, lines[0])


# Blanks that align columns would vanish in a table.
def _cell(line: str) -> str:
    return re.sub(r" {2,}", "  ", line.strip()).replace("|", "\\|")


def _count(runs: int) -> str:
    return "one run" if runs == 1 else f"medians of {runs} runs"
