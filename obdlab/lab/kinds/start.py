"""Container starts: images by arms, networks and disks. ``startbench`` measures them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from obdlab.formats.zfile import DEFAULT_ALGORITHM, DEFAULT_BLOCK_SIZE
from obdlab.lab.baselines import ADAPTERS
from obdlab.lab.images.recipe import image_label
from obdlab.lab.kinds.kind import Kind, Metric, SpecError
from obdlab.lab.kinds.startbench import WORKLOADS, StartBench, host_settings
from obdlab.lab.run.rows import AA_SUFFIX
from obdlab.lab.run.starts import StartReport
from obdlab.lab.testbed.cgroups import DISKS
from obdlab.settings.settings import SettingsError
from obdlab.system.keptfree import kept_free

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from obdlab.lab.kinds.kind import Bench, Job, Option, Point, Report, Row, Value

# Publishing one form of an image: conversion, compression, upload; for some forms a recorded start.
_PUBLISH_S, _PUBLISH_S_PER_MB = 3.0, 0.15
# One cell (which makes the host cold and removes its image), one warm and one dropped start.
_CELL_S, _WARM_S, _DROPPED_S = 4.0, 1.0, 2.0
_UNPACK_MB_S = 20.0


class Start(Kind):
    """A cell is a cold start, with the warm and dropped starts after it: a row for each."""

    name: ClassVar[str] = "start"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "image": ("redis",),
        #: Names of adapters (``obdlab.lab.baselines``).
        "arm": ("overlayfs", "obdlab"),
        "rate_mbit": (100.0,),
        "rtt_ms": (5.0,),
        #: Names of disks (``obdlab.lab.testbed.cgroups.DISKS``).
        "disk": ("native",),
    }
    options: ClassVar[Mapping[str, Option]] = {
        #: Warm starts measured after each cold one.
        "warm_starts": 2,
        #: Starts of a pulled image with the page cache dropped, after the warm ones.
        "dropped_starts": 0,
        #: A pause between pull and container creation, not counted in any phase, for work that a pull leaves running.
        "pause_s": 0.0,
        #: The registry speaks TLS to all arms; one arm that needs it (soci) does the same.
        "tls": False,
        #: containerd unpacks layers by unpigz, as it does where pigz is installed.
        "unpigz": False,
        "workload": "start",
        "ready_timeout_s": 120.0,
        #: ZFile options of the converted images; the defaults are those of ``obdlab image convert``.
        "algorithm": DEFAULT_ALGORITHM,
        "block_size": DEFAULT_BLOCK_SIZE,
        #: Settings of obdlab (docs/reference/configuration.md) that differ from the defaults.
        "settings": {},
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("total_s", "s"),
        Metric("pull_s", "s"),
        Metric("create_s", "s"),
        Metric("start_s", "s"),
        Metric("ready_s", "s"),
        Metric("bytes_received", "bytes"),
        Metric("requests", ""),
        Metric("cpu_s", "s"),
        Metric("pss_bytes", "bytes"),
        Metric("disk_bytes", "bytes"),
    )
    programs: ClassVar[Mapping[str, str]] = {}
    arm_axis: ClassVar[str] = "arm"
    bench_axes: ClassVar[tuple[str, ...]] = ("rate_mbit", "rtt_ms")
    short_keys: ClassVar[Mapping[str, str]] = {
        "images": "axes.image",
        "snapshotters": "axes.arm",
        "rates_mbit": "axes.rate_mbit",
        "rtts_ms": "axes.rtt_ms",
        "disks": "axes.disk",
        **{key: f"options.{key}" for key in options},
    }
    a_a: ClassVar[bool] = True
    cell_timeout_s: ClassVar[float] = 900.0
    added: ClassVar[Mapping[str, Value]] = {"pause_s": 0.0, "tls": False, "unpigz": False}
    #: The bench, and the programs that it starts: their modules are on the path of every start.
    measured: ClassVar[tuple[str, ...]] = ("obdlab.lab.kinds.startbench",)
    notebook: ClassVar[str] = "cold_warm_startup.ipynb"
    report: ClassVar[Report | None] = StartReport()

    def checked(
        self, axes: Mapping[str, tuple[Value, ...]], options: Mapping[str, Option]
    ) -> tuple[Mapping[str, tuple[Value, ...]], Mapping[str, Option]]:
        """Return axes and options with whole rates, round trips and times as floats. Raises SpecError."""
        for key, names, known in (("snapshotters", axes["arm"], ADAPTERS), ("disks", axes["disk"], DISKS)):
            for name in names:
                if name not in known:
                    raise SpecError(f"{key}: unknown name (got {name!r}, wanted among {', '.join(known)})")
        if options["workload"] not in WORKLOADS:
            got, known_ones = options["workload"], ", ".join(WORKLOADS)
            raise SpecError(f"workload: unknown (got {got!r}, wanted one of {known_ones})")
        for key in ("warm_starts", "dropped_starts"):
            if options[key] < 0:
                raise SpecError(f"{key}: wanted at least 0 (got {options[key]})")
        if options["ready_timeout_s"] <= 0:
            raise SpecError(f"ready_timeout_s: wanted a positive number (got {options['ready_timeout_s']:g})")
        if not 0 <= options["pause_s"] <= 60:
            raise SpecError(f"pause_s: wanted 0 to 60 (got {options['pause_s']:g})")
        rates, distances = ([float(value) for value in axes[key]] for key in self.bench_axes)
        if min(rates) <= 0:
            raise SpecError(f"rates_mbit: wanted positive numbers (got {rates})")
        if min(distances) < 0:
            raise SpecError(f"rtts_ms: wanted no negative number (got {distances})")
        if "cache_dir" in options["settings"]:
            raise SpecError("settings: cache_dir is the experiment's own")
        try:
            host_settings(options)
        except SettingsError as error:
            raise SpecError(str(error)) from error
        times = {key: float(options[key]) for key in ("pause_s", "ready_timeout_s")}
        return {**axes, "rate_mbit": tuple(rates), "rtt_ms": tuple(distances)}, {**options, **times}

    def needed_programs(self, axes: Mapping[str, tuple[Value, ...]]) -> Mapping[str, str]:
        """Return the programs of all arms."""
        return {name: of for arm in axes["arm"] for name, of in ADAPTERS[str(arm)].programs.items()}

    def open(self, job: Job) -> AbstractContextManager[Bench]:
        """Return the bench of one network: registry with the images, containerd, snapshotters."""
        return StartBench(job)

    def columns(self, options: Mapping[str, Option], point: Point) -> Row:
        """Return the point's columns, the compression, and the image's name as a recipe has it."""
        shown = {"image": image_label(str(point["image"])), "recipe": point["image"]}
        settings = {"settings": options["settings"]} if options["settings"] else {}
        return {"kind": self.name, **self.identity(options, point), **shown, **settings}

    def identity(self, options: Mapping[str, Option], point: Point) -> dict[str, Any]:
        """Return the point with compression and workload."""
        return {**point, **{key: options[key] for key in ("algorithm", "block_size", "workload")}}

    def how_measured(self, options: Mapping[str, Option]) -> dict[str, Any]:
        """Return the numbers of starts, the pause, the time limit, and the settings that were changed."""
        keys = ("warm_starts", "dropped_starts", "ready_timeout_s", "pause_s", "tls", "unpigz")
        changed = {"settings": options["settings"]} if options["settings"] else {}
        return {key: options[key] for key in keys} | changed

    def failed(self, options: Mapping[str, Option], done: int) -> Row:
        """Return which of the cell's starts failed."""
        starts = ["cold", *["warm"] * options["warm_starts"], *["dropped"] * options["dropped_starts"]]
        return {"start": starts[min(done, len(starts) - 1)]}

    def where(self, shared: Point) -> str:
        """Return the network."""
        return f"{shared['rate_mbit']:g} Mbit/s, {shared['rtt_ms']:g} ms"

    def estimate(
        self,
        axes: Mapping[str, tuple[Value, ...]],
        options: Mapping[str, Option],
        points: Sequence[Point],
        sizes: Mapping[str, int],
        disk_size: int,
    ) -> tuple[float, int]:
        """Return an estimate from the images' sizes, the links' rates and the arms' shares of an image."""
        adapters = [ADAPTERS[str(name)] for name in axes["arm"]]
        published = sum(adapter.registry_share for adapter in adapters)
        on_host = max(sizes.values(), default=0) * max(adapter.host_share for adapter in adapters)
        seconds = len(adapters) * sum(_PUBLISH_S + _PUBLISH_S_PER_MB * size / 1e6 for size in sizes.values())
        for point in points:
            adapter = ADAPTERS[str(point["arm"]).removesuffix(AA_SUFFIX)]
            fetched_mb = sizes[str(point["image"])] / 1e6 * adapter.start_share
            seconds += _CELL_S + options["pause_s"]
            seconds += _WARM_S * options["warm_starts"] + _DROPPED_S * options["dropped_starts"]
            seconds += fetched_mb * 8 / float(point["rate_mbit"]) + fetched_mb / _UNPACK_MB_S
        # The block cache leaves this much free, and stores nothing on a disk with less.
        spare = kept_free(disk_size, host_settings(options).cache_min_free)
        return seconds, int(sum(sizes.values()) * published + on_host) + spare
