"""What a kind of experiment is: axes whose points are measured, options of all points, and what comes out.

Container starts (``obdlab.lab.spec``) need networks, registries and proofs of coldness; kinds here measure parts of
obdlab by themselves, on this host alone, with the same store, order, environment and statistics.
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
    """A measured number. ``unit`` is what the value is in; ``higher`` says that more is better."""

    key: str
    unit: str
    higher: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a kind may keep files while it measures: ``work``, on a real disk, is new and removed afterwards."""

    work: Path
    #: OCI layouts of the images that axes and options name "image", by name.
    images: Mapping[str, Path]
    say: Callable[[str], None] = field(default=lambda text: None)


class Kind(Protocol):
    """One kind of experiment. It has no state of its own."""

    name: ClassVar[str]
    #: Values measured if a declaration names none. The first axis is what is compared; its first value the baseline.
    axes: ClassVar[Mapping[str, tuple[Value, ...]]]
    options: ClassVar[Mapping[str, Value]]
    #: The first metric is the one that ratios are told of.
    metrics: ClassVar[tuple[Metric, ...]]
    #: Programs it needs, with the Debian package that has each.
    programs: ClassVar[Mapping[str, str]]

    def bench(
        self, options: Mapping[str, Value], place: Place
    ) -> AbstractContextManager[Callable[[Point], dict[str, float]]]:
        """Prepare what all points share. The context's value measures one: numbers by the keys of ``metrics``.

        Raises LabError.
        """

    def point_s(self, options: Mapping[str, Value]) -> float:
        """Return about how long one point takes, in seconds."""
        return 1.0

    def disk_bytes(self, options: Mapping[str, Value]) -> int:
        """Return about how much its files take in ``Place.work``, beside what is made of an image."""
        return 0


def is_value(value: object) -> bool:
    """Tell whether a value of a declaration can be one of a point."""
    return isinstance(value, str | int | float | bool)
