"""The base class of kinds of experiments: axes whose points are measured, options of all points, and metrics.

Container starts (``obdlab.lab.run.spec``) need networks, registries and proofs of coldness. The kinds here measure
single parts of obdlab on this host alone, with the same store, order, environment and statistics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

Value = str | int | float | bool
Point = dict[str, Value]


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


class Kind(Protocol):
    """One kind of experiment. Kinds hold no state."""

    name: ClassVar[str]
    #: Default values of each axis. Arms are the values of the first axis; its first value is the baseline.
    axes: ClassVar[Mapping[str, tuple[Value, ...]]]
    options: ClassVar[Mapping[str, Value]]
    #: Reports show ratios of the first metric.
    metrics: ClassVar[tuple[Metric, ...]]
    #: Programs that the kind needs, each with its Debian package.
    programs: ClassVar[Mapping[str, str]]

    def bench(
        self, options: Mapping[str, Value], place: Place
    ) -> AbstractContextManager[Callable[[Point], dict[str, float]]]:
        """Prepare the state that all points share. Raises LabError.

        The yielded function measures one point and returns numbers by the keys of ``metrics``.
        """

    def point_s(self, options: Mapping[str, Value]) -> float:
        """Return an estimate of the time for one point, in seconds."""
        return 1.0

    def disk_bytes(self, options: Mapping[str, Value]) -> int:
        """Return an estimate of the kind's files in ``Place.work``, without those made from an image."""
        return 0


def is_value(value: object) -> bool:
    """Return True if a declaration's value can be a value of a point."""
    return isinstance(value, str | int | float | bool)
