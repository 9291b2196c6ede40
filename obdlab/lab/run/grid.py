"""Experiments over a grid of points, of any kind in ``obdlab.lab.kinds``: declaration, run, table.

Storage of results (``rows``), order of measuring, wait for a quiet host, environment and statistics are those of
container starts.
"""

from __future__ import annotations

import hashlib
import json
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tqdm import tqdm

from obdlab.errors import ObdlabError
from obdlab.lab.baselines.adapter import how_to_install
from obdlab.lab.images.pins import Pins, digests_of, image_notes, make_pins, obtain, read_pins, valid_pins
from obdlab.lab.images.recipe import image_label
from obdlab.lab.kinds import KINDS
from obdlab.lab.kinds.kind import Place, is_value
from obdlab.lab.paths import LabPaths
from obdlab.lab.run import diskspace, interrupts
from obdlab.lab.run.measuring import code_digest, context_of
from obdlab.lab.run.plan import plan_grid
from obdlab.lab.run.rows import Row, RowStore
from obdlab.lab.run.spec import SpecError
from obdlab.lab.run.statistics import cliffs_delta, median_interval, ratio_interval
from obdlab.lab.testbed import environment
from obdlab.lab.testbed.exclusive import only_experiment
from obdlab.lab.testbed.process import LabError
from obdlab.lab.testbed.timelimit import time_limit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from obdlab.lab.images.builder import BuiltImage
    from obdlab.lab.kinds.kind import Kind, Metric, Point, Value


