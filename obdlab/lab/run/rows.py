"""Raw results: one tidy row per measured start, appended to a JSON Lines file and never changed.

A results directory holds ``rows.jsonl``, ``environments.jsonl`` (host, versions, shaping; a row names its
environment by id) and ``spec.json``. A stopped run goes on where it was: it skips cells that have all their rows.
Failed starts leave rows with ``error`` as well; their cells are measured again. A run holds the directory by
``run.lock``.

A crash or a full disk can cut a write short. Each row holds the number of rows of its attempt (``attempt_rows``);
an attempt with too few stored rows is ignored. :meth:`RowStore.mend` moves a torn last line to ``rows.jsonl.torn``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import statistics
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from obdlab.command import pip_command
from obdlab.errors import ObdlabError
from obdlab.formats.oci import short_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

Row = dict[str, Any]

#: The label of the second, identical baseline arm that shows the noise floor.
AA_SUFFIX = " (A/A)"


class RowsError(ObdlabError):
    """A results directory holds a malformed row, or rows cannot be exported."""


class RowStore:
    """Rows and environments in one directory."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.path = directory / "rows.jsonl"

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows of attempts, all or none; they are on disk when this returns. Raises OSError."""
        values = list(rows)
        counts = Counter(map(_attempt, values))
        _append_lines(
            self.path,
            [{**row, "attempt_rows": counts[_attempt(row)]} if "attempt" in row else row for row in values],
        )

    def rows(self) -> list[Row]:
        """Return every row, except torn lines and rows of incomplete attempts.

        Raises RowsError for other damage.
        """
        values = _read_lines(self.path)
        counts = Counter(map(_attempt, values))
        # Rows of older results have no ``attempt_rows``.
        return [row for row in values if counts[_attempt(row)] >= row.get("attempt_rows", 0)]

    def mend(self) -> list[str]:
        """Move torn last lines (the host died or its disk was full) aside; return a sentence for each."""
        return [text for path in (self.path, self._environments) if (text := _mend(path))]

    def done_keys(self) -> set[str]:
        """Return the keys of cells that have an attempt without error."""
        failed: dict[tuple[str, int], bool] = {}
        for row in self.rows():
            attempt = (row["cell"], row["attempt"])
            failed[attempt] = failed.get(attempt, False) or bool(row.get("error"))
        return {cell for (cell, _), error in failed.items() if not error}

    def add_environment(self, environment: dict[str, Any]) -> str:
        """Store an environment unless it is stored; return its id, the same for equal environments."""
        identity = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:12]
        if identity not in {line["id"] for line in _read_lines(self._environments)}:
            _append_lines(self._environments, [{"id": identity, **environment}])
        return identity

    def environments(self) -> dict[str, dict[str, Any]]:
        """Return the environments by id."""
        return {line["id"]: line for line in _read_lines(self._environments)}

    @property
    def _environments(self) -> Path:
        return self.directory / "environments.jsonl"

    def write_csv(self) -> Path:
        """Write all rows to ``rows.csv`` with nested values as ``a.b`` columns; return its path."""
        path = self.directory / "rows.csv"
        write_rows(self.rows(), path)
        return path


def last_attempts(rows: Iterable[Row], cells: Mapping[str, str] | None = None) -> list[Row]:
    """Return the rows of each cell's last good attempt, else of its last failed one.

    ``cells`` maps keys to the key that stands for the cell, for cells that have several.
    """
    attempts: dict[str, list[Row]] = {}
    for row in rows:
        cell = (cells or {}).get(row["cell"], row["cell"])
        kept = attempts.get(cell, [])
        if kept and kept[0]["attempt"] == row["attempt"]:
            kept.append(row)
        elif not kept or any(each.get("error") for each in kept):
            attempts[cell] = [row]
    return [row for kept in attempts.values() for row in kept]


def with_quiet(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with "quiet" of their attempt, which waits for a quiet host once, at its cold start.

    The load at its later starts comes from the attempt itself.
    """
    found = list(rows)
    quiet = {_attempt(row): row["quiet"] for row in found if "quiet" in row}
    return [row if _attempt(row) not in quiet else {"quiet": quiet[_attempt(row)], **row} for row in found]


