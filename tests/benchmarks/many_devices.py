"""Many devices at once: attach to first byte, memory of each (PSS), and what they cost while idle. As root.

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
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from tests.layers.golden import GOLDEN

LAYER = GOLDEN / "ext4" / "layer1.obd"


def pss_mib(pid: int) -> float:
    """Proportional share of memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def processor_s(pid: int) -> float:
    """What a process has run for, as the scheduler counts it."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def main() -> None:
    """Attach, read, measure, detach."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=50)
    parser.add_argument("--idle", type=float, default=40.0, help="seconds (default: %(default)g)")
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
            memory = [pss_mib(device.pid) + pss_mib(device.keeper_pid) for device in service.list()]
            pids = [pid for device in service.list() for pid in (device.pid, device.keeper_pid)]
            before = sum(map(processor_s, pids))
            time.sleep(args.idle)
            idle_s = sum(map(processor_s, pids)) - before
        finally:
            for device in service.list():
                service.detach(device.device_id)
            service.shutdown()
    first, *later = first_byte_ms
    print(f"{len(memory)} devices at once; attach to first byte: {first:.0f} ms with the host's start, then")
    print(f"median {statistics.median(later):.0f} ms, slowest {max(later):.0f} ms")
    print(
        f"PSS of a device (server and keeper): median {statistics.median(memory):.1f}, largest {max(memory):.1f} MiB"
    )
    print(f"processor time of all of them in {args.idle:.0f} s without I/O: {idle_s * 1000:.1f} ms")


if __name__ == "__main__":
    main()
