"""The bench of a cell: network, registry with the images, containerd, and one start at a time.

The time of a cold start runs from before the pull until the readiness probe answers; that of warm and dropped starts
from before ``ctr run``. Bytes and requests count the requests that the registry received until then, unfinished ones
included; the link's counters are kept beside. Processor time is that of containerd, snapshotter, device servers,
container and clients until then, without kernel threads. Memory is their proportional set size at that moment.
"Completion" is the end of the registry's last answer; for a snapshotter that fetches in the background the bench
waits until the registry has been still for a second.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.baselines.adapter import Source, check_programs, is_published
from obdlab.lab.kinds.kind import Bench
from obdlab.lab.testbed import coldness
from obdlab.lab.testbed.cgroups import DISKS
from obdlab.lab.testbed.containerd import MEASURED, OwnContainerd
from obdlab.lab.testbed.leftovers import cleanup_leftovers
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.registry import RegistryHost, Traffic
from obdlab.lab.testbed.residency import resident_below
from obdlab.registry.client import RegistryClient
from obdlab.system.processes import stat_of

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from obdlab.lab.baselines import Adapter
    from obdlab.lab.images.builder import BuiltImage
    from obdlab.lab.images.recipe import Probe, Recipe
    from obdlab.lab.kinds.kind import Job, Option, Point, Row
    from obdlab.lab.testbed.netns import LinkCounters
    from obdlab.lab.testbed.registry import Request
    from obdlab.lab.testbed.startedcontainer import RunningContainer
    from obdlab.settings.settings import Settings

# Background fetching counts as finished when the registry has been still for this long.
_STILL_S = 1.0
_MOST_BACKGROUND_S = 120.0
_WARM_TRIES = 6
_TRUST = "SSL_CERT_FILE"

#: Commands that replace the recipe's command until the container is ready: read all metadata, read all data (the
#: paper's figures 23 and 24). tar writes into a pipe, as it does not read files if its output is /dev/null.
WORKLOADS: dict[str, tuple[str, ...]] = {
    "start": (),
    "du": ("sh", "-c", "du -sx / > /dev/null; echo OBDLAB-READY"),
    "tar": ("sh", "-c", "tar -cf - --one-file-system -C / . 2> /dev/null | cat > /dev/null; echo OBDLAB-READY"),
}
_WORKLOAD_LINE = "OBDLAB-READY"


@dataclass(frozen=True, slots=True)
class BenchImage:
    """One image on the registry; ``references`` holds the reference that each adapter pulls."""

    built: BuiltImage
    references: dict[str, str]

    @property
    def recipe(self) -> Recipe:
        """The recipe that the image was built from."""
        return self.built.recipe


@dataclass(frozen=True, slots=True)
class _Begin:
    mark: int
    link: LinkCounters
    time: datetime
    load_1m: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class _Cell:
    image: str
    snapshotter: str
    disk: str


def host_settings(options: Mapping[str, Option]) -> Settings:
    """Return the settings for opening images, without the place of the cache. Raises SettingsError."""
    return MEASURED.with_values(options["settings"], name="settings")


class StartBench(Bench):
    """Measures cells under one network; a context manager that leaves no process, mount or namespace."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._options = job.options
        self._snapshotters = tuple(map(str, job.axes["arm"]))
        self._settings = host_settings(job.options)
        self._network = ExperimentNetwork(float(job.shared["rate_mbit"]), float(job.shared["rtt_ms"]))
        # TLS for all arms or for none: an arm that cannot do without brings it to the others.
        self._secure = bool(job.options["tls"]) or any(ADAPTERS[name].secure for name in self._snapshotters)
        self._stack = ExitStack()
        self._images: dict[str, BenchImage] = {}

    def __enter__(self) -> Self:
        adapters = [ADAPTERS[name] for name in self._snapshotters]
        work = self._job.paths.work
        if self._options["unpigz"]:
            check_programs("unpigz", {"unpigz": "pigz"})
        with ExitStack() as stack:
            cleanup_leftovers()  # those of killed experiments
            self._job.say("starting network, registry and containerd")
            stack.enter_context(self._network)
            self._registry = stack.enter_context(RegistryHost(work / "registry", self._network, tls=self._secure))
            proxies = list(dict.fromkeys(adapter.name for adapter in adapters if adapter.proxy))
            self._containerd = stack.enter_context(
                OwnContainerd(
                    work / "host",
                    proxies=proxies,
                    settings=self._settings,
                    always_lazy=False,
                    certificate=self._registry.certificate if self._secure else None,
                    unpigz=bool(self._options["unpigz"]),
                )
            )
            if self._secure:
                stack.enter_context(_trusting(self._registry.certificate))
            for name, image in self._job.built.items():
                self._images[name] = self._publish(image)
            self._registry.preload()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def environment(self) -> dict[str, Any]:
        """Return the facts about network, containerd and published images."""
        return {
            "compared": {name: ADAPTERS[name].versions() for name in self._snapshotters},
            "network": self._network.facts(),
            "containerd_setup": self._containerd.facts(),
            "images": {name: image.references for name, image in self._images.items()},
        }

    def measure(self, point: Point) -> Generator[Row]:
        """Measure one cold start and the starts after it; yield a row for each."""
        cell = _Cell(str(point["image"]), str(point["arm"]), str(point["disk"]))
        adapter = ADAPTERS[cell.snapshotter]
        self._containerd.groups.set_disk(DISKS[cell.disk], self._containerd.directory)
        with adapter.serving(self._containerd, self._registry):
            try:
                yield self._cold(cell)
                for number in range(self._options["warm_starts"]):
                    yield self._warm(cell, number)
                for number in range(self._options["dropped_starts"]):
                    yield self._dropped(cell, number)
            finally:
                adapter.remove(self._containerd, self._reference(cell))

    def clean(self) -> None:
        """Remove all containers, snapshots and images."""
        self._containerd.remove_everything()

    def _cold(self, cell: _Cell) -> Row:
        evidence = coldness.make_cold(self._containerd, self._registry)
        began = self._begin()
        pull_began_s = time.monotonic()
        clients_s = _clients_cpu_s()
        ADAPTERS[cell.snapshotter].pull(self._containerd, self._reference(cell))
        pull_s = time.monotonic() - pull_began_s
        clients_s = _clients_cpu_s() - clients_s
        pause_s = self._options["pause_s"]
        time.sleep(pause_s)
        times, _ = self._start(cell, began)
        times["cpu_s"] += clients_s
        row = {"start": "cold", "warm": -1, "pause_s": pause_s, "evidence": evidence}
        return {**row, **_timed(times, pull_s)}

    # Now and then a lazy start reads blocks that no earlier start read: threads run in another order, or another
    # program dropped the machine's page cache and the kernel reads ahead elsewhere. That start has made the image
    # warm, so the next start is measured instead.
    def _warm(self, cell: _Cell, number: int) -> Row:
        for again in range(_WARM_TRIES):
            try:
                row = self._warm_once(cell, number)
            except coldness.NotWarmError as error:
                if again == _WARM_TRIES - 1:
                    raise
                self._job.say(f"{error}: started again")
            else:
                return {**row, "again": again}
        raise AssertionError

    def _warm_once(self, cell: _Cell, number: int) -> Row:
        times, asked = self._start(cell, self._begin())
        adapter = ADAPTERS[cell.snapshotter]
        layers = adapter.layers(self._containerd)
        evidence = coldness.prove_warm(layers, Traffic.of(asked), asked, cached=not adapter.cached_above)
        return {"start": "warm", "warm": number, "evidence": evidence, **_timed(times, 0.0)}

    def _dropped(self, cell: _Cell, number: int) -> Row:
        evidence = coldness.make_dropped(self._containerd, ADAPTERS[cell.snapshotter].layers(self._containerd))
        times, asked = self._start(cell, self._begin())
        evidence["requests"] = Traffic.of(
            asked
        ).requests  # a caveat of the report: a lazy start may read other blocks
        return {"start": "dropped", "warm": number, "evidence": evidence, **_timed(times, 0.0)}

    def _reference(self, cell: _Cell) -> str:
        return self._images[cell.image].references[cell.snapshotter]

    def _begin(self) -> _Begin:
        cpu_s = self._containerd.groups.cpu_s()
        return _Begin(self._registry.mark(), self._network.counters(), datetime.now(UTC), os.getloadavg()[0], cpu_s)

    # Start a container, wait until it is ready, remove it. Return its row, and the requests made until it was ready.
    def _start(self, cell: _Cell, began: _Begin) -> tuple[Row, list[Request]]:
        image = self._images[cell.image]
        name = f"bench-{time.monotonic_ns()}"
        adapter = ADAPTERS[cell.snapshotter]
        with adapter.running(self._containerd, self._reference(cell), name, self._probe(image)) as container:
            costs = self._costs(container, began)
            link = self._network.counters().since(began.link)
            costs["disk_bytes"] = self._containerd.disk_bytes()
            phases = container.times.phases_s()
            if adapter.background:
                costs["background_ended"] = self._wait_for_background(adapter)
            requests = self._registry.requests(began.mark, self._registry.mark())
        # Requests until the container was ready; background fetching may have made more since.
        asked = [request for request in requests if request.began_s <= container.times.ready_s]
        traffic = Traffic.of(asked)
        row = {
            "started": began.time.isoformat(timespec="milliseconds"),
            "create_s": phases["create"],
            "start_s": phases["start"],
            "ready_s": phases["ready"],
            "bytes_received": traffic.written,
            "requests": traffic.requests,
            "registry_errors": traffic.errors,
            "link_bytes": link.received,
            "round_trip_waits": traffic.round_trip_waits,
            "network_s": traffic.busy_s,
            "load_1m": began.load_1m,
            "unpigz": self._containerd.unpigz,
            **_completion(requests, began.time.timestamp()),
            **costs,
        }
        return row, asked

    # Wait until the registry is still and the size of the stored layers no longer changes. Return False on timeout.
    def _wait_for_background(self, adapter: Adapter) -> bool:
        deadline = time.monotonic() + _MOST_BACKGROUND_S
        ended = self._registry.wait_for_silence(_STILL_S, _MOST_BACKGROUND_S)
        directory = adapter.layers(self._containerd)
        _, stored = resident_below([directory])
        while ended:
            time.sleep(_STILL_S)
            _, now = resident_below([directory])
            if now == stored:
                break
            stored, ended = now, time.monotonic() < deadline
        return ended

    def _probe(self, image: BenchImage) -> Probe:
        probe = replace(image.recipe.probe, timeout_s=self._options["ready_timeout_s"])
        command = WORKLOADS[self._options["workload"]]
        return replace(probe, ready_line=_WORKLOAD_LINE, command=command) if command else probe

    def _costs(self, container: RunningContainer, began: _Begin) -> Row:
        groups = self._containerd.groups
        cpu_s = groups.cpu_s() - began.cpu_s + process_cpu_s(container.client_pid)
        daemons, containers = groups.pss_bytes()
        return {"cpu_s": cpu_s, "pss_bytes": daemons, "container_pss_bytes": containers}

    # Store an image in every compared form, unless the registry has the form from an earlier run.
    def _publish(self, image: BuiltImage) -> BenchImage:
        recipe, options = image.recipe, self._options
        source = Source(image, options["algorithm"], options["block_size"], self._settings.device_readahead_kib)
        references = {}
        with closing(RegistryClient()) as client:
            for name in self._snapshotters:
                adapter = ADAPTERS[name]
                references[name] = self._registry.reference(recipe.name, adapter.tag(source))
                if not is_published(client, references[name]):
                    self._job.say(f"{recipe.name}: publishing for {name}")
                    with self._network.unshaped():
                        adapter.publish(self._containerd, source, client, references[name])
                if self._secure:
                    references[name] = self._registry.reference(recipe.name, adapter.tag(source), secure=True)
        return BenchImage(image, references)


# This process pulls for the arms that are plain files.
@contextmanager
def _trusting(certificate: Path) -> Iterator[None]:
    before = os.environ.get(_TRUST)
    os.environ[_TRUST] = str(certificate)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_TRUST, None)
        else:
            os.environ[_TRUST] = before


# "completion_s" is the time from the start's begin to the registry's last answer, 0 without requests.
def _completion(requests: list[Request], began_s: float) -> Row:
    last_s = max((request.ended_s for request in requests), default=began_s)
    return {"completion_s": max(0.0, last_s - began_s), "completion_bytes": Traffic.of(requests).written}


def process_cpu_s(pid: int) -> float:
    """Return the processor time of a process and its ended children, in seconds; 0 if the process is gone."""
    found = stat_of(pid)
    return 0.0 if found is None else found.cpu_s


# Pulls run in this process or in a child that it waits for.
def _clients_cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _timed(row: Row, pull_s: float) -> Row:
    total_s = pull_s + row["create_s"] + row["start_s"] + row["ready_s"]
    return {**row, "pull_s": pull_s, "total_s": total_s}
