"""Commit of a writable layer to an LZ4 ZFile beside compressing the same bytes alone, and the memory it takes.

Run: python -m tests.benchmarks.commit [MiB of layer] [directory]

``alone`` is the codec library over the layer's bytes, 4 KiB blocks, already in memory; ``commit`` reads the layer
from its file (in the page cache), compresses, checksums, and writes a file with a tar around it; ``synced`` also
waits for the disk and renames the file, as the command does. Best of seven rounds, taking turns, of the time that
passed and of processor time, which a busy machine disturbs less. Memory is the peak of a process of its own that does
the commit, above what it had before.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from obdlab.layerfiles.disks import open_any_layer
from obdlab.layerfiles.writing import Packing, write_layer
from obdlab.layers.commit import commit as write_commit
from obdlab.layers.upper import SparseUpper
from tests.benchmarks.zfile import Contest, bare_encode
from tests.layers.zfile_samples import golden

ROUNDS = 7
PEAK = """
import sys
from tests.benchmarks.commit import commit, peak_kib
before = peak_kib()
commit(sys.argv[1], sys.argv[2], 1)
print(peak_kib() - before)
"""


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def make_layer(path: Path, size: int) -> bytes:
    part = golden("text.bin")[:299_008]  # compresses to about half, as system files do
    data = (part * (size // len(part) + 1))[:size]
    with SparseUpper.create(path, 2 * size) as upper:
        step = 1 << 20
        for number, begin in enumerate(range(0, size, step)):
            upper.write_at(begin + number // 4 * step, data[begin : begin + step])  # with holes
    return data


def commit(layer: str | Path, output: str | Path, workers: int) -> None:
    packing = Packing("lz4", 4096, tar=True, workers=workers)
    with (
        closing(open_any_layer(layer)) as source,
        open(output, "wb", buffering=0) as file,
        packing.around(file) as sink,
    ):
        write_commit(source, sink)


def commit_synced(layer: Path, output: Path, workers: int) -> None:
    with closing(open_any_layer(layer)) as source:
        write_layer(source, output, Packing("lz4", 4096, tar=True, workers=workers), force=True)


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 300) << 20
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        layer, output = Path(name) / "layer", Path(name) / "output"
        race(make_layer(layer, size), layer, output)
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(layer), str(output)], capture_output=True, check=True, text=True
        )
        print(f"memory of a commit: {int(done.stdout) / 1024:.0f} MiB")


def race(data: bytes, layer: Path, output: Path) -> None:
    contest = Contest(ROUNDS)
    contest.add("alone", lambda: bare_encode(data, ("lz4", 4096)))
    contest.add("commit", lambda: commit(layer, output, 1))
    contest.add("commit, 2 workers", lambda: commit(layer, output, 2))
    contest.add("synced", lambda: commit_synced(layer, output, 1))
    contest.run()
    for what, seconds in contest.best_s.items():
        ratio, cpu_ratio = seconds / contest.best_s["alone"], contest.best_cpu_s[what] / contest.best_cpu_s["alone"]
        speed = len(data) / seconds / 1e6
        print(f"{what:18} {seconds:6.2f} s  {speed:5.0f} MB/s  {ratio:.2f} of alone, processor {cpu_ratio:.2f}")


if __name__ == "__main__":
    main()
