"""A deep stack of real layers: the size of its merged index. (The paper's figure 6.)

The layers are tars of made-up files, converted as any image's are, so that allocation, directories and bitmaps of a
real file system decide where segments begin and end. Each layer adds files, replaces some of the layers below,
deletes one and appends to a log. Nothing is timed: the counts are exact and the same on every machine.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import ConvertOptions, convert_image
from obdlab.convert.layer import LayerOptions
from obdlab.formats import oci
from obdlab.formats.lsmt.layout import RECORD_SIZE
from obdlab.lab.images.layertar import WHITEOUT_PREFIX
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.kinds.conversion import merged_segments
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from obdlab.lab.kinds.kind import Place, Point, Value

_SEED = 205
_DIRECTORIES = 64
_LOG_BYTES = 2000


class Depth(Kind):
    """Stacks of ``layers`` layers, each with ``files`` new files of random sizes and ``changed`` replaced ones."""

    name: ClassVar[str] = "depth"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {"layers": (1, 10, 50, 205)}
    #: 205 layers of 39 files have as many files, of the same mean size, as the image of the paper's figure 25.
    options: ClassVar[Mapping[str, Value]] = {"files": 39, "changed": 4, "mean_kib": 67}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("segments", "in the merged index"),
        Metric("index_kib", "KiB"),
        Metric("image_mb", "MB"),
    )
    programs: ClassVar[Mapping[str, str]] = {}

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Prepare nothing: each point makes its own layers."""
        yield lambda point: _measure(int(point["layers"]), options, place.work)

    def point_s(self, options: Mapping[str, Value]) -> float:
        """Return an estimate of the time for one point, in seconds."""
        return 40.0

    def disk_bytes(self, options: Mapping[str, Value]) -> int:
        """Return an estimate of tars and converted layers."""
        deepest = max(int(value) for value in self.axes["layers"])
        return 3 * deepest * (int(options["files"]) + int(options["changed"])) * int(options["mean_kib"]) * 1024


def _measure(layers: int, options: Mapping[str, Value], work: Path) -> dict[str, float]:
    layout, target = work / "made", work / "converted"
    try:
        _write_image(layout, layers, options)
        with (
            closing(RegistryClient()) as client,
            closing(open_source(f"oci:{layout}", client)) as source,
            closing(open_destination(f"oci:{target}:new", client)) as destination,
        ):
            made = convert_image(
                source, destination, options=ConvertOptions(LayerOptions("lz4", 4096), work_dir=work)
            )
        segments = merged_segments(target, [layer.built.digest for layer in made.layers])
    finally:
        for directory in (layout, target):
            shutil.rmtree(directory, ignore_errors=True)
    return {
        "segments": float(segments),
        "index_kib": segments * RECORD_SIZE / 1024,
        "image_mb": made.size / 1e6,
    }


def _write_image(directory: Path, layers: int, options: Mapping[str, Value]) -> None:
    layout, rng = OciLayout.create(directory), random.Random(_SEED)
    found: list[str] = []
    descriptors = []
    for number in range(layers):
        tar = _layer(number, found, rng, options)
        descriptors.append(layout.add_document(oci.OCI_LAYER, tar))
    platform = host_platform()
    config = {
        "architecture": platform.architecture,
        "os": platform.os,
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [descriptor.digest for descriptor in descriptors]},
    }
    layout.finish(layout.add_document(oci.OCI_CONFIG, json.dumps(config).encode()), descriptors, "deep", platform)


# ``found`` has the files of the layers so far, and gets those of this one.
def _layer(number: int, found: list[str], rng: random.Random, options: Mapping[str, Value]) -> bytes:
    file = io.BytesIO()
    added = [f"d{rng.randrange(_DIRECTORIES)}/l{number}-{each}" for each in range(int(options["files"]))]
    changed = rng.sample(found, min(len(found), int(options["changed"])))
    gone = rng.choice([name for name in found if name not in changed]) if len(found) > len(changed) else ""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for directory in sorted({name.split("/")[0] for name in added}):
            info = tarfile.TarInfo(directory)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for name in (*added, *changed):
            _add(tar, name, int(rng.expovariate(1 / (int(options["mean_kib"]) * 1024))), rng)
        # A log or database that every layer appends to is copied whole into each.
        _add(tar, "log", _LOG_BYTES * (number + 1), rng)
        if gone:
            directory, _, last = gone.partition("/")
            _add(tar, f"{directory}/{WHITEOUT_PREFIX}{last}", 0, rng)
    found.extend(added)
    if gone:
        found.remove(gone)
    return file.getvalue()


def _add(tar: tarfile.TarFile, name: str, size: int, rng: random.Random) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    tar.addfile(info, io.BytesIO(rng.randbytes(size)))
