"""Measuring cells on this host, and the context within which their rows are comparable."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obdlab
from obdlab.lab.images.recipe import image_label
from obdlab.lab.kinds.startbench import Bench
from obdlab.lab.run import interrupts
from obdlab.lab.testbed.process import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from obdlab.lab.paths import LabPaths
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.spec import Cell, Spec

#: Keys of the environment that must be equal for rows to be comparable. Load, free memory and the like may differ.
CONTEXT_KEYS = ("kernel", "cpu_model", "cores", "code", "containerd", "runc", "registry")


def measure_cells(
    spec: Spec, network: tuple[float, float], cells: Sequence[Cell], paths: LabPaths, say: Callable[[str], None]
) -> Generator[tuple[dict[str, Any], int, Cell, list[Row]]]:
    """Measure cells of one network in order; yield (environment, position, cell, rows) of each.

    A failed cell's last row has ``error``. Raises LabError if the bench cannot be set up.
    """
    todo = list(enumerate(cells))
    while todo:
        # After a failed cell that spoilt the bench, a new bench measures the other cells.
        with Bench(spec, network, paths, say) as bench:
            about = bench.environment()
            spoilt = False
            while todo and not spoilt:
                position, cell = todo.pop(0)
                say(f"start {position + 1} of {len(cells)}: {image_label(cell.image)} {cell.arm} #{cell.repeat + 1}")
                rows, spoilt = _measure(bench, cell)
                yield about, position, cell, rows


def _measure(bench: Bench, cell: Cell) -> tuple[list[Row], bool]:
    try:
        return bench.measure(cell), False
    except LabError as error:
        interrupts.check(error)
        return [failed_row(str(error))], True


def failed_row(error: str) -> Row:
    """Return the row of a cell that failed as a whole."""
    return {"start": "cold", "error": error, "attempt": time.time_ns(), "started": datetime.now(UTC).isoformat()}


def code_digest() -> str:
    """Return a digest of the package's Python files, so that commits to other files leave rows comparable."""
    package = Path(obdlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def how_measured(spec: Spec) -> dict[str, Any]:
    """Return the values of a spec that affect a cell's rows but are not part of the cell."""
    keys = ("warm_starts", "dropped_starts", "ready_timeout_s", "pause_s")
    return {key: getattr(spec, key) for key in keys} | ({"settings": spec.settings} if spec.settings else {})


def context_of(surroundings: dict[str, Any], measured: dict[str, Any], nonce: str = "") -> str:
    """Return the identity of code, host and way of measuring under which rows can be compared."""
    stable = {key: surroundings.get(key) for key in CONTEXT_KEYS} | measured
    return hashlib.sha256((json.dumps(stable, sort_keys=True) + nonce).encode()).hexdigest()[:12]
