"""A declared experiment and its results directory: measure the missing cells, read the stored rows.

``bench`` does the measuring; this module chooses the cells, stores rows and reports progress.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.baselines.adapter import check_programs
from obdlab.lab.images.pins import Pins, digests_of, image_notes, make_pins, obtain, read_pins, valid_pins
from obdlab.lab.images.recipe import image_label
from obdlab.lab.paths import LabPaths
from obdlab.lab.run import interrupts
from obdlab.lab.run.cluster import Cluster
from obdlab.lab.run.diskspace import naming_full_disks
from obdlab.lab.run.measuring import code_digest, context_of, how_measured, measure_cells
from obdlab.lab.run.plan import plan_starts
from obdlab.lab.run.rows import Row, RowStore, last_attempts, with_quiet
from obdlab.lab.run.spec import Cell, Spec
from obdlab.lab.run.summary import LEGEND, caveats, findings, headlines, summarise, text_table, wrapped
from obdlab.lab.testbed import environment

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

Network = tuple[float, float]
#: environment, host, position in the order of measuring, cell, rows
Measured = tuple[dict[str, Any], str, int, Cell, list[Row]]


class Experiment:
    """One spec with its results directory."""

    def __init__(self, spec: Spec, directory: Path, paths: LabPaths | None = None) -> None:
        self.spec = spec
        self.store = RowStore(directory)
        self._paths = paths or LabPaths()

    def run(self, *, again: bool = False, scheduler: str = "") -> int:
        """Measure every cell that has no good row under today's code and host; return how many were measured.

        ``again`` measures every cell again and keeps the old rows. Needs root and the host for itself, else raises
        LabError. A failed start leaves a row with ``error`` and the run goes on. A stop (Ctrl-C) keeps the rows of
        finished cells and leaves no process. ``scheduler`` is the address of a Dask scheduler; its workers' hosts
        measure instead of this one (``obdlab.lab.run.cluster``).
        """
        places = (self.store.directory, self._paths.work, self._paths.images, Path(tempfile.gettempdir()))
        with (
            naming_full_disks(*places),
            closing(Cluster(scheduler)) if scheduler else nullcontext() as cluster,
        ):
            return self._run(again, cluster)

    def _run(self, again: bool, cluster: Cluster | None) -> int:
        for text in self.store.mend():
            print(text, file=sys.stderr, flush=True)
        surroundings = cluster.surroundings if cluster else {**environment.capture(), "code": code_digest()}
        context = context_of(surroundings, how_measured(self.spec), str(time.time_ns()) if again else "")
        pins = {} if again else valid_pins(read_pins(self.store.directory), self.spec.images, self._paths)
        pending = self._pending(context, pins)
        if self._paths.locked or pending:
            # The pending cells depend on the images' digests, so images are built before anything is measured.
            pins = cluster.images(self.spec, pins, self._paths) if cluster else self._images_here(pending, pins)
            pending = self._pending(context, pins)
        # Written before anything is measured: "resume" reads it.
        self._write_spec(context, pins)
        paths = replace(self._paths, digests=digests_of(pins))
        count = sum(map(len, pending.values()))
        if count:
            # On a terminal a bar, elsewhere a line per step.
            with tqdm(total=count, unit="start", desc=self.spec.name, disable=None) as bar:
                source = (
                    cluster.measure(self.spec, pending, paths)
                    if cluster
                    else self._measure_here(pending, surroundings, paths, bar)
                )
                # Close the source here on every path. Otherwise the interpreter's end would take down the bench, when
                # the threads that it waits for no longer run.
                with closing(source):
                    self._keep(source, context, pins, bar)
        self.store.write_csv()
        return count

    def progress(self) -> dict[str, tuple[int, int]]:
        """Return (cells measured, cells in all) by network, under today's code and host."""
        context = context_of({**environment.capture(), "code": code_digest()}, how_measured(self.spec))
        pending = self._pending(context, valid_pins(read_pins(self.store.directory), self.spec.images, self._paths))
        counts = {network: len(self.spec.cells(*network)) for network in self.spec.networks()}
        return {
            f"{rate_mbit:g} Mbit/s, {rtt_ms:g} ms": (count - len(pending.get((rate_mbit, rtt_ms), [])), count)
            for (rate_mbit, rtt_ms), count in counts.items()
        }

    def report(self) -> list[str]:
        """Return the lines of the report: headline, table, caveats; 100 columns wide."""
        return self._told(details=False)

    def details(self) -> list[str]:
        """Return :meth:`report` with a sentence for each comparison."""
        return self._told(details=True)

    def facts(self) -> dict[str, Any]:
        """Return the content of :meth:`details` as values for programs: times in seconds, sizes in bytes."""
        rows = self.rows()
        good = any(not row.get("error") for row in rows)
        summaries = summarise(rows, baseline=self.spec.snapshotters[0]) if good else []
        return {
            "headlines": headlines(summaries),
            "summaries": [asdict(summary) for summary in summaries],
            "findings": findings(summaries),
            "caveats": [*caveats(rows), *image_notes(self.environments())],
        }

    def _told(self, *, details: bool) -> list[str]:
        rows = self.rows()
        lines = []
        if any(not row.get("error") for row in rows):
            summaries = summarise(rows, baseline=self.spec.snapshotters[0])
            lines += [*wrapped(headlines(summaries)), "", *text_table(summaries).splitlines(), ""]
            lines += wrapped([LEGEND, *(findings(summaries) if details else ())])
        return lines + wrapped([*caveats(rows), *image_notes(self.environments())])

    # Report the plan (time, disk) of building and measuring, then build the missing images.
    def _images_here(self, pending: dict[Network, list[Cell]], pins: Pins) -> Pins:
        for name in self.spec.snapshotters:
            check_programs(ADAPTERS[name])
        if pending:
            plan = plan_starts(self.spec, [cell for cells in pending.values() for cell in cells], self._paths)
            print(*plan.lines(self.spec.name), sep="\n", file=sys.stderr, flush=True)
            plan.check()
        images = obtain(self.spec.images, self._paths, pins, lambda text: print(text, file=sys.stderr, flush=True))
        return make_pins({name: image.facts() for name, image in images.items()})

    def _pending(self, context: str, pins: Pins) -> dict[Network, list[Cell]]:
        done, digests = self.store.done_keys(), digests_of(pins)
        return {
            network: cells
            for network in self.spec.networks()
            if (
                cells := [
                    cell
                    for cell in self.spec.cells(*network)
                    if cell.key(context, digests.get(cell.image, "")) not in done
                ]
            )
        }

    def _write_spec(self, context: str, pins: Pins) -> None:
        latest = {**asdict(self.spec), "context": context, "pins": pins}
        (self.store.directory / "spec.json").write_text(json.dumps(latest, indent=1) + "\n")

    def _measure_here(
        self, pending: dict[Network, list[Cell]], surroundings: dict[str, Any], paths: LabPaths, bar: Any
    ) -> Generator[Measured]:
        def say(text: str) -> None:
            if bar.disable:
                print(text, file=sys.stderr, flush=True)
            else:
                bar.set_description_str(text)

        for network, cells in pending.items():
            with closing(measure_cells(self.spec, network, cells, paths, say)) as measured:
                for about, position, cell, rows in measured:
                    yield {**surroundings, **about}, platform.node(), position, cell, rows

    def _keep(self, measured: Iterable[Measured], context: str, pins: Pins, bar: Any) -> None:
        common = {"context": context, "seed": self.spec.seed, "label": "measured"}
        if self.spec.settings:
            common["settings"] = self.spec.settings
        for about, host, position, cell, rows in measured:
            common |= {"environment": self.store.add_environment(about), "host": host}
            interrupts.check()
            digest = pins[cell.image]["digest"]
            mine = {
                **asdict(cell),
                "image": image_label(cell.image),
                "recipe": cell.image,
                "image_digest": digest,
                "cell": cell.key(context, digest),
                "position": position,
            }
            self.store.append([{**common, **mine, **row} for row in rows])
            bar.update()

    def rows(self) -> list[Row]:
        """Return the rows of the last run's cells: for each cell the last good attempt, else the last failed one."""
        context, digests = self._last_context(), digests_of(read_pins(self.store.directory))
        cells = [cell for network in self.spec.networks() for cell in self.spec.cells(*network)]
        keys = {cell.key(context, digests.get(cell.image, "")) for cell in cells}
        return with_quiet(last_attempts(row for row in self.store.rows() if row["cell"] in keys))

    def _last_context(self) -> str:
        try:
            return str(json.loads((self.store.directory / "spec.json").read_text())["context"])
        except FileNotFoundError:
            return ""

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments of :meth:`rows`."""
        used = {row["environment"] for row in self.rows()}
        return [value for key, value in self.store.environments().items() if key in used]
