"""The memory of devices: proportional set size of their servers, by number of devices of one image."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from obdlab.convert.endpoints.layout import ImageLayout
from obdlab.convert.endpoints.names import open_destination, open_source
from obdlab.convert.image import convert_image
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.lab.kinds.kind import Kind, Metric
from obdlab.lab.testbed.process import LabError
from obdlab.registry.client import RegistryClient
from obdlab.registry.platform import host_platform
from obdlab.server.client import DeviceService
from obdlab.server.rundir import host_process
from obdlab.settings.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from obdlab.lab.kinds.kind import Place, Point, Value
    from obdlab.server.client import AttachedDevice

_READ = 1 << 20


class Memory(Kind):
    """Each device has been read from. The shared device host counts in ``all_mib``, not in ``device_mib``."""

    name: ClassVar[str] = "memory"
    axes: ClassVar[Mapping[str, tuple[Value, ...]]] = {"devices": (1, 10, 50)}
    options: ClassVar[Mapping[str, Value]] = {"image": "redis"}
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("device_mib", "MiB each"),
        Metric("all_mib", "MiB"),
        Metric("attach_ms", "ms each"),
    )
    programs: ClassVar[Mapping[str, str]] = {}

    @contextmanager
    def bench(self, options: Mapping[str, Value], place: Place) -> Iterator[Callable[[Point], dict[str, float]]]:
        """Convert the image into a layout; the devices read its layers."""
        layout = place.images[str(options["image"])]
        converted = place.work / "converted"
        with closing(RegistryClient()) as client:
            convert_image(open_source(f"oci:{layout}", client), open_destination(f"oci:{converted}:new", client))
            manifest = open_source(f"oci:{converted}:new", client).manifest(host_platform(), overlaybd=True)
        paths = [ImageLayout(converted).blob_path(layer.digest) for layer in manifest.layers]
        config = ImageConfig(lowers=tuple(LowerConfig(file=str(path)) for path in paths))
        config.save(place.work / "config.json")
        yield lambda point: _measure(place.work, int(point["devices"]))


def _measure(work: Path, count: int) -> dict[str, float]:
    service = DeviceService(work / "run", Settings(cache_dir=work / "cache"))
    with ExitStack() as stack:
        stack.callback(service.shutdown, force=True)
        service.start_host()
        began_s = time.perf_counter()
        devices = [service.attach(work / "config.json", f"memory-{number}", served=True) for number in range(count)]
        attach_s = time.perf_counter() - began_s
        for device in devices:
            with device.path.open("rb") as disk:
                disk.read(_READ)
        each = [sum(map(_pss, _processes(device))) for device in devices]
        process = host_process(work / "run")
        host = _pss(process.pid) if process is not None else 0
    return {
        "device_mib": sum(each) / count / 2**20,
        "all_mib": (sum(each) + host) / 2**20,
        "attach_ms": attach_s / count * 1e3,
    }


def _processes(device: AttachedDevice) -> tuple[int, ...]:
    return (device.pid, device.keeper_pid)


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError as error:
        raise LabError(f"memory: process {pid} cannot be looked at: {error.strerror}") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
