"""Where the time of a conversion goes, layer by layer.

Run: python -m tests.benchmarks.convert LAYOUT (an OCI layout directory; needs root)
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from obdlab.convert.image import ConvertOptions
from obdlab.image.settings import Settings
from obdlab.service.client import DeviceService
from tests.convert.converting import convert

PHASES = ("attach", "mkfs", "apply", "detach", "commit", "digest")


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory)
        devices = DeviceService(root / "run", Settings(cache_dir=root / "cache"))
        begin = time.monotonic()
        try:
            image = convert(sys.argv[1], f"oci:{root / 'out'}", devices, ConvertOptions(work_dir=root))
        finally:
            devices.shutdown(force=True)
        total = time.monotonic() - begin
    print(f"{'files':>7}{'content':>10}{'blob':>10}" + "".join(f"{phase:>8}" for phase in PHASES) + "   (MB, s)")
    for layer in image.layers:
        built = layer.built
        print(
            f"{built.applied.members:>7}{built.applied.file_bytes / 1e6:>10.1f}{built.size / 1e6:>10.1f}"
            + "".join(f"{built.seconds.get(phase, 0.0):>8.2f}" for phase in PHASES)
        )
    content = sum(layer.built.applied.file_bytes for layer in image.layers)
    print(f"all: {total:.2f} s, {content / 1e6 / total:.0f} MB of files a second, {image.size / 1e6:.1f} MB of blobs")


if __name__ == "__main__":
    main()
