"""How long a scrape of many devices takes, and what counting costs (``python -m tests.benchmarks.exporter``)."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import timeit
from pathlib import Path

from prometheus_client import generate_latest

from obdlab.devices.crew import Member
from obdlab.image.config import ImageConfig, LowerConfig
from obdlab.metrics.exporter import Collected, ObdlabCollector, registry_of
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings

LAYER = Path(__file__).parents[1] / "golden" / "ext4" / "layer1.obd"
SCRAPES = 10
READS = 200_000


def scrape_s(devices: int) -> None:
    with tempfile.TemporaryDirectory(prefix="obdlab-bench-") as name:
        root = Path(name)
        service = DeviceService(root / "run", Settings(cache_dir=root / "cache"))
        config = root / "config.v1.json"
        ImageConfig(lowers=(LowerConfig(file=str(LAYER)),)).save(config)
        try:
            for number in range(devices):
                service.attach(config, f"device{number}")
            registry = registry_of(ObdlabCollector(Collected(root / "run"), root / "cache"))
            took, size = [], 0
            for _ in range(SCRAPES):
                begun = time.perf_counter()
                size = len(generate_latest(registry))
                took.append(time.perf_counter() - begun)
        finally:
            clean_up(service, force=True)
    middle = statistics.median(took)
    print(f"scrape of {devices} devices: median {middle:.3f} s, slowest {max(took):.3f} s, {size >> 10} KiB")


def counting_ns() -> None:
    member = Member()
    clock = time.monotonic_ns

    def bare() -> None:
        taken = clock() - clock()
        if taken > member.slowest_ns:
            member.slowest_ns = taken

    def counted() -> None:
        member.since_ns = started = clock()
        taken = clock() - started
        member.read_ns += taken
        member.read_times[taken.bit_length()] += 1
        member.since_ns = 0
        if taken > member.slowest_ns:
            member.slowest_ns = taken

    costs = {
        call.__name__: min(timeit.repeat(call, number=READS, repeat=7)) / READS * 1e9 for call in (bare, counted)
    }
    print(f"counting the time of a read: {costs['counted'] - costs['bare']:.0f} ns more")


if __name__ == "__main__":
    counting_ns()
    scrape_s(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
