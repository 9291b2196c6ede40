"""A declared experiment and its results directory: run what is not measured yet, read what is.

The measuring itself is in ``bench``; this module decides what to measure, keeps rows and says how far it is.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

import obdlab
from obdlab.lab import environment
from obdlab.lab.bench import Bench, LabPaths
from obdlab.lab.process import LabError
from obdlab.lab.rows import Row, RowStore
from obdlab.lab.spec import Cell, Spec, SpecError

#: What of the environment makes older rows incomparable. Load, free memory and the like may differ.
CONTEXT_KEYS = ("kernel", "cpu_model", "cores", "code", "containerd", "runc", "registry")


class Experiment:
    """One spec with its results directory."""

    def __init__(self, spec: Spec, directory: Path, paths: LabPaths | None = None) -> None:
        self.spec = spec
        self.store = RowStore(directory)
        self._paths = paths or LabPaths()

    def run(self, *, again: bool = False) -> int:
        """Measure every cell that has no good row under today's code and host; return how many were measured.

        ``again`` measures everything anew and keeps the old rows. Needs root, and the host for itself (LabError). A
        start that fails leaves a row with ``error`` and the run goes on; a stop (Ctrl-C) leaves every finished cell's
        rows and nothing running.
        """
        surroundings = {**environment.capture(), "code": code_digest()}
        context = context_of(surroundings, self.spec, str(time.time_ns()) if again else "")
        pending = self._pending(context)
        # Kept before anything is measured: what "resume" goes on with.
        self._write_spec(context)
        count = sum(map(len, pending.values()))
        if count:
            # On a terminal a bar, elsewhere a line per step.
            with tqdm(total=count, unit="start", desc=self.spec.name, disable=None) as bar:
                for network, cells in pending.items():
                    if cells:
                        self._run_network(network, cells, surroundings, context, bar)
        self.store.write_csv()
        return count

    def progress(self) -> dict[tuple[float, float], tuple[int, int]]:
        """Return (cells measured, cells in all) of each network, under today's code and host."""
        pending = self._pending(context_of({**environment.capture(), "code": code_digest()}, self.spec))
        counts = {network: len(self.spec.cells(*network)) for network in self.spec.networks()}
        return {network: (count - len(pending[network]), count) for network, count in counts.items()}

    def _pending(self, context: str) -> dict[tuple[float, float], list[Cell]]:
        done = self.store.done_keys()
        return {
            network: [cell for cell in self.spec.cells(*network) if cell.key(context) not in done]
            for network in self.spec.networks()
        }

    def _write_spec(self, context: str) -> None:
        latest = {**asdict(self.spec), "context": context}
        (self.store.directory / "spec.json").write_text(json.dumps(latest, indent=1) + "\n")

    def _run_network(
        self, network: tuple[float, float], cells: list[Cell], surroundings: dict[str, Any], context: str, bar: Any
    ) -> None:
        def say(text: str) -> None:
            if bar.disable:
                print(text, file=sys.stderr, flush=True)
            else:
                bar.set_description_str(text)

        common = {"context": context, "seed": self.spec.seed, "label": "measured", "host": platform.node()}
        todo = list(enumerate(cells))
        while todo:
            # A bench that a failed cell has spoilt is made anew for the others.
            with Bench(self.spec, network, self._paths, say) as bench:
                common["environment"] = self.store.add_environment({**surroundings, **bench.environment()})
                while todo:
                    position, cell = todo.pop(0)
                    say(f"start {position + 1} of {len(cells)}: {cell.image} {cell.arm} #{cell.repeat + 1}")
                    rows, spoilt = _measure(bench, cell)
                    about = {**asdict(cell), "cell": cell.key(context), "position": position}
                    self.store.append([{**common, **about, **row} for row in rows])
                    bar.update()
                    if spoilt:
                        break

    def rows(self) -> list[Row]:
        """Return the rows of the last run's cells: of each cell the last good attempt, or the last failed one."""
        context = self._last_context()
        keys = {cell.key(context) for network in self.spec.networks() for cell in self.spec.cells(*network)}
        attempts: dict[str, list[Row]] = {}
        for row in self.store.rows():
            if row["cell"] not in keys:
                continue
            kept = attempts.get(row["cell"], [])
            if kept and kept[0]["attempt"] == row["attempt"]:
                kept.append(row)
            elif not kept or _failed(kept):
                attempts[row["cell"]] = [row]
        return [row for rows in attempts.values() for row in rows]

    def _last_context(self) -> str:
        try:
            return str(json.loads((self.store.directory / "spec.json").read_text())["context"])
        except FileNotFoundError:
            return ""

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments that :meth:`rows` were measured in."""
        used = {row["environment"] for row in self.rows()}
        return [value for key, value in self.store.environments().items() if key in used]


def _measure(bench: Bench, cell: Cell) -> tuple[list[Row], bool]:
    try:
        return bench.measure(cell), False
    except LabError as error:
        row: Row = {"start": "cold", "error": str(error), "attempt": time.time_ns()}
        return [{**row, "started": datetime.now(UTC).isoformat()}], True


def last_spec(directory: Path) -> Spec:
    """Return the spec of the last run in a results directory. Raises SpecError."""
    path = directory / "spec.json"
    try:
        values = json.loads(path.read_text())
        values.pop("context")
        return Spec.from_values(values)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SpecError(f"{path}: not the spec of a run: {error}") from error


def default_results() -> Path:
    """Return where results are kept if nobody says: ``results`` in the checkout, or here for an installed package."""
    checkout = Path(obdlab.__file__).resolve().parents[1]
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "results"


def _failed(rows: list[Row]) -> bool:
    return any(row.get("error") for row in rows)


def code_digest() -> str:
    """Return a digest of the package's own sources: a commit that changes only texts leaves rows comparable."""
    package = Path(obdlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def context_of(surroundings: dict[str, Any], spec: Spec, nonce: str = "") -> str:
    """Return the identity of code, host and way of measuring under which rows can be compared."""
    stable = {key: surroundings.get(key) for key in CONTEXT_KEYS}
    stable |= {"warm_starts": spec.warm_starts, "ready_timeout_s": spec.ready_timeout_s}
    return hashlib.sha256((json.dumps(stable, sort_keys=True) + nonce).encode()).hexdigest()[:12]
