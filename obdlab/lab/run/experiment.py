"""A declared experiment and its results directory: measure the missing cells, read the stored rows."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from obdlab import plugins
from obdlab.lab.baselines.adapter import check_programs
from obdlab.lab.images.pins import Pins, digests_of, image_notes, make_pins, obtain, read_pins, valid_pins
from obdlab.lab.kinds import KINDS
from obdlab.lab.paths import LabPaths
from obdlab.lab.run import interrupts
from obdlab.lab.run.code import older_codes
from obdlab.lab.run.diskspace import naming_full_disks
from obdlab.lab.run.measuring import RUNTIME_KEYS, Measured, context_of, host_facts, measure_cells
from obdlab.lab.run.plan import plan_run
from obdlab.lab.run.precision import Stopping
from obdlab.lab.run.rows import Row, RowStore, last_attempts, with_quiet
from obdlab.lab.run.summary import versions_notes, wrapped
from obdlab.lab.run.table import PointsReport
from obdlab.lab.testbed.exclusive import only_run
from obdlab.lab.testbed.process import LabError
from obdlab.system.newfile import replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from obdlab.lab.kinds.kind import Report
    from obdlab.lab.run.spec import Cell, Spec


class Cluster(Protocol):
    """Hosts that measure in place of this one. ``surroundings`` are the facts that all of them share.

    Packages register one as ``experiments`` of the group ``obdlab.schedulers``.
    """

    surroundings: dict[str, Any]

    def images(self, spec: Spec, pins: Pins, paths: LabPaths) -> Pins:
        """Have every host build the images that it lacks; return the pins that all hosts share."""

    def measure(self, spec: Spec, pending: Sequence[Cell], paths: LabPaths) -> Generator[Measured]:
        """Measure cells; yield them as they come."""

    def close(self) -> None:
        """Leave the hosts."""


def _cluster_at(address: str, kind: str, paths: LabPaths) -> Cluster:
    cluster: Callable[[str, str, LabPaths], Cluster] | None = plugins.load("obdlab.schedulers", "experiments")
    if cluster is None:
        raise LabError(f"{address}: no installed package spreads experiments over hosts (obdlab.schedulers)")
    return cluster(address, kind, paths)


class Experiment:
    """One spec with its results directory."""

    def __init__(self, spec: Spec, directory: Path, paths: LabPaths | None = None) -> None:
        self.spec = spec
        self.store = RowStore(directory)
        self._paths = paths or LabPaths()

    def run(self, *, again: bool = False, scheduler: str = "") -> int:
        """Measure every cell that has no good row under today's code and host; return how many were measured.

        ``again`` measures every cell again and keeps the old rows. Needs root, and the host and the results directory
        for itself, else raises LabError. A failed cell leaves a row with ``error`` and the run goes on. A stop
        (Ctrl-C) keeps the rows of finished cells and leaves no process. ``scheduler`` is the address of a scheduler;
        its workers' hosts measure instead of this one (:class:`Cluster`).
        """
        places = (self.store.directory, self._paths.work, self._paths.images, Path(tempfile.gettempdir()))
        with (
            naming_full_disks(*places),
            only_run(self.store.directory),
            closing(_cluster_at(scheduler, self.spec.kind, self._paths)) if scheduler else nullcontext() as cluster,
        ):
            return self._run(again, cluster)

    def _run(self, again: bool, cluster: Cluster | None) -> int:
        if cluster and self.spec.precision:
            raise LabError("precision: a run that stops early is one host's (got a scheduler)")
        for text in self.store.mend():
            _say(text)
        surroundings = cluster.surroundings if cluster else host_facts(self.spec.kind, self._paths.work)
        contexts = self._contexts(surroundings, str(time.time_ns()) if again else "")
        pins = {} if again else valid_pins(read_pins(self.store.directory), self.spec.images(), self._paths)
        pending = self._pending(contexts, pins)
        if self._paths.locked or pending:
            # The pending cells depend on the images' digests, so images are built before anything is measured.
            pins = cluster.images(self.spec, pins, self._paths) if cluster else self._images_here(pending, pins)
            pending = self._pending(contexts, pins)
        # Written before anything is measured: "resume" reads it.
        self._write_spec(contexts, pins)
        measured = 0
        if pending:
            paths = replace(self._paths, digests=digests_of(pins))
            with _bar(len(pending), self.spec.name) as bar:
                source = (
                    cluster.measure(self.spec, pending, paths)
                    if cluster
                    else self._measure_here(pending, surroundings, paths, bar, self._stopping(contexts, pins))
                )
                # Close the source here on every path. Otherwise the interpreter's end would take down the bench, when
                # the threads that it waits for no longer run.
                with closing(source):
                    measured = self._keep(source, contexts[0], pins, bar)
        self.store.write_csv()
        return measured

    def progress(self) -> dict[str, tuple[int, int]]:
        """Return (cells measured, cells in all) by bench, under today's code and host."""
        contexts = self._contexts(host_facts(self.spec.kind, self._paths.work))
        pins = valid_pins(read_pins(self.store.directory), self.spec.images(), self._paths)
        pending = self._pending(contexts, pins)
        found = {}
        for shared in self.spec.benches():
            count = len(self.spec.cells(shared))
            missing = sum(self.spec.shared(cell) == shared for cell in pending)
            found[KINDS[self.spec.kind].where(shared)] = (count - missing, count)
        return found

    def report(self) -> list[str]:
        """Return the lines of the report: headline, table, caveats."""
        return self._lines(details=False)

    def details(self) -> list[str]:
        """Return :meth:`report` with a sentence for each comparison."""
        return self._lines(details=True)

    def facts(self) -> dict[str, Any]:
        """Return the content of :meth:`details` as values for programs: times in seconds, sizes in bytes."""
        rows = self.rows()
        return {**self._report.facts(self.spec, rows), "caveats": self._caveats(rows)}

    def _lines(self, *, details: bool) -> list[str]:
        rows = self.rows()
        return self._report.lines(self.spec, rows, details=details) + wrapped(self._caveats(rows))

    def _caveats(self, rows: Sequence[Row]) -> list[str]:
        environments = self.environments()
        told = [*self._report.caveats(self.spec, rows), *self.measured_again()]
        return [*told, *image_notes(environments), *versions_notes(environments)]

    def measured_again(self) -> list[str]:
        """Return a sentence for each arm with failed attempts that :meth:`rows` leaves out for later ones."""
        stored, cells = self._stored()
        shown = {(row["cell"], row["attempt"]) for row in last_attempts(stored, cells)}
        axis = self.spec.arm_axis
        # One for each attempt: several of its starts can have failed.
        failed = {(row["cell"], row["attempt"]): row[axis] for row in stored if row.get("error")}
        counts = Counter(arm for attempt, arm in failed.items() if attempt not in shown)
        said = {arm: arm if isinstance(arm, str) else f"{axis} {arm}" for arm in counts}
        return [
            f"{count} failed attempts of {said[arm]} were measured again."
            if count > 1
            else f"1 failed attempt of {said[arm]} was measured again."
            for arm, count in counts.items()
        ]

    @property
    def _report(self) -> Report:
        return KINDS[self.spec.kind].report or PointsReport()

    # Report the plan (time, disk) of building and measuring, then build the missing images.
    def _images_here(self, pending: list[Cell], pins: Pins) -> Pins:
        check_programs(self.spec.kind, KINDS[self.spec.kind].needed_programs(self.spec.axes))
        if pending:
            plan = plan_run(self.spec, pending, self._paths)
            print(*plan.lines(self.spec.name), sep="\n", file=sys.stderr, flush=True)
            plan.check()
        images = obtain(self.spec.images(), self._paths, pins, _say)
        return make_pins({name: image.facts() for name, image in images.items()})

    # The contexts whose rows count, today's first: those of older codes were given to the same code.
    def _contexts(self, surroundings: dict[str, Any], nonce: str = "") -> list[str]:
        kind = KINDS[self.spec.kind]
        measured = kind.how_measured(self.spec.options)
        contexts = [context_of(surroundings, measured, nonce)]
        # Rows of older code lack the keys that were added after it: they were measured with today's default.
        names = list(kind.added)
        forms = [
            {key: value for key, value in measured.items() if key not in later or value != kind.added[key]}
            for later in (names[first:] for first in range(len(names), -1, -1))
        ]
        if not nonce and self._ran_alike(surroundings):
            for code in (surroundings["code"], *older_codes(self.spec.kind, surroundings["code"])):
                contexts += [context_of({**surroundings, "code": code}, form, runtime=False) for form in forms]
        return list(dict.fromkeys(contexts))

    # Contexts of earlier versions lack the interpreter and its libraries; the environments of their rows have them.
    def _ran_alike(self, surroundings: dict[str, Any]) -> bool:
        return all(
            each.get(key, surroundings.get(key)) == surroundings.get(key)
            for each in self.store.environments().values()
            for key in RUNTIME_KEYS
        )

    # A cell's key under each context.
    def _keys(self, cell: Cell, contexts: Sequence[str], pins: Pins) -> list[str]:
        digest = digests_of(pins).get(self.spec.image(cell.point), "")
        return [self.spec.key(cell, context, digest) for context in contexts]

    def _pending(self, contexts: Sequence[str], pins: Pins) -> list[Cell]:
        done, stopping = self.store.done_keys(), self._stopping(contexts, pins)
        missing = [cell for cell in self.spec.cells() if done.isdisjoint(self._keys(cell, contexts, pins))]
        return [cell for cell in missing if not stopping.is_enough(cell)]

    # The decisions by the rows so far. A run that stops early and is continued decides as if it had not been stopped.
    def _stopping(self, contexts: Sequence[str], pins: Pins) -> Stopping:
        stopping = Stopping(self.spec)
        if self.spec.precision:
            rows: dict[str, list[Row]] = {}
            for row in last_attempts(self.store.rows()):
                rows.setdefault(row["cell"], []).append(row)
            for cell in self.spec.cells():
                for key in self._keys(cell, contexts, pins):
                    stopping.add(cell, rows.get(key, ()))
        return stopping

    def _write_spec(self, contexts: Sequence[str], pins: Pins) -> None:
        latest = {**self.spec.declaration(), "context": contexts[0], "same_contexts": contexts[1:], "pins": pins}
        data = (json.dumps(latest, indent=1) + "\n").encode()
        # Without pins and context no stored row counts as measured: a full disk or a kill leaves the old file.
        replace_file(self.store.directory / "spec.json", data, private=False, sync=True)

    def _measure_here(
        self, pending: list[Cell], surroundings: dict[str, Any], paths: LabPaths, bar: Any, stopping: Stopping
    ) -> Generator[Measured]:
        say = _say if bar.disable else bar.set_description_str
        with closing(measure_cells(self.spec, pending, paths, say, stopping.is_enough)) as measured:
            for about, position, cell, rows in measured:
                stopping.add(cell, rows)
                yield Measured(cell, rows, {**surroundings, **about}, platform.node(), position)

    def _keep(self, measured: Iterable[Measured], context: str, pins: Pins, bar: Any) -> int:
        count = 0
        common = {"context": context, "seed": self.spec.seed, "label": "measured"}
        for one in measured:
            environment = self.store.add_environment(one.environment)
            interrupts.check()
            mine = {
                **self.spec.columns(one.cell),
                "image_digest": digests_of(pins).get(self.spec.image(one.cell.point), ""),
                "cell": self._keys(one.cell, [context], pins)[0],
                "position": one.position,
                "environment": environment,
                "host": one.host,
            }
            self.store.append([{**common, **mine, **row} for row in one.rows])
            bar.update()
            count += 1
        return count

    def rows(self) -> list[Row]:
        """Return the rows of the last run's cells: for each cell the last good attempt, else the last failed one."""
        return with_quiet(last_attempts(*self._stored()))

    # All rows of the last run's cells, and the key that stands for each cell.
    def _stored(self) -> tuple[list[Row], dict[str, str]]:
        contexts, pins = self._last_contexts(), read_pins(self.store.directory)
        cells = {
            key: keys[0] for cell in self.spec.cells() for keys in [self._keys(cell, contexts, pins)] for key in keys
        }
        # Contexts of the same code are one context for :func:`newest_code`.
        return [{**row, "context": contexts[0]} for row in self.store.rows() if row["cell"] in cells], cells

    def _last_contexts(self) -> list[str]:
        try:
            latest = json.loads((self.store.directory / "spec.json").read_text())
        except FileNotFoundError:
            return [""]
        return [str(latest["context"]), *map(str, latest.get("same_contexts", []))]

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments of :meth:`rows`."""
        used = {row["environment"] for row in self.rows()}
        return [value for key, value in self.store.environments().items() if key in used]


# On a terminal and in a notebook's kernel a bar, elsewhere a line per step. JupyterLab shows standard error in red.
def _bar(count: int, name: str) -> tqdm[Any]:
    in_kernel = "ipykernel.kernelapp" in sys.modules
    file, disable = (sys.stdout, False) if in_kernel else (sys.stderr, None)
    return tqdm(total=count, unit="cell", desc=name, disable=disable, file=file, ncols=100 if in_kernel else None)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
