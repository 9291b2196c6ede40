"""Applying a layer of many files to an empty ext4, beside GNU tar extracting it to a directory.

Run: python -m tests.benchmarks.apply [REPEATS]: 300 MB as 850 large and as 40,000 small files, and the same small
files with pax headers. The least time of the repeats counts; the ratio is to tar's least time.
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from obdlab.convert.apply import apply_layer
from obdlab.convert.tree.target import Ext4Tree
from obdlab.layers.stack import WritableStack
from obdlab.layers.upper import SparseUpper
from obdlab.volumes.ext4.mkfs import make_filesystem

_BYTES = 300_000_000
_CASES = ((850, False), (40_000, False), (40_000, True))


def make_tar(path: Path, count: int, *, pax: bool) -> None:
    content = random.Random(count).randbytes(_BYTES // count)
    kind = tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT
    with tarfile.open(path, "w", format=kind) as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"d{number // 100}/file{number}")
            info.size = len(content)
            info.mtime = 1_700_000_000.5 if pax else 1_700_000_000  # a fraction takes a pax record
            tar.addfile(info, io.BytesIO(content))


def applied(tar: Path, upper: Path) -> float:
    begin = time.monotonic()
    SparseUpper.create(upper, 64 << 30).close()
    with SparseUpper.open(upper) as layer, tar.open("rb", buffering=0) as file:
        disk = WritableStack(None, layer)
        make_filesystem(disk)
        tree = Ext4Tree(disk)
        apply_layer(file, tar.name, tree)
        tree.finish()
    seconds = time.monotonic() - begin
    upper.unlink()
    return seconds


def extracted(tar: Path, target: Path) -> float:
    target.mkdir()
    begin = time.monotonic()
    subprocess.run(["tar", "--no-same-owner", "-xf", str(tar), "-C", str(target)], check=True)
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return seconds


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory)
        for count, pax in _CASES:
            tar = root / f"{count}.tar"
            make_tar(tar, count, pax=pax)
            ours, theirs = [], []
            for _ in range(repeats):  # in turn, so that whatever else runs here disturbs both
                ours.append(applied(tar, root / "layer.writable"))
                theirs.append(extracted(tar, root / "extracted"))
            print(
                f"{count:>6} files{' with pax headers' if pax else '':<17} "
                f"{tar.stat().st_size / 1e6:>4.0f} MB of tar: "
                f"{min(ours):.2f} s, tar -x {min(theirs):.2f} s, ratio {min(ours) / min(theirs):.2f} "
                f"(all: {', '.join(f'{one:.2f}' for one in ours)})"
            )
            tar.unlink()


if __name__ == "__main__":
    main()
