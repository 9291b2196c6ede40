"""Measuring cells of any kind on this host, and the context within which their rows are comparable."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obdlab.errors import ObdlabError
from obdlab.lab.baselines.adapter import check_programs
from obdlab.lab.images.recipe import image_label
from obdlab.lab.kinds import KINDS
from obdlab.lab.kinds.kind import Job
from obdlab.lab.run import diskspace, interrupts
from obdlab.lab.run.code import code_digest
from obdlab.lab.testbed import environment
from obdlab.lab.testbed.exclusive import only_experiment
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.timelimit import time_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from obdlab.lab.kinds.kind import Bench
    from obdlab.lab.paths import LabPaths
    from obdlab.lab.run.rows import Row
    from obdlab.lab.run.spec import Cell, Spec

#: Keys of the environment that must be equal for rows to be comparable. Load, free memory and the like may differ.
CONTEXT_KEYS = ("kernel", "cpu_model", "cores", "code", "containerd", "runc", "registry")

#: The same, of the interpreter. Rows of earlier versions have these in their environment alone.
RUNTIME_KEYS = ("python", "decoding", "packages")

_CLEAN_UP_S = 120.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The rows of one cell, the environment that they share, its host, and its position among its bench's cells."""

    cell: Cell
    rows: list[Row]
    environment: dict[str, Any]
    host: str
    position: int


def measure_cells(
    spec: Spec,
    cells: Sequence[Cell],
    paths: LabPaths,
    say: Callable[[str], None],
    is_enough: Callable[[Cell], bool] = lambda cell: False,
) -> Generator[tuple[dict[str, Any], int, Cell, list[Row]]]:
    """Measure cells bench by bench, in order; yield (environment, position, cell, rows) of each.

    Cells of which ``is_enough`` says so when their turn comes are left out. A failed cell's last row has ``error``.
    Raises LabError if a bench cannot be set up or another experiment runs, DiskFullError if a disk was full (the cell
    then has no row), and the errors of ``build_image``.
    """
    kind = KINDS[spec.kind]
    check_programs(spec.kind, kind.needed_programs(spec.axes))
    built = {name: paths.image(name, lambda text: None) for name in spec.images()}
    facts = {"built": {name: image.facts() for name, image in built.items()}}
    paths.work.mkdir(parents=True, exist_ok=True)
    with only_experiment():
        for shared in spec.benches():
            todo = list(enumerate(cell for cell in cells if spec.shared(cell) == shared))
            count, budget_s = len(todo), spec.quiet_wait_s
            while todo:
                # After a failed cell that spoilt the bench, a new bench measures the other cells.
                with tempfile.TemporaryDirectory(dir=paths.work, prefix=f"{spec.kind}-") as work:
                    job = Job(spec.axes, spec.options, shared, built, paths, Path(work), say)
                    with kind.open(job) as bench:
                        about = {**facts, **bench.environment()}
                        spoilt = False
                        while todo and not spoilt:
                            position, cell = todo.pop(0)
                            if is_enough(cell):
                                continue
                            say(f"{position + 1} of {count}: {cell_label(spec, cell)}")
                            quiet = environment.wait_for_quiet(spec.load_limit, budget_s, say=say)
                            budget_s -= quiet["waited_s"]
                            rows, spoilt = _measure(spec, bench, cell, (paths.work, Path(tempfile.gettempdir())))
                            yield about, position, cell, [{**quiet, **row} for row in rows]


def _measure(spec: Spec, bench: Bench, cell: Cell, places: Sequence[Path]) -> tuple[list[Row], bool]:
    kind, what = KINDS[spec.kind], cell_label(spec, cell)
    rows: list[Row] = []
    spoilt = False
    attempt, started = time.time_ns(), datetime.now(UTC).isoformat()
    try:
        with time_limit(spec.cell_timeout_s, what), closing(bench.measure(spec.measured_point(cell))) as measured:
            rows.extend(measured)  # the rows before an error are kept
    except (ObdlabError, OSError) as error:
        interrupts.check(error)
        diskspace.check(error, places)
        failure = {**kind.failed(spec.options, len(rows)), "error": str(error)}
        try:
            with time_limit(_CLEAN_UP_S, f"{what}: removal of its remains"):
                bench.clean()
        except LabError as remains:
            interrupts.check(remains)
            failure["error"] += f" (then: {remains})"
            spoilt = True
        rows.append({**failure, "started": datetime.now(UTC).isoformat()})
    interrupts.check()
    return [{"started": started, **row, "attempt": attempt} for row in rows], spoilt


def cell_label(spec: Spec, cell: Cell) -> str:
    """Return a cell in words: the values of its axes that vary, and its repeat."""
    varied = [key for key, values in spec.axes.items() if len(values) > 1 or key in ("image", spec.arm_axis)]
    words = [image_label(str(cell.point[key])) for key in varied if key not in spec.shared(cell)]
    return f"{' '.join(words)} #{cell.repeat + 1}"


def failed_rows(spec: Spec, error: str) -> list[Row]:
    """Return the rows of a cell that failed as a whole."""
    about = {"error": error, "attempt": time.time_ns(), "started": datetime.now(UTC).isoformat()}
    return [{**KINDS[spec.kind].failed(spec.options, 0), **about}]


def host_facts(kind: str, work: Path) -> dict[str, Any]:
    """Return this host's environment, with the digest of the code that a kind measures."""
    return {**environment.capture(work), "code": code_digest(kind)}


def context_of(
    surroundings: dict[str, Any], measured: dict[str, Any], nonce: str = "", *, runtime: bool = True
) -> str:
    """Return the identity of code, host and way of measuring under which rows can be compared.

    Without ``runtime`` it is the one that earlier versions gave.
    """
    stable = {key: surroundings.get(key) for key in CONTEXT_KEYS} | measured
    if runtime:
        stable |= {key: surroundings.get(key) for key in RUNTIME_KEYS}
    return hashlib.sha256((json.dumps(stable, sort_keys=True) + nonce).encode()).hexdigest()[:12]