def one_per_attempt(rows: Iterable[Row]) -> list[Row]:
    """Return one row for the starts of one kind in one attempt: the first, with the medians of all numbers.

    They share a pull, a device and caches, so they are one sample, not several. Rows without an attempt stay.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for place, row in enumerate(rows):
        key = (*_attempt(row), row.get("start")) if "attempt" in row else (place,)
        groups.setdefault(key, []).append(row)
    return [_middle(group) for group in groups.values()]


def _middle(group: list[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    numbers = [key for key in group[0] if all(type(row.get(key)) in (int, float) for row in group)]
    return {**group[0], **{key: statistics.median(row[key] for row in group) for key in numbers if key != "attempt"}}


def newest_code(rows: Iterable[Row], *axes: str) -> list[Row]:
    """Return the rows without those that other code or another host gave at the same values of ``axes`` before.

    A median over both would describe neither. The context of a row names code and host.
    """
    found = list(rows)
    newest: dict[tuple[Any, ...], tuple[int, str]] = {}
    for row in found:
        place, one = tuple(str(row.get(axis)) for axis in axes), (row.get("attempt", 0), row.get("context", ""))
        newest[place] = max(newest.get(place, one), one)
    return [row for row in found if newest[tuple(str(row.get(axis)) for axis in axes)][1] == row.get("context", "")]


def write_rows(rows: list[Row], path: Path) -> int:
    """Write rows as ``.csv``, ``.jsonl`` or ``.parquet``; return their number.

    Nested values become ``outer.inner`` columns, except in JSON lines. Raises RowsError for another suffix, or if the
    packages for Parquet are missing.
    """
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
        return len(rows)
    flat = [flatten(row) for row in rows]
    if path.suffix == ".csv":
        columns = sorted({key for row in flat for key in row})
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(flat)
    elif path.suffix == ".parquet":
        try:
            import pandas as pd

            pd.DataFrame(flat).to_parquet(path)
        except ImportError as error:
            raise RowsError(
                f"{path}: Parquet needs pandas and pyarrow: {pip_command('pandas', 'pyarrow')}"
            ) from error
    else:
        raise RowsError(f"{path}: unknown kind of file (wanted .csv, .jsonl or .parquet)")
    return len(flat)


def told_apart(rows: Iterable[Row]) -> list[Row]:
    """Return rows that can be grouped by "image": a name that stands for several images gets the digest appended.

    So measurements of different images are never one group.
    """
    found = list(rows)
    digests: dict[Any, set[str]] = defaultdict(set)
    for row in found:
        digests[row.get("image")].add(row.get("image_digest", ""))
    return [
        {**row, "image": f"{row['image']} ({short_digest(row.get('image_digest', '')) or 'not pinned'})"}
        if "image" in row and len(digests[row["image"]]) > 1
        else row
        for row in found
    ]


def flatten(row: Row, prefix: str = "") -> Row:
    """Turn nested dicts into ``outer.inner`` keys."""
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _attempt(row: Row) -> tuple[Any, Any]:
    return row.get("cell"), row.get("attempt")


def _append_lines(path: Path, values: list[dict[str, Any]]) -> None:
    data = "".join(json.dumps(value, sort_keys=True) + "\n" for value in values).encode()
    with path.open("a+b", buffering=0) as stream:
        size = stream.seek(0, os.SEEK_END)
        try:
            # A torn line of an earlier death must not swallow the row that follows it.
            if size > 0 and os.pread(stream.fileno(), 1, size - 1) != b"\n":
                data = b"\n" + data
            view = memoryview(data)
            while view:
                view = view[os.write(stream.fileno(), view) :]
            os.fsync(stream.fileno())
        except BaseException:  # a full disk or an interrupt must not leave half of an attempt
            os.ftruncate(stream.fileno(), size)
            raise


def _mend(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ""
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    if not torn or not _is_torn(torn.decode(errors="replace")):
        return ""
    aside = path.with_name(f"{path.name}.torn")
    with aside.open("ab") as stream:
        stream.write(torn + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.truncate(path, whole)
    return f"{path}: the last line was torn ({len(torn)} bytes, moved to {aside.name}); its cell is measured again"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    values = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise RowsError(f"{path}: not text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            if _is_torn(line):
                continue
            raise RowsError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(value, dict):
            raise RowsError(f"{path}:{number}: not an object (got {line[:80]!r})")
        values.append(value)
    return values


def _is_torn(line: str) -> bool:
    # Every line is one object, so a torn line starts like an object and does not end like one.
    return line.startswith("{") and not line.endswith("}")
