"""TCMU, ublk, FUSE and loop against each other and against handlers that do nothing: IOPS and MiB/s, and ratios.

Interleaved, round by round. Run in one boot of the virtual machine, or on a host whose kernel has all, as root:
    python -m tests.vm run --module configfs --module target_core_user --module tcm_loop --module sd_mod \\
        --module ublk_drv --module loop --module fuse -- \\
        .venv/bin/python -m tests.benchmarks.device_kinds --seconds 2
Emulated processors give no absolute figures: quote the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from obdlab.blob import Blob
from obdlab.call import Call
from obdlab.contrib.ublk.ublk_device import UblkDevice
from obdlab.devices.device import Device
from obdlab.devices.fuse_loop import FuseLoopDevice
from obdlab.devices.tcmu.tcmu_device import TcmuDevice
from obdlab.image.open import open_stack
from tests.benchmarks.device import JOBS, fio
from tests.benchmarks.tcmu import NoCost, layer_file


@contextmanager
def device(make: Callable[..., Device], blob: Blob, directory: Path) -> Iterator[Device]:
    """A device for the time being."""
    made = make(blob, directory)
    try:
        yield made
    finally:
        made.stop()


class Nothing(NoCost):
    """Answers reads of any length at once."""

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return self._answers.get(length) or bytes(length)


def main() -> None:
    """Print a line for each job and kind, and the ratio to TCMU with nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        image = open_stack([layer_file(root)])
        kinds = {
            "TCMU, nothing": (TcmuDevice, Nothing()),
            "TCMU, image": (TcmuDevice, image),
            "ublk, nothing": (UblkDevice, Nothing()),
            "ublk, image": (UblkDevice, image),
            "FUSE and loop, nothing": (FuseLoopDevice, Nothing()),
            "FUSE and loop, image": (FuseLoopDevice, image),
        }
        for job, (unit, options) in JOBS.items():
            seen: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(args.rounds):
                for kind, (make, blob) in kinds.items():
                    with device(make, blob, root / "device") as made:
                        seen[kind].append(fio(made.path, unit, options, args.seconds))
            base = statistics.median(seen["TCMU, nothing"])
            for kind, values in seen.items():
                value = statistics.median(values)
                print(f"{job:26} {kind:22} {value:9.0f} {unit:6} {value / base:5.2f}", flush=True)
        image.close()


if __name__ == "__main__":
    main()
