"""Random reads of a block device by fio: a plain loop device beside obdlab's, raw, compressed and unpacked, by depth.

(The paper's figure 22.) fio reads with O_DIRECT, past the page cache of the device. The file below the device (raw
file or layer) is dropped from the page cache before each point, and fills it again during the measurement.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, ClassVar

from obdlab.devices import loop
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.lab.images.ocilayout import OciLayout
from obdlab.lab.kinds.codec import layer_content
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.lab.testbed.process import LabError, run
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.server.client import DeviceService
from obdlab.server.unpacking import graduate
from obdlab.settings.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from obdlab.lab.kinds.kind import Place, Point, Value

#: The compression of each arm's layer; "loop" has no layer.
_PACKINGS = {
    "obdlab-raw": Packing(""),
    "obdlab-lz4": Packing("lz4", 4096),
    "obdlab-zstd": Packing("zstd", 16384),
}
#: The compressed layer once its device has graduated: a loop device on the unpacked disk.
_LOCAL = "obdlab-local"


class Fio(Kind):
    """The content is that of an image's layers, so that it can be compressed."""

    name: ClassVar[str] = "fio"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {
        "device": ("loop", *_PACKINGS, _LOCAL),
        "iodepth": (1, 4, 16, 64, 128),
        "rw": ("randread",),
        "bs": (8192,),
    }
    options: ClassVar[Mapping[str, Value]] = {"image": "pydata", "size_mib": 128, "seconds": 2.0}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("iops", "1/s", higher=True),
        Metric("mb_s", "MB/s", higher=True),
        Metric("p50_us", "µs"),
        Metric("p99_us", "µs"),
    )
    programs: ClassVar[Mapping[str, str]] = {"fio": "fio"}

    def point_s(self, options: Mapping[str, Value]) -> float:
        """Return the time of one fio run, its start included."""
        return float(options["seconds"]) + 0.5

    def disk_bytes(self, options: Mapping[str, Value]) -> int:
        """Return the size of the data, plain and compressed."""
        return 4 * int(options["size_mib"]) << 20

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Make the devices."""
        layout = place.images[str(options["image"])]
        raw = place.work / "disk.raw"
        raw.write_bytes(layer_content(OciLayout(layout), int(options["size_mib"]) << 20))
        service = DeviceService(place.work / "run", Settings(cache_dir=place.work / "cache"))
        with ExitStack() as stack:
            stack.callback(service.shutdown, force=True)
            devices = {"loop": (_loop(raw, stack), raw)}
            for name, packing in _PACKINGS.items():
                layer = place.work / f"{name}.obd"
                import_disk(raw, layer, packing, kind="raw")
                config = place.work / f"{name}.json"
                ImageConfig(lowers=(LowerConfig(file=str(layer)),)).save(config)
                devices[name] = (service.attach(config, name, served=True).path, layer)
            local = service.attach(config, _LOCAL)
            devices[_LOCAL] = (local.path, graduate(service.run_dir, _LOCAL).path)
            yield lambda point: _measure(devices, point, float(options["seconds"]))


def _loop(raw: Path, stack: ExitStack) -> Path:
    label = f"obdlab-lab-{os.getpid()}"
    with raw.open("rb") as file:
        device = loop.attach(file.fileno(), label=label, read_only=True, direct_io=False)
    stack.callback(loop.detach, device, label=label)
    return device


def _measure(devices: Mapping[str, tuple[Path, Path]], point: Point, seconds: float) -> dict[str, float]:
    try:
        device, below = devices[str(point["device"])]
    except KeyError:
        raise LabError(f"fio: no device {point['device']!r} (wanted one of {', '.join(devices)})") from None
    drop_file(below)
    command = ["fio", "--name=job", f"--filename={device}", "--readonly", "--direct=1", "--ioengine=libaio"]
    command += ["--time_based", f"--runtime={seconds}", "--output-format=json", "--randseed=7", "--norandommap"]
    command += [f"--{key}={point[key]}" for key in ("rw", "bs", "iodepth")]
    output = run(command, timeout_s=seconds + 60)
    read = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    percentiles = read["clat_ns"]["percentile"]
    return {
        "iops": read["iops"],
        "mb_s": read["bw_bytes"] / 1e6,
        "p50_us": percentiles["50.000000"] / 1e3,
        "p99_us": percentiles["99.000000"] / 1e3,
    }


def drop_file(path: Path) -> None:
    """Write a file back and drop its pages from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