@dataclass(frozen=True, slots=True)
class GridSpec:
    """A declared grid. ``axes`` and ``options`` are complete: the declaration's values over the kind's defaults."""

    name: str
    kind: str
    axes: Mapping[str, tuple[Value, ...]]
    options: Mapping[str, Value]
    repeats: int = 5
    seed: int = 20200715
    load_limit: float = 1.5
    quiet_wait_s: float = 120.0
    cell_timeout_s: float = 600.0
    description: str = ""

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Check a parsed declaration. Raises SpecError."""
        kind = KINDS.get(str(values.get("kind")))
        if kind is None:
            raise SpecError(f"kind: unknown (got {values.get('kind')!r}, wanted start or one of {', '.join(KINDS)})")
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SpecError(f"unknown key (got {unknown[0]!r}, wanted among {', '.join(sorted(known))})")
        given = dict(values)
        axes = {**kind.axes, **_known(given.pop("axes", {}), kind.axes, "axes")}
        options = {**kind.options, **_known(given.pop("options", {}), kind.options, "options")}
        checked = {key: _points(f"axes.{key}", axis, kind.axes[key][0]) for key, axis in axes.items()}
        for key, value in options.items():
            _typed(f"options.{key}", value, kind.options[key])
        spec = cls(axes=checked, options=options, **given)
        for key in ("repeats", "cell_timeout_s"):
            if type(getattr(spec, key)) not in (int, float) or getattr(spec, key) < 1:
                raise SpecError(f"{key}: wanted a number of at least 1 (got {getattr(spec, key)!r})")
        return spec

    def with_values(self, **values: Any) -> Self:
        """Return the spec with some values changed; "axes.NAME" and "options.NAME" change one of them."""
        merged: dict[str, Any] = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for key, value in values.items():
            table, dot, name = key.partition(".")
            if dot and table in ("axes", "options"):
                merged[table] = {**merged[table], name: value}
            elif isinstance(value, dict) and table in ("axes", "options"):
                merged[table] = {**merged[table], **value}
            else:
                merged[key] = value
        return self.from_values(merged)

    def points(self) -> list[Point]:
        """Every point of the grid."""
        return [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]

    def cells(self) -> list[tuple[Point, int]]:
        """Return (point, repeat) in the order of measuring: each repeat is a shuffled block of all points."""
        order = random.Random(self.seed)
        cells = []
        for repeat in range(self.repeats):
            block = self.points()
            order.shuffle(block)
            cells += [(point, repeat) for point in block]
        return cells

    def image(self, point: Point) -> str:
        """Return the name of a point's image; "" if the kind uses no image."""
        return str(point.get("image", self.options.get("image", "")))

    def images(self) -> list[str]:
        """Return the names of all images that the grid needs."""
        return list(dict.fromkeys(filter(None, map(self.image, self.points()))))

    def key(self, point: Point, repeat: int, context: str, digest: str = "") -> str:
        """Return a cell's identity under ``context``, the key of its row; ``digest`` is that of the cell's image."""
        about: dict[str, Any] = {"kind": self.kind, "point": point, "options": dict(self.options), "repeat": repeat}
        about |= {"image_digest": digest} if digest else {}
        text = json.dumps({**about, "context": context}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class GridExperiment:
    """One grid with its results directory."""

    def __init__(self, spec: GridSpec, directory: Path, paths: LabPaths | None = None) -> None:
        self.spec = spec
        self.store = RowStore(directory)
        self._kind: Kind = KINDS[spec.kind]
        self._paths = paths or LabPaths()

    def run(self, *, again: bool = False) -> int:
        """Measure every cell that has no good row under today's code and host; return how many were measured.

        ``again`` and errors as in :meth:`obdlab.lab.run.experiment.Experiment.run`.
        """
        with diskspace.naming_full_disks(self.store.directory, *self._places):
            return self._run(again)

    @property
    def _places(self) -> tuple[Path, ...]:
        return (self._paths.work, self._paths.images, Path(tempfile.gettempdir()))

    def _run(self, again: bool) -> int:
        for text in self.store.mend():
            print(text, file=sys.stderr, flush=True)
        surroundings = {**environment.capture(self._paths.work), "code": code_digest()}
        context = context_of(surroundings, {}, str(time.time_ns()) if again else "")
        pins = {} if again else valid_pins(read_pins(self.store.directory), self.spec.images(), self._paths)
        images: dict[str, BuiltImage] = {}
        pending = self._pending(context, pins)
        if self._paths.locked or pending:
            self._check_programs()
            if pending:
                plan = plan_grid(self.spec, self._kind, len(pending), self._paths)
                print(*plan.lines(self.spec.name), sep="\n", file=sys.stderr, flush=True)
                plan.check()
            images = obtain(self.spec.images(), self._paths, pins, _say(None))
            pins = make_pins({name: image.facts() for name, image in images.items()})
            pending = self._pending(context, pins)
        self._write_spec(context, pins)
        if pending:
            with only_experiment():
                self._measure(pending, surroundings, context, images)
        self.store.write_csv()
        return len(pending)

    def progress(self) -> dict[str, tuple[int, int]]:
        """Return (cells measured, cells in all), under today's code and host."""
        context = context_of({**environment.capture(self._paths.work), "code": code_digest()}, {})
        pins = valid_pins(read_pins(self.store.directory), self.spec.images(), self._paths)
        count = len(self.spec.cells())
        return {self.spec.kind: (count - len(self._pending(context, pins)), count)}

    def rows(self) -> list[Row]:
        """Return the rows of the last run's cells: for each cell the last good row, else the last failed one."""
        try:
            context = str(json.loads((self.store.directory / "spec.json").read_text())["context"])
        except FileNotFoundError:
            return []
        pins = read_pins(self.store.directory)
        keys = {self._key(*cell, context, pins) for cell in self.spec.cells()}
        found: dict[str, Row] = {}
        for row in self.store.rows():
            if row["cell"] in keys and (row["cell"] not in found or found[row["cell"]].get("error")):
                found[row["cell"]] = row
        return list(found.values())

    def facts(self) -> dict[str, Any]:
        """Return the medians with their intervals and the caveats, as values for programs."""
        rows = self.rows()
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            if not row.get("error"):
                groups[json.dumps({axis: row[axis] for axis in self.spec.axes})].append(row)
        keys = [metric.key for metric in self._kind.metrics]
        points = [
            {**json.loads(point), **{key: asdict(median_interval([row[key] for row in found])) for key in keys}}
            for point, found in groups.items()
        ]
        return {"points": points, "caveats": self._caveats(rows)}

    def report(self) -> list[str]:
        """Return the lines of the report: table and caveats."""
        rows = self.rows()
        return grid_table(self.spec, [row for row in rows if not row.get("error")]) + self._caveats(rows)

    def _caveats(self, rows: list[Row]) -> list[str]:
        lines = [f"Left out: {_label(self.spec, row)} failed: {row['error']}" for row in rows if row.get("error")]
        busy = [row for row in rows if not row.get("quiet", True)]
        if busy:
            worst = max(row["load_1m"] for row in busy)
            lines.append(
                f"{len(busy)} of {len(rows)} cells on a busy host (load up to {worst:.1f}): trust ratios more."
            )
        used = {row["environment"] for row in rows}
        return lines + image_notes(about for key, about in self.store.environments().items() if key in used)

    def _check_programs(self) -> None:
        missing = [
            f"{name} ({how_to_install(of)})" for name, of in self._kind.programs.items() if not shutil.which(name)
        ]
        if missing:
            raise LabError(f"{self.spec.kind}: not installed: {', '.join(missing)}")

    def _key(self, point: Point, repeat: int, context: str, pins: Pins) -> str:
        return self.spec.key(point, repeat, context, digests_of(pins).get(self.spec.image(point), ""))

    def _pending(self, context: str, pins: Pins) -> list[tuple[Point, int]]:
        done = self.store.done_keys()
        return [cell for cell in self.spec.cells() if self._key(*cell, context, pins) not in done]

    def _write_spec(self, context: str, pins: Pins) -> None:
        text = json.dumps({**asdict(self.spec), "context": context, "pins": pins}, indent=1)
        (self.store.directory / "spec.json").write_text(text + "\n")

    def _measure(
        self,
        pending: list[tuple[Point, int]],
        surroundings: dict[str, Any],
        context: str,
        images: Mapping[str, BuiltImage],
    ) -> None:
        spec, budget_s = self.spec, self.spec.quiet_wait_s
        self._paths.work.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=self._paths.work, prefix=f"{spec.kind}-") as work,
            tqdm(total=len(pending), unit="cell", desc=spec.name, disable=None) as bar,
        ):
            place = Place(Path(work), {name: image.layout for name, image in images.items()}, _say(bar))
            built = {name: image.facts() for name, image in images.items()}
            environment_id = self.store.add_environment({**surroundings, "built": built})
            pins = make_pins(built)
            with self._kind.bench(spec.options, place) as measure:
                for position, (point, repeat) in enumerate(pending):
                    quiet = environment.wait_for_quiet(spec.load_limit, budget_s, say=place.say)
                    budget_s -= quiet["waited_s"]
                    about = {**point, "repeat": repeat, "position": position, "seed": spec.seed, **quiet}
                    about |= {"cell": self._key(point, repeat, context, pins), "context": context}
                    about |= {"image_digest": digests_of(pins).get(spec.image(point), ""), "host": platform.node()}
                    about |= {"environment": environment_id, "started": datetime.now(UTC).isoformat()}
                    about |= {"attempt": time.time_ns(), "label": "measured", "kind": spec.kind}
                    try:
                        with time_limit(spec.cell_timeout_s, str(point)):
                            values: Row = {**measure(point)}
                    except (ObdlabError, OSError) as error:
                        interrupts.check(error)
                        diskspace.check(error, self._places)
                        values = {"error": str(error)}
                    interrupts.check()
                    self.store.append([{**about, **values}])
                    bar.update()


