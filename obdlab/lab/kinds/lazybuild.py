"""Building an image in a registry on a base in a registry: pull, build, push, and the bytes read from the base.

(The table of BuildKit's documentation on overlaybd: a base of 5 GB and 4 GB × 1, 1 GB × 4 or 256 MB × 10 of new
layers, here a tenth of that.) Each builder begins with nothing, and pushes to a repository that is new. The base is a
static busybox and files; half of every file is noise, half zeros, in the base as in the new layers. Only what the
registry sends is limited, so pushes are as fast as builders.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.formats import oci
from obdlab.lab.images.basesystem import make_busybox
from obdlab.lab.images.layertar import write_layer
from obdlab.lab.images.ocilayout import OciLayout, push_layout
from obdlab.lab.kinds.kind import Bench, Kind, Metric, SpecError
from obdlab.lab.testbed import dockerengine
from obdlab.lab.testbed.dockerengine import DockerEngine
from obdlab.lab.testbed.netns import ExperimentNetwork
from obdlab.lab.testbed.process import LabError, run
from obdlab.lab.testbed.registry import RegistryHost
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.registry.reference import Reference
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from obdlab.lab.kinds.kind import Job, Option, Point, Row, Value

DOCKER, OBDLAB = "docker", "obdlab"
_SEED = 7
_FILES_PER_DIRECTORY = 100
_MB = 1_000_000
_STEP_TIMEOUT_S = 900.0
_PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"


class LazyBuild(Kind):
    """Docker pulls the whole base first; obdlab reads blocks of it, and both build and push the same steps."""

    name: ClassVar[str] = "lazy_build"
    #: New layers: how many, and the megabytes of each.
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "new": ("1x400", "4x100", "10x25"),
        "builder": (DOCKER, OBDLAB),
    }
    #: ``scale`` is of all sizes; ``rate_mbit`` and ``rtt_ms`` of the link to the registry.
    options: ClassVar[Mapping[str, Option]] = {
        "base_mb": 500,
        "base_layers": 5,
        "file_kib": 256,
        "scale": 1.0,
        "rate_mbit": 1000.0,
        "rtt_ms": 0.0,
    }
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("total_s", "s"),
        Metric("pull_s", "s"),
        Metric("build_s", "s"),
        Metric("push_s", "s"),
        Metric("base_share", "of the base, read"),
        Metric("pushed_mb", "MB"),
    )
    arm_axis: ClassVar[str] = "builder"
    cell_timeout_s: ClassVar[float] = 1800.0
    programs: ClassVar[Mapping[str, str]] = {"docker-registry": "docker-registry", "runc": "runc"}
    #: ``obdlab image build`` runs in a process of its own.
    measured: ClassVar[tuple[str, ...]] = ("obdlab.lab.kinds.lazybuild", "obdlab.build.imagebuild")

    def checked(
        self, axes: Mapping[str, tuple[Value, ...]], options: Mapping[str, Option]
    ) -> tuple[Mapping[str, tuple[Value, ...]], Mapping[str, Option]]:
        """Return axes and options with floats. Raises SpecError."""
        for value in axes["builder"]:
            if value not in (DOCKER, OBDLAB):
                raise SpecError(f"axes.builder: unknown (got {value!r}, wanted {DOCKER} or {OBDLAB})")
        for value in axes["new"]:
            new_layers(str(value))
        for key in ("base_mb", "base_layers", "file_kib", "scale", "rate_mbit"):
            if options[key] <= 0:
                raise SpecError(f"options.{key}: wanted a positive number (got {options[key]:g})")
        floats = {key: float(options[key]) for key in ("scale", "rate_mbit", "rtt_ms")}
        return axes, {**options, **floats}

    def needed_programs(self, axes: Mapping[str, tuple[Value, ...]]) -> Mapping[str, str]:
        """Return the programs of the builders: without "docker" among them no Docker is needed."""
        return {**self.programs, **(dockerengine.PROGRAMS if DOCKER in axes["builder"] else {})}

    def point_s(self, options: Mapping[str, Option]) -> float:
        """Return an estimate from the size of base and new layers."""
        return 10.0 + 2 * float(options["base_mb"]) * float(options["scale"]) / 20

    def disk_bytes(self, options: Mapping[str, Option]) -> int:
        """Return the size of the base in a layout, twice in the registry and in Docker, with the new layers."""
        return int(10 * float(options["base_mb"]) * float(options["scale"]) * _MB)

    @contextmanager
    def open(self, job: Job) -> Iterator[Bench]:
        """Put the base into a registry behind a link, in both forms."""
        with ExitStack() as stack:
            yield _Bench(job, stack)


def new_layers(text: str) -> tuple[int, int]:
    """Return count and megabytes of "COUNTxMB". Raises SpecError."""
    count, _, size = text.partition("x")
    if not (count.isdecimal() and size.isdecimal() and 0 < int(count) <= 100 and int(size) > 0):
        raise SpecError(f"axes.new: wanted COUNTxMEGABYTES, at most 100 layers (got {text!r})")
    return int(count), int(size)


class _Bench(Bench):
    def __init__(self, job: Job, stack: ExitStack) -> None:
        self._work = job.work
        self._scale = float(job.options["scale"])
        self._numbers = 0
        self._about: dict[str, Any] = {}
        network = ExperimentNetwork(job.options["rate_mbit"], job.options["rtt_ms"])
        self._network = stack.enter_context(network)
        self._registry = stack.enter_context(RegistryHost(job.work / "registry", network))
        self._client = stack.enter_context(closing(RegistryClient()))
        job.say("making the base")
        layout = _made_base(job.work, job.options)
        self._references = {builder: self._registry.reference("base", builder) for builder in (DOCKER, OBDLAB)}
        with network.unshaped():
            push_layout(layout, self._client, Reference.parse(self._references[DOCKER]))
            with (
                closing(open_source(self._references[DOCKER], self._client)) as source,
                closing(open_destination(self._references[OBDLAB], self._client)) as destination,
            ):
                convert_image(source, destination, options=ConvertOptions(work_dir=job.work))
        shutil.rmtree(layout)
        self._bases = {name: self._manifest(reference) for name, reference in self._references.items()}

    def environment(self) -> dict[str, Any]:
        return {"network": self._network.facts(), **self._about}

    def measure(self, point: Point) -> Generator[Row]:
        builder = str(point["builder"])
        count, size_mb = new_layers(str(point["new"]))
        self._numbers += 1
        place = self._work / f"build-{self._numbers}"
        place.mkdir()
        new = self._registry.reference(f"built-{self._numbers}", builder)
        try:
            context = self._context(place, self._references[builder], count, size_mb)
            self._registry.preload()
            os.sync()  # or this build would wait for the last one's writes
            begin = self._registry.mark()
            row = (self._docker if builder == DOCKER else self._obdlab)(place, context, new)
            traffic = self._registry.traffic(begin, self._registry.mark())
        finally:
            shutil.rmtree(place, ignore_errors=True)
        base, made = self._bases[builder], self._manifest(new)
        if len(made.layers) != len(base.layers) + count:
            raise LabError(f"{builder}: made {len(made.layers)} layers (wanted {len(base.layers)} and {count} new)")
        digests = {layer.digest for layer in base.layers}
        read = sum(blob.written for digest, blob in traffic.blobs.items() if digest in digests)
        pushed = sum(layer.size for layer in made.layers if layer.digest not in digests)
        yield {**row, "base_share": read / sum(layer.size for layer in base.layers), "pushed_mb": pushed / 1e6}

    def _docker(self, place: Path, context: Path, new: str) -> Row:
        with DockerEngine(place / "docker") as engine:
            buildkit = engine.has_buildkit()
            self._about["docker"] = {
                "version": engine.docker("version", "--format", "{{.Server.Version}}").strip(),
                "builder": "BuildKit" if buildkit else "classic",
            }
            words = ("buildx", "build", "--provenance", "false") if buildkit else ("build",)
            times = [time.perf_counter()]
            for command in (
                ("pull", "--quiet", self._references[DOCKER]),
                (*words, "--network", "none", "--tag", new, context),
                ("push", "--quiet", new),
            ):
                engine.docker(*command, timeout_s=_STEP_TIMEOUT_S)
                times.append(time.perf_counter())
        pull_s, build_s, push_s = (after - before for before, after in pairwise(times))
        return {"total_s": times[-1] - times[0], "pull_s": pull_s, "build_s": build_s, "push_s": push_s}

    def _obdlab(self, place: Path, context: Path, new: str) -> Row:
        settings, cache = place / "settings.json", place / "cache"
        settings.write_text("{}")
        command: list[str | Path] = [sys.executable, "-m", "obdlab", "image", "build", context, "--tag", new]
        command += ["--json", "--run-dir", place / "run", "--cache-dir", cache, "--settings", settings]
        command += ["--build-cache", place / "layers", "--work-dir", place]
        devices = DeviceService(place / "run", Settings(cache_dir=cache))
        try:
            devices.start_host()  # a daemon, as dockerd is: its start is not measured
            began_s = time.perf_counter()
            printed = run(command, timeout_s=_STEP_TIMEOUT_S)
            total_s = time.perf_counter() - began_s
        finally:
            devices.shutdown(force=True)
        seconds: dict[str, float] = json.loads(printed[printed.index("{\n") :])["seconds"]
        # Commits run beside later steps: only what is waited for after the last step counts as push.
        pull_s = seconds["bases"]
        push_s = seconds["commit_and_store_after_steps"] + seconds["publish"]
        parts = {"pull_s": pull_s, "build_s": total_s - pull_s - push_s, "push_s": push_s}
        return {"total_s": total_s, **parts, "seal_s": seconds["seal"], "commit_s": seconds["commit"]}

    # Each step writes one file of the size of its layer.
    def _context(self, place: Path, base: str, count: int, size_mb: int) -> Path:
        half = max(1, int(size_mb * self._scale * _MB / 2))
        make = f"head -c {half} /dev/urandom; head -c {half} /dev/zero"
        steps = [f"RUN mkdir -p /new && ({make}) >/new/{number}\n" for number in range(count)]
        context = place / "context"
        context.mkdir()
        (context / "Dockerfile").write_text(f"FROM {base}\n{''.join(steps)}")
        return context

    def _manifest(self, reference: str) -> oci.Manifest:
        return oci.Manifest.parse(self._client.get_manifest(Reference.parse(reference)).data, reference)


def _made_base(work: Path, options: Mapping[str, Option]) -> Path:
    layout = OciLayout.create(work / "base")
    rng = random.Random(_SEED)
    count = int(options["base_layers"])
    each = int(options["base_mb"] * options["scale"] * _MB / count)
    layers, diff_ids = [], []
    for number in range(count + 1):
        tree = work / "tree"
        tree.mkdir()
        if number:
            _fill(tree / f"files-{number}", each, int(options["file_kib"]) << 10, rng)
        else:
            make_busybox(tree, work / "busybox")
        made = write_layer(tree, work / "layer", 0.0)
        (work / "layer").rename(layout.blob_path(made.digest))
        layers.append(oci.Descriptor(oci.OCI_LAYER_GZIP, made.digest, made.size))
        diff_ids.append(made.diff_id)
        shutil.rmtree(tree)
    platform = host_platform()
    document = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {"Env": [_PATH], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created_by": "files"} for _ in diff_ids],
    }
    config = layout.add_document(oci.OCI_CONFIG, json.dumps(document).encode())
    layout.finish(config, layers, "base", platform)
    return layout.root


def _fill(root: Path, total: int, mean: int, rng: random.Random) -> None:
    number = 0
    while total > 0:
        directory = root / str(number // _FILES_PER_DIRECTORY)
        directory.mkdir(parents=True, exist_ok=True)
        size = min(total, rng.randrange(1, 2 * mean))
        (directory / str(number)).write_bytes(rng.randbytes(size // 2) + bytes(size - size // 2))
        total, number = total - size, number + 1
