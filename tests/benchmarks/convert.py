"""Where the time of a conversion goes, layer by layer.

Run: python -m tests.benchmarks.convert LAYOUT (an OCI layout directory); without one: 300 MB as 850 large and as
40,000 small files, applied to an empty disk.
"""

from __future__ import annotations

import io
import random
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from obdlab.convert.apply import apply_layer
from obdlab.convert.image import ConvertOptions
from obdlab.convert.tree import Ext4Tree
from obdlab.ext4.mkfs import make_filesystem
from obdlab.layers.stack import WritableStack
from obdlab.layers.upper import SparseUpper
from tests.convert.converting import convert

PHASES = ("apply", "commit", "digest")


def made_tars() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        for count in (850, 40_000):
            path = Path(directory) / f"{count}.tar"
            content = random.Random(count).randbytes(300_000_000 // count)
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for number in range(count):
                    info = tarfile.TarInfo(f"d{number // 100}/file{number}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            upper = Path(directory) / f"{count}.writable"
            SparseUpper.create(upper, 64 << 30).close()
            begin = time.monotonic()
            with SparseUpper.open(upper) as layer, path.open("rb", buffering=0) as file:
                disk = WritableStack(None, layer)
                make_filesystem(disk)
                tree = Ext4Tree(disk)
                apply_layer(file, path.name, tree)
                tree.finish()
            print(f"{count:>6} files, {path.stat().st_size / 1e6:.0f} MB of tar: {time.monotonic() - begin:.2f} s")


def main() -> None:
    if len(sys.argv) == 1:
        made_tars()
        return
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
