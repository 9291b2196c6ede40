"""Suggested traces against recorded ones, of images that the profile has not seen (leave one image out).

Each image is converted and started in a container, its reads are recorded, and another trace of it is compared with
the recording. Nothing is timed: the gain is that of a model of fetched extents (``obdlab.traces.fit``), for a link of
``rate_mbit`` and ``rtt_ms``.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import convert_image
from obdlab.formats.trace import Trace
from obdlab.lab.kinds.kind import Bench, Job, Kind, Metric, SpecError
from obdlab.lab.testbed.process import LabError, run
from obdlab.layerfiles.disks import open_disk
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.settings.settings import Settings
from obdlab.traces.fit import Link, data_of, fit
from obdlab.traces.likely import suggest
from obdlab.traces.profile import own_profile

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from obdlab.lab.images.builder import BuiltImage
    from obdlab.lab.kinds.kind import Option, Point, Row, Value
    from obdlab.layers.stack import Stack

#: The model that the gain in rows of this kind is computed by. Nothing is timed.
MODEL = "fetched extents"
_LEARNED, _RULES, _AGAIN = "learned", "rules", "again"
_TRACES = (_LEARNED, _RULES, _AGAIN)
_RECORD_S, _CONVERT_S = 60.0, 30.0


class Suggestion(Kind):
    """``learned``: rules and the package's profile without this image; ``rules``: no profile; ``again``: a second
    recording, which shows how much two starts differ."""

    name: ClassVar[str] = "suggestion"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "image": ("redis",),
        "trace": _TRACES,
        "rate_mbit": (100, 1000),
    }
    options: ClassVar[Mapping[str, Value]] = {"rtt_ms": 20.0, "recordings": ""}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("kept", "of the recording's gain, by a model", higher=True),
        Metric("over_read", "bytes for each byte recorded"),
        Metric("covered", "of the bytes recorded", higher=True),
        Metric("requests", "by a model"),
        Metric("recorded_mb", "MB"),
        Metric("files", ""),
    )
    programs: ClassVar[Mapping[str, str]] = {"runc": "runc"}
    arm_axis: ClassVar[str] = "trace"
    bench_axes: ClassVar[tuple[str, ...]] = ("image",)

    def checked(
        self, axes: Mapping[str, tuple[Value, ...]], options: Mapping[str, Option]
    ) -> tuple[Mapping[str, tuple[Value, ...]], Mapping[str, Option]]:
        """Return both. Raises SpecError for unknown traces and links that cannot be."""
        for each in axes["trace"]:
            if each not in _TRACES:
                raise SpecError(f"axes.trace: unknown (got {each!r}, wanted one of {', '.join(_TRACES)})")
        if min(float(each) for each in axes["rate_mbit"]) <= 0 or float(options["rtt_ms"]) < 0:
            raise SpecError("axes.rate_mbit: wanted positive numbers, and options.rtt_ms not negative")
        return axes, options

    def columns(self, options: Mapping[str, Option], point: Point) -> Row:
        """Return the point, and the name of the model that the gain comes from."""
        return {**super().columns(options, point), "rtt_ms": float(options["rtt_ms"]), "model": MODEL}

    def where(self, shared: Point) -> str:
        """Return the image's name."""
        return str(shared["image"])

    def estimate(
        self,
        axes: Mapping[str, tuple[Value, ...]],
        options: Mapping[str, Option],
        points: Sequence[Point],
        sizes: Mapping[str, int],
        disk_size: int,
    ) -> tuple[float, int]:
        """Return the time of two recorded starts of each image, and room for the largest one, converted."""
        images = len({point["image"] for point in points})
        return images * (2 * _RECORD_S + _CONVERT_S), 3 * max(sizes.values(), default=0)

    @contextmanager
    def _open(self, job: Job) -> Iterator[Bench]:
        built = job.built[str(job.shared["image"])]
        paths, document = _converted(built, job.work / "converted")
        with ExitStack() as stack:
            kept = Path(str(job.options["recordings"])) if job.options["recordings"] else job.work
            starts = _Starts(built, job.work, kept)
            disk = stack.enter_context(open_disk(paths, Settings))
            ratio = sum(Path(path).stat().st_size for path in paths) / sum(layer.data.size for layer in disk.layers)
            yield _Fitting(disk, document, starts, ratio, float(job.options["rtt_ms"]))


