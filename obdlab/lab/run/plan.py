"""The plan of a run: images to build, estimated time, disk space needed and free.

Estimates come from an image's compressed bytes (its layout's if it is built, else its recipe's ``size_mb``), the
link's rate, and times of the steps measured on a machine with two processors. They are right to the order of minutes
or hours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from obdlab.lab.images.builder import find_image
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.images.recipe import find_recipe
from obdlab.lab.kinds import KINDS
from obdlab.lab.run.diskspace import DiskFullError, gigabytes, room

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from obdlab.lab.images.recipe import Recipe
    from obdlab.lab.paths import LabPaths
    from obdlab.lab.run.spec import Cell, Spec

# Bytes of a base (tree and packed form), and of an image's build (tree, apt's archives, layout) as a share.
_BASE, _BUILD_SHARE = 150_000_000, 5.0
_BASE_S, _BUILD_S_PER_MB = 40.0, 0.7
# Starting a bench.
_BENCH_S = 5.0
# A disk with less than this share of the estimate is certainly too small.
_SURELY_TOO_LITTLE = 0.7


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run. ``needs`` is bytes by directory; ``unknown`` names images of yet unknown size."""

    cells: int
    builds: tuple[str, ...]
    seconds: float
    needs: dict[Path, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def lines(self, name: str) -> list[str]:
        """Return the lines to show before the run."""
        takes = f"{name}: {self.cells} cells to measure, about {_minutes(self.seconds)} on a quiet machine"
        lines = [f"{takes}; to build first: {', '.join(self.builds)}" if self.builds else takes]
        lines += [f"disk: needs about {gigabytes(needed)} at {room(place)}" for place, needed in self._by_disk()]
        lines += [f"size not known before it is built: {', '.join(self.unknown)}"] if self.unknown else []
        return lines

    def check(self) -> None:
        """Raise DiskFullError if a disk is certainly too small."""
        for place, needed in self._by_disk():
            found = room(place)
            if found.free < needed * _SURELY_TOO_LITTLE:
                raise DiskFullError(
                    f"not enough disk: {found} (wanted about {gigabytes(needed)}); nothing was built or measured"
                )

    # Directories on one file system share its free space.
    def _by_disk(self) -> list[tuple[Path, int]]:
        disks: dict[int, tuple[Path, int]] = {}
        for place, needed in self.needs.items():
            if not needed:
                continue
            first, before = disks.get(room(place).device, (place, 0))
            disks[room(place).device] = (first, before + needed)
        return list(disks.values())


def plan_run(spec: Spec, cells: Sequence[Cell], paths: LabPaths) -> Plan:
    """Return the plan of measuring ``cells``. Raises RecipeError, and FormatError for a damaged layout."""
    images = _Images(paths)
    for name in dict.fromkeys(filter(None, (spec.image(cell.point) for cell in cells))):
        images.add(name)
    points = [cell.point for cell in cells]
    size = room(paths.work).size
    measuring_s, work = KINDS[spec.kind].estimate(spec.axes, spec.options, points, images.sizes, size)
    benches = sum(any(spec.shared(cell) == shared for cell in cells) for shared in spec.benches())
    seconds = images.seconds + _BENCH_S * benches + measuring_s
    return Plan(len(cells), images.builds, seconds, {paths.images: images.needed, paths.work: work}, images.unknown)


class _Images:
    def __init__(self, paths: LabPaths) -> None:
        self._paths = paths
        self.sizes: dict[str, int] = {}
        self.builds: tuple[str, ...] = ()
        self.unknown: tuple[str, ...] = ()
        self.needed = 0
        self.seconds = 0.0

    def add(self, name: str) -> None:
        recipe = find_recipe(name, self._paths.datasets)
        size = _built_size(recipe, self._paths.images)
        if size is None:
            size = int(recipe.size_mb * 1e6)
            self.builds += (f"{recipe.name} ({gigabytes(size)})" if size else recipe.name,)
            self.unknown += () if size else (recipe.name,)
            base = 0 if recipe.base != "debian" or any(self._paths.images.glob("base-debian-*")) else _BASE
            self.needed += int(size * _BUILD_SHARE) + base
            self.seconds += (_BASE_S if base else 0.0) + size / 1e6 * _BUILD_S_PER_MB
        self.sizes[name] = size


def _built_size(recipe: Recipe, images: Path) -> int | None:
    image = find_image(recipe, images)
    return None if image is None else sum(layer.size for layer in OciLayout(image.layout).manifest.layers)


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
