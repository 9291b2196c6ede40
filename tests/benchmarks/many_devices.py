"""Many devices at once: attach to first byte, and memory of each server (PSS). As root.

python -m tests.benchmarks.many_devices [--devices 50]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.image.settings import Settings
from obdlab.service.client import DeviceService
from tests.layers.golden import GOLDEN

LAYER = GOLDEN / "ext4" / "layer1.obd"


def pss_mib(pid: int) -> float:
    """Proportional share of memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> None:
    """Attach, read, measure, detach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = directory / "config.v1.json"
        ImageConfig(lowers=(LowerConfig(file=str(LAYER)),)).save(config)
        service = DeviceService(directory / "run", replace(Settings(), cache_dir=directory / "cache"))
        first_byte_ms = []
        try:
            for number in range(args.devices):
                began = time.monotonic()
                device = service.attach(config, f"many-{number}")
                with device.path.open("rb", buffering=0) as node:
                    node.read(4096)
                first_byte_ms.append((time.monotonic() - began) * 1000)
            memory = [pss_mib(device.pid) for device in service.list()]
        finally:
            for device in service.list():
                service.detach(device.device_id)
            service.shutdown()
    first, *later = first_byte_ms
    print(f"{len(memory)} devices at once; attach to first byte: {first:.0f} ms with the host's start, then")
    print(f"median {statistics.median(later):.0f} ms, slowest {max(later):.0f} ms")
    print(f"PSS of a server: median {statistics.median(memory):.1f} MiB, largest {max(memory):.1f} MiB")


if __name__ == "__main__":
    main()