def grid_table(spec: GridSpec, rows: list[Row]) -> list[str]:
    """Return a line per point: median and interval of each metric, and the first metric's ratio to the baseline."""
    kind = KINDS[spec.kind]
    arm, *others = spec.axes
    groups: dict[tuple[Value, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[axis] for axis in spec.axes)].append(row)
    head = [*others, arm, *(f"{metric.key} [{metric.unit}]" for metric in kind.metrics), "vs baseline", "δ"]
    table = [head, *_lines(spec, kind, groups)]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _lines(spec: GridSpec, kind: Kind, groups: Mapping[tuple[Value, ...], list[Row]]) -> Iterator[list[str]]:
    arm, *others = spec.axes
    first: Metric = kind.metrics[0]
    for rest in product(*(spec.axes[axis] for axis in others)):
        baseline = groups.get((spec.axes[arm][0], *rest), [])
        for value in spec.axes[arm]:
            rows = groups.get((value, *rest), [])
            if not rows:
                continue
            cells = [*map(_shown, rest), _shown(value)]
            cells += [_text([row[metric.key] for row in rows]) for metric in kind.metrics]
            samples = [row[first.key] for row in rows]
            others_samples = [row[first.key] for row in baseline]
            if rows is baseline or not baseline:
                yield [*cells, "", ""]
            else:
                ratio = ratio_interval(samples, others_samples)
                yield [*cells, ratio.text(".2f"), f"{cliffs_delta(samples, others_samples):+.2f}"]


def _text(samples: list[float]) -> str:
    return str(median_interval(samples))


def _label(spec: GridSpec, row: Row) -> str:
    return ", ".join(f"{axis} {_shown(row[axis])}" for axis in spec.axes)


def _shown(value: Value) -> str:
    return image_label(value) if isinstance(value, str) else str(value)


def _say(bar: Any) -> Any:
    def say(text: str) -> None:
        if bar is None or bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            bar.set_description_str(text)

    return say


def _known(given: Any, known: Mapping[str, Any], table: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise SpecError(f"{table}: wanted a table (got {given!r})")
    for key in given:
        if key not in known:
            raise SpecError(f"{table}: unknown key (got {key!r}, wanted among {', '.join(known) or 'none'})")
    return dict(given)


def _points(where: str, values: Any, example: Value) -> tuple[Value, ...]:
    if not isinstance(values, list | tuple) or not values or len(set(values)) != len(values):
        raise SpecError(f"{where}: wanted a list of different values (got {values!r})")
    for value in values:
        _typed(where, value, example)
    return tuple(values)


def _typed(where: str, value: Any, example: Value) -> None:
    wanted = (int, float) if type(example) is float else (type(example),)
    if not is_value(value) or type(value) not in wanted:
        raise SpecError(f"{where}: wanted {wanted[-1].__name__} (got {value!r})")
