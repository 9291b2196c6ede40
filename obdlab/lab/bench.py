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

from obdlab.errors import ObdlabError
from obdlab.lab import coldness, environment
from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.baselines.adapter import Source, check_programs, is_published
from obdlab.lab.build import DEFAULT_WORK_DIR, build_image
from obdlab.lab.containerd import OwnContainerd
from obdlab.lab.exclusive import only_experiment
from obdlab.lab.leftovers import cleanup_leftovers
from obdlab.lab.netns import ExperimentNetwork
from obdlab.lab.recipe import Recipe, find_recipe
from obdlab.lab.registry import RegistryHost
from obdlab.registry.client import RegistryClient

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from obdlab.lab.netns import LinkCounters
    from obdlab.lab.registry import Traffic
    from obdlab.lab.rows import Row
    from obdlab.lab.spec import Cell, Spec

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
    """One image on the registry; ``references`` has what each adapter pulls."""

    recipe: Recipe
    references: dict[str, str]


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
        for name in self._spec.snapshotters:
            check_programs(ADAPTERS[name])
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
        images = {name: image.references for name, image in self._images.items()}
        compared = {name: ADAPTERS[name].versions() for name in self._spec.snapshotters}
        return {
            "compared": compared,
            "network": self._network.facts(),
            "containerd_setup": self._containerd.facts(),
            "images": images,
        }

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
            ADAPTERS[cell.snapshotter].remove(self._containerd, self._reference(cell))
        return [{**row, "attempt": attempt} for row in rows]

    def _cold(self, cell: Cell) -> Row:
        quiet = environment.wait_for_quiet(self._spec.load_limit, self._quiet_budget_s, say=self._say)
        self._quiet_budget_s -= quiet["waited_s"]
        evidence = coldness.make_cold(self._containerd, self._registry)
        began = self._begin()
        pull_began_s = time.monotonic()
        ADAPTERS[cell.snapshotter].pull(self._containerd, self._reference(cell))
        pull_s = time.monotonic() - pull_began_s
        times, _ = self._start(cell, began)
        return {"start": "cold", "warm": -1, "evidence": evidence, **quiet, **_timed(times, pull_s)}

    def _warm(self, cell: Cell, number: int) -> Row:
        times, traffic = self._start(cell, self._begin())
        evidence = coldness.prove_warm(ADAPTERS[cell.snapshotter].layers(self._containerd), traffic)
        return {"start": "warm", "warm": number, "evidence": evidence, **_timed(times, 0.0)}

    def _reference(self, cell: Cell) -> str:
        return self._images[cell.image].references[cell.snapshotter]

    def _begin(self) -> _Begin:
        return _Begin(self._registry.mark(), self._network.counters(), datetime.now(UTC), os.getloadavg()[0])

    # Start a container, wait until it is ready, remove it.
    def _start(self, cell: Cell, began: _Begin) -> tuple[Row, Traffic]:
        image = self._images[cell.image]
        probe = replace(image.recipe.probe, timeout_s=self._spec.ready_timeout_s)
        name = f"bench-{time.monotonic_ns()}"
        adapter = ADAPTERS[cell.snapshotter]
        with adapter.running(self._containerd, self._reference(cell), name, probe) as container:
            link = self._network.counters().since(began.link)
            phases = container.times.phases_s()
            traffic = self._registry.traffic(began.mark, self._registry.mark())
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

    # Store an image in every form that is compared, unless the registry kept it from an earlier run.
    def _publish(self, recipe: Recipe, layout: Path) -> BenchImage:
        source = Source(recipe, layout, self._spec.algorithm, self._spec.block_size)
        references = {}
        with closing(RegistryClient()) as client:
            for name in self._spec.snapshotters:
                adapter = ADAPTERS[name]
                references[name] = self._registry.reference(recipe.name, adapter.tag(source))
                if not is_published(client, references[name]):
                    self._say(f"{recipe.name}: publishing for {name}")
                    with self._network.unshaped():
                        adapter.publish(source, client, references[name])
        return BenchImage(recipe, references)


def _timed(row: Row, pull_s: float) -> Row:
    total_s = pull_s + row["create_s"] + row["start_s"] + row["ready_s"]
    return {**row, "pull_s": pull_s, "total_s": total_s}
