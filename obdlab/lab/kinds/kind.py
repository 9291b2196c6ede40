"""The base class of kinds of experiments: axes whose points are measured, options of all points, and metrics.

A kind says what a declaration may hold and measures points. The engine (``obdlab.lab.run``) does the rest, for every
kind alike: order, wait for a quiet host, time limits, rows, images, plans, reports, clusters.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from obdlab.lab.images.builder import BuiltImage
    from obdlab.lab.paths import LabPaths

Value = str | int | float | bool
#: A value of an option: a scalar or a table.
Option = Any
Point = dict[str, Value]
Row = dict[str, Any]


class SpecError(ObdlabError):
    """An experiment's declaration has an unknown key, a wrong type or an invalid value."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured number in ``unit``. ``higher`` is True if a larger value is better."""

    key: str
    unit: str
    higher: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a kind's files while it measures: ``work``, on a real disk, is new and removed afterwards."""

    work: Path
    #: OCI layouts by image name, of the images that an axis or option "image" names.
    images: Mapping[str, Path]
    say: Callable[[str], None] = field(default=lambda text: None)


@dataclass(frozen=True, slots=True)
class Job:
    """The points of one bench: axes and options of the declaration, its images, and the place to work in."""

    axes: Mapping[str, tuple[Value, ...]]
    options: Mapping[str, Option]
    #: The values of the axes in ``Kind.bench_axes``, which all points of the bench share.
    shared: Point
    built: Mapping[str, BuiltImage]
    paths: LabPaths
    #: A new directory, removed afterwards.
    work: Path
    say: Callable[[str], None]


class Bench:
    """Measures points, one after the other. This one calls a function that returns the numbers of one row."""

    def __init__(self, measure: Callable[[Point], dict[str, float]]) -> None:
        self._one = measure

    def environment(self) -> dict[str, Any]:
        """Return the facts about the bench that the rows' environment records."""
        return {}

    def measure(self, point: Point) -> Generator[Row]:
        """Measure a point; yield its rows one by one. Raises ObdlabError and OSError for a failed measurement."""
        yield {**self._one(point)}

    def clean(self) -> None:
        """Remove the remains of a failed point. Raises LabError if the bench cannot be used after it."""


class Report(Protocol):
    """The content of a kind's stored rows, for readers and for programs."""

    def lines(self, spec: Any, rows: Sequence[Row], *, details: bool) -> list[str]:
        """Return the report's lines, at most 100 columns wide where the content permits; [] without good rows."""

    def facts(self, spec: Any, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the same as values for programs."""

    def caveats(self, spec: Any, rows: Sequence[Row]) -> list[str]:
        """Return sentences about failed rows, busy hosts and other reasons for caution."""


class Kind:
    """One kind of experiment. Kinds hold no state."""

    name: ClassVar[str]
    #: Default values of each axis.
    axes: ClassVar[Mapping[str, tuple[Value, ...]]]
    options: ClassVar[Mapping[str, Option]]
    #: Reports show ratios of the first metric.
    metrics: ClassVar[tuple[Metric, ...]]
    #: Programs that the kind needs, each with its Debian package.
    programs: ClassVar[Mapping[str, str]]
    #: The axis whose values are the compared arms, the first of them the baseline; "": the first axis.
    arm_axis: ClassVar[str] = ""
    #: Axes whose values a bench is made for: one bench for each combination.
    bench_axes: ClassVar[tuple[str, ...]] = ()
    #: Keys at the top of a declaration that stand for "axes.NAME" or "options.NAME".
    short_keys: ClassVar[Mapping[str, str]] = {}
    #: Defaults of a declaration.
    a_a: ClassVar[bool] = False
    cell_timeout_s: ClassVar[float] = 600.0
    #: The points that benches measure have the key "repeat", the number of the cell's: the seed of a simulation.
    seeded: ClassVar[bool] = False
    #: Keys of :meth:`how_measured` that older rows lack, oldest first, each with the value that it had then.
    added: ClassVar[Mapping[str, Value]] = {}
    #: Modules that measure; ``obdlab.lab.run.code`` follows their imports. (): the kind's own module.
    measured: ClassVar[tuple[str, ...]] = ()
    #: The notebook that renders a report, and the reporter; None is a table of points.
    notebook: ClassVar[str] = "points.ipynb"
    report: ClassVar[Report | None] = None

    def bench(
        self, options: Mapping[str, Option], place: Place
    ) -> AbstractContextManager[Callable[[Point], dict[str, float]]]:
        """Prepare the state that all points share. Raises LabError.

        The yielded function measures one point and returns numbers by the keys of ``metrics``.
        """
        raise NotImplementedError

    def open(self, job: Job) -> AbstractContextManager[Bench]:
        """Prepare a bench for the points of ``job``. Raises LabError. By default its rows come from :meth:`bench`."""
        return self._open(job)

    @contextmanager
    def _open(self, job: Job) -> Iterator[Bench]:
        place = Place(job.work, {name: image.layout for name, image in job.built.items()}, job.say)
        with self.bench(job.options, place) as measure:
            yield Bench(measure)

    def checked(
        self, axes: Mapping[str, tuple[Value, ...]], options: Mapping[str, Option]
    ) -> tuple[Mapping[str, tuple[Value, ...]], Mapping[str, Option]]:
        """Return axes and options of the right types as cells hold them. Raises SpecError for invalid values."""
        return axes, options

    def needed_programs(self, axes: Mapping[str, tuple[Value, ...]]) -> Mapping[str, str]:
        """Return the programs that an experiment needs, each with its Debian package or an instruction."""
        return self.programs

    def columns(self, options: Mapping[str, Option], point: Point) -> Row:
        """Return the columns of a point's rows that come from the declaration."""
        return {"kind": self.name, **point}

    def identity(self, options: Mapping[str, Option], point: Point) -> dict[str, Any]:
        """Return the values that, with repeat, image and context, identify a cell."""
        return {"kind": self.name, "point": point, "options": dict(options)}

    def how_measured(self, options: Mapping[str, Option]) -> dict[str, Any]:
        """Return the values that affect a cell's rows but are not in its :meth:`identity`."""
        return {}

    def failed(self, options: Mapping[str, Option], done: int) -> Row:
        """Return columns of the row of a failure after ``done`` good rows."""
        return {}

    def where(self, shared: Point) -> str:
        """Return the label of a bench's shared values."""
        return self.name

    def estimate(
        self,
        axes: Mapping[str, tuple[Value, ...]],
        options: Mapping[str, Option],
        points: Sequence[Point],
        sizes: Mapping[str, int],
        disk_size: int,
    ) -> tuple[float, int]:
        """Return an estimate of measuring ``points``: seconds, and bytes in the work directory.

        ``sizes`` are the images' compressed bytes by name, ``disk_size`` is that of the work directory's disk.
        """
        # Layouts, converted layers and their caches.
        return len(points) * self.point_s(options), 3 * sum(sizes.values()) + self.disk_bytes(options)

    def point_s(self, options: Mapping[str, Option]) -> float:
        """Return an estimate of the time for one point, in seconds."""
        return 1.0

    def disk_bytes(self, options: Mapping[str, Option]) -> int:
        """Return an estimate of the kind's files in ``Place.work``, without those made from an image."""
        return 0