@dataclass(frozen=True, slots=True)
class _Starts:
    # Recorded starts of one image, from before if they are kept.
    built: BuiltImage
    work: Path
    kept: Path

    def trace(self, number: int) -> bytes:
        path = self.kept / f"{self.built.recipe.name}-{self.built.digest[7:19]}-{number}.trace"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._record(path)
        return path.read_bytes()

    def _record(self, path: Path) -> None:
        probe, unfinished = self.built.recipe.probe, self.work / "trace"
        places: list[str | Path] = ["--run-dir", self.work / "run", "--cache-dir", self.work / "cache"]
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "obdlab",
            "trace",
            "record",
            f"oci:{self.work}/converted:new",
            "-q",
        ]
        ready = ["--until-line", probe.ready_line, "--seconds", f"{probe.timeout_s:g}"]
        try:
            run([*command, "-o", unfinished, *ready, *places], timeout_s=probe.timeout_s + _RECORD_S)
            unfinished.rename(path)
        finally:
            run([sys.executable, "-m", "obdlab", "cleanup", "--run-dir", self.work / "run"], timeout_s=_RECORD_S)


class _Fitting(Bench):
    def __init__(
        self, disk: Stack, document: Mapping[str, Any], starts: _Starts, ratio: float, rtt_ms: float
    ) -> None:
        self._disk, self._document, self._starts = disk, document, starts
        self._ratio, self._rtt_ms = ratio, rtt_ms
        self._recorded = data_of(Trace.from_bytes(starts.trace(1)), disk)
        self._compared: dict[str, tuple[Trace, int]] = {}
        if not self._recorded.size:
            raise LabError(f"{starts.built.recipe.name}: the recorded start reads nothing of the image's data")

    def environment(self) -> dict[str, Any]:
        """Return the digest of the package's profile, and the names of its examples."""
        data = (files("obdlab.traces") / "data" / "starts.profile").read_bytes()
        return {"profile_sha256": hashlib.sha256(data).hexdigest(), "profile_examples": list(own_profile().examples)}

    def measure(self, point: Point) -> Generator[Row]:
        """Compare one trace with the recorded one."""
        kind = str(point["trace"])
        if kind not in self._compared:
            self._compared[kind] = self._trace(kind)
        trace, count = self._compared[kind]
        found = fit(self._recorded, trace)
        yield {
            "kept": found.kept(Link(float(point["rate_mbit"]), self._rtt_ms, self._ratio)),
            "over_read": found.over_read,
            "covered": found.covered / found.recorded,
            "requests": found.requests_with,
            "requests_without": found.requests_without,
            "recorded_mb": found.recorded / 1e6,
            "suggested_mb": found.suggested / 1e6,
            "stored_ratio": self._ratio,
            "files": count,
        }

    def _trace(self, kind: str) -> tuple[Trace, int]:
        if kind == _AGAIN:
            return data_of(Trace.from_bytes(self._starts.trace(2)), self._disk), 0
        profile = own_profile().without(self._starts.built.recipe.name) if kind == _LEARNED else None
        found = suggest(self._disk, self._document, profile)
        return found.trace, len(found.files)


# Returns the paths of an image's converted layers and its image config.
def _converted(built: BuiltImage, place: Path) -> tuple[list[str], Mapping[str, Any]]:
    with closing(RegistryClient()) as client:
        convert_image(open_source(f"oci:{built.layout}", client), open_destination(f"oci:{place}:new", client))
        source = open_source(f"oci:{place}:new", client)
        manifest = source.manifest(host_platform(), overlaybd=True)
        document = source.config(manifest).document
    return [str(ImageLayout(place).blob_path(layer.digest)) for layer in manifest.layers], document
