"""Where the time of a conversion goes, layer by layer.

Run: python -m tests.benchmarks.convert LAYOUT (an OCI layout directory)
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from obdlab.convert.image import ConvertOptions
from tests.convert.converting import convert

PHASES = ("apply", "commit", "digest")


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory)
        begin = time.monotonic()
        image = convert(sys.argv[1], f"oci:{root / 'out'}", ConvertOptions(work_dir=root))
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
