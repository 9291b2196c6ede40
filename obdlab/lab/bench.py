"""The bench a cell is measured on: network, registry with the images, containerd, and one start at a time.

A cold start is timed from before the pull until the readiness probe answered; a warm one from before ``ctr run``.
Bytes and requests are the registry's own count of what it sent until then (what was under way included), the link's
counters are kept beside.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.convert.layer import LayerOptions
from obdlab.convert.source import open_destination, open_source
from obdlab.errors import ObdlabError
from obdlab.lab import coldness, environment
from obdlab.lab.build import DEFAULT_WORK_DIR, build_image
from obdlab.lab.containerd import OwnContainerd
from obdlab.lab.exclusive import only_experiment
from obdlab.lab.leftovers import cleanup_leftovers
from obdlab.lab.netns import ExperimentNetwork
from obdlab.lab.recipe import Recipe, find_recipe
from obdlab.lab.registry import RegistryHost
from obdlab.registry.client import RegistryClient
from obdlab.registry.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from obdlab.lab.netns import LinkCounters
    from obdlab.lab.registry import Traffic
    from obdlab.lab.rows import Row
    from obdlab.lab.spec import Cell, Spec

#: Changes when a converted image would come out differently, so that kept ones are not used any more.
CONVERTER_VERSION = 1
#: How long all cold starts of one run together wait for a quiet host: a busy one does not get quieter for us.
_QUIET_BUDGET_S = 120.0


@dataclass(frozen=True, slots=True)
class LabPaths:
    """Where an experiment keeps what outlives it."""

    #: Directories that hold ``<name>/recipe.toml``.
    datasets: tuple[Path, ...] = (Path(__file__).parents[2] / "datasets", Path("datasets"))
    images: Path = DEFAULT_WORK_DIR
    #: The registry's storage and containerd's directories; on a real disk.
    work: Path = Path("/var/lib/obdlab/lab")


@dataclass(frozen=True, slots=True)
class BenchImage:
    """One image on the registry: as OCI layers and converted."""

    recipe: Recipe
    plain: str
    lazy: str

    def reference(self, snapshotter: str) -> str:
        """Return what that snapshotter pulls."""
        return self.plain if snapshotter == "overlayfs" else self.lazy


@dataclass(frozen=True, slots=True)
class _Begin:
    mark: int
    link: LinkCounters
    time: datetime
    load_1m: float


class Bench:
    """Everything between a cell and its rows; a context manager that leaves no process, mount or namespace."""

    def __init__(
        self,
        spec: Spec,
        network: tuple[float, float],
        paths: LabPaths,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._spec = spec
        self._paths = paths
        self._say = say
        self._network = ExperimentNetwork(*network)
        self._stack = ExitStack()
        self._images: dict[str, BenchImage] = {}
        self._quiet_budget_s = _QUIET_BUDGET_S

    def __enter__(self) -> Self:
        recipes = [find_recipe(name, self._paths.datasets) for name in self._spec.images]
        layouts = [build_image(recipe, self._paths.images, self._say) for recipe in recipes]
        with ExitStack() as stack:
            stack.enter_context(only_experiment())
            cleanup_leftovers()  # of experiments that were killed
            self._say("starting network, registry and containerd")
            stack.enter_context(self._network)
            self._registry = stack.enter_context(RegistryHost(self._paths.work / "registry", self._network))
            self._containerd = stack.enter_context(OwnContainerd(self._paths.work / "host"))
            for name, recipe, layout in zip(self._spec.images, recipes, layouts, strict=True):
                self._images[name] = self._publish(recipe, layout)
            self._registry.preload()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def environment(self) -> dict[str, Any]:
        """Return what rows measured here must note about network, containerd and images."""
        images = {name: {"plain": image.plain, "lazy": image.lazy} for name, image in self._images.items()}
        return {"network": self._network.facts(), "containerd_setup": self._containerd.facts(), "images": images}

    def measure(self, cell: Cell) -> list[Row]:
        """Measure one cold start and the warm ones after it; a failure becomes a row with ``error``."""
        rows: list[Row] = []
        attempt = time.time_ns()
        try:
            rows.append(self._cold(cell))
            rows += [self._warm(cell, number) for number in range(self._spec.warm_starts)]
        except ObdlabError as error:
            start = "warm" if rows else "cold"
            rows.append({"start": start, "error": str(error), "started": datetime.now(UTC).isoformat()})
        finally:
            self._containerd.remove_image(self._images[cell.image].reference(cell.snapshotter))
        return [{**row, "attempt": attempt} for row in rows]

    def _cold(self, cell: Cell) -> Row:
        reference = self._images[cell.image].reference(cell.snapshotter)
        quiet = environment.wait_for_quiet(self._spec.load_limit, self._quiet_budget_s, say=self._say)
        self._quiet_budget_s -= quiet["waited_s"]
        evidence = coldness.make_cold(self._containerd, self._registry)
        began = self._begin()
        pull_began_s = time.monotonic()
        if cell.snapshotter == "overlayfs":
            self._containerd.pull(reference)
        else:
            self._containerd.lazy_pull(reference)
        pull_s = time.monotonic() - pull_began_s
        times, _ = self._start(cell, began)
        return {"start": "cold", "warm": -1, "evidence": evidence, **quiet, **_timed(times, pull_s)}

    def _warm(self, cell: Cell, number: int) -> Row:
        times, traffic = self._start(cell, self._begin())
        evidence = coldness.prove_warm(self._containerd, cell.snapshotter, traffic)
        return {"start": "warm", "warm": number, "evidence": evidence, **_timed(times, 0.0)}

    def _begin(self) -> _Begin:
        return _Begin(self._registry.mark(), self._network.counters(), datetime.now(UTC), os.getloadavg()[0])

    # Start a container, wait until it is ready, remove it.
    def _start(self, cell: Cell, began: _Begin) -> tuple[Row, Traffic]:
        image = self._images[cell.image]
        probe = replace(image.recipe.probe, timeout_s=self._spec.ready_timeout_s)
        name = f"bench-{time.monotonic_ns()}"
        container = self._containerd.start(image.reference(cell.snapshotter), name, cell.snapshotter, probe)
        try:
            link = self._network.counters().since(began.link)
            phases = container.times.phases_s()
            traffic = self._registry.traffic(began.mark, self._registry.mark())
        finally:
            container.remove()
        row = {
            "started": began.time.isoformat(timespec="milliseconds"),
            "create_s": phases["create"],
            "start_s": phases["start"],
            "ready_s": phases["ready"],
            "bytes_received": traffic.written,
            "requests": traffic.requests,
            "registry_errors": traffic.errors,
            "link_bytes": link.received,
            "load_1m": began.load_1m,
        }
        return row, traffic

    # Store an image plain and converted, unless the registry kept them from an earlier run.
    def _publish(self, recipe: Recipe, layout: Path) -> BenchImage:
        tag = recipe.fingerprint()
        lazy_tag = f"{tag}-obd{CONVERTER_VERSION}-{self._spec.algorithm}-{self._spec.block_size}"
        image = BenchImage(
            recipe, self._registry.reference(recipe.name, tag), self._registry.reference(recipe.name, lazy_tag)
        )
        with closing(RegistryClient()) as client:
            if not _exists(client, image.plain):
                self._say(f"{recipe.name}: pushing")
                self._registry.push_layout(layout, recipe.name, tag)
            if not _exists(client, image.lazy):
                self._say(f"{recipe.name}: converting")
                with self._network.unshaped():
                    self._convert(layout, image.lazy, client)
        return image

    def _convert(self, layout: Path, reference: str, client: RegistryClient) -> None:
        layer = LayerOptions(algorithm=self._spec.algorithm, block_size=self._spec.block_size)
        convert_image(
            open_source(f"oci:{layout}", client),
            open_destination(reference, client),
            options=ConvertOptions(layer=layer),
        )


def _exists(client: RegistryClient, reference: str) -> bool:
    try:
        client.get_manifest(Reference.parse(reference))
    except ObdlabError:
        return False
    return True


def _timed(row: Row, pull_s: float) -> Row:
    total_s = pull_s + row["create_s"] + row["start_s"] + row["ready_s"]
    return {**row, "pull_s": pull_s, "total_s": total_s}
