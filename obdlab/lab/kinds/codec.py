"""ZFile on real layers: how fast it is written and read, and how small it gets, by algorithm and block size."""

from __future__ import annotations

import gzip
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.lab.testbed.process import LabError
from obdlab.layers.zfile import ZFileWriter, open_zfile
from obdlab.localfile import LocalFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from obdlab.lab.kinds.kind import Place, Point, Value

_STEP = 1 << 20
_RANDOM_READS = 500
_RANDOM_SIZE = 4096
_SEED = 7


class Codec(Kind):
    """The content is the uncompressed tar of an image's largest layers, in memory."""

    name: ClassVar[str] = "codec"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "algorithm": ("lz4", "zstd"),
        "block_size": (4096, 16384, 65536),
        "workers": (1,),
    }
    options: ClassVar[Mapping[str, Value]] = {"image": "pydata", "size_mib": 64}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("read_mb_s", "MB/s", higher=True),
        Metric("write_mb_s", "MB/s", higher=True),
        Metric("random_4k_us", "µs"),
        Metric("ratio", "of the content"),
        Metric("read_cpu_s_per_gb", "s/GB"),
    )
    programs: ClassVar[Mapping[str, str]] = {}

    def disk_bytes(self, options: Mapping[str, Value]) -> int:
        """Return the size of the data, plain and compressed."""
        return 2 * int(options["size_mib"]) << 20

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Unpack ``size_mib`` of content."""
        layout = place.images[str(options["image"])]
        content = layer_content(OciLayout(layout), int(options["size_mib"]) << 20)
        yield lambda point: _measure(content, place.work / "zfile", point)


def layer_content(layout: OciLayout, size: int) -> bytes:
    """Return the first ``size`` bytes of an image's uncompressed layers, the largest first. Raises LabError."""
    content = bytearray()
    for layer in sorted(layout.manifest.layers, key=lambda layer: -layer.size):
        with gzip.open(layout.blob_path(layer.digest)) as stream:
            content += stream.read(size - len(content))
        if len(content) >= size:
            return bytes(content)
    raise LabError(f"{layout.root}: holds {len(content)} bytes of layers (wanted {size} to compress)")


def _measure(content: bytes, path: Path, point: Point) -> dict[str, float]:
    began_s = time.perf_counter()
    with path.open("wb") as file:
        writer = ZFileWriter(file, int(point["block_size"]), str(point["algorithm"]), workers=int(point["workers"]))
        with writer:
            for offset in range(0, len(content), _STEP):
                writer.write(content[offset : offset + _STEP])
    write_s = time.perf_counter() - began_s
    stored = path.stat().st_size
    with open_zfile(LocalFile(path)) as reader:
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for offset in range(0, len(content), _STEP):
            part = reader.read_at(offset, min(_STEP, len(content) - offset))
            if part != content[offset : offset + _STEP]:
                raise LabError(f"{path}: read back wrongly at {offset}")
        read_s, read_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        places = random.Random(_SEED).choices(range(len(content) // _RANDOM_SIZE), k=_RANDOM_READS)
        began_s = time.perf_counter()
        for number in places:
            reader.read_at(number * _RANDOM_SIZE, _RANDOM_SIZE)
        random_s = time.perf_counter() - began_s
    path.unlink()
    return {
        "read_mb_s": len(content) / read_s / 1e6,
        "write_mb_s": len(content) / write_s / 1e6,
        "random_4k_us": random_s / _RANDOM_READS * 1e6,
        "ratio": stored / len(content),
        "read_cpu_s_per_gb": read_cpu_s / len(content) * 1e9,
    }
