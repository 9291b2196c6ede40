"""Reading gzip layers by their index beside ``gzip -dc``, and making the index.

Run: python -m tests.benchmarks.gziplayers [MiB of content] [gzip file]

Without a file, the content is text, noise, runs and repetitions, packed by zlib at level 6. Every figure is of
processor time, the best of five rounds in which the contenders take turns. Rates are of content. ``in order`` reads
all of it in pieces of 128 KiB; ``random`` reads 4 KiB at places of which no span was decoded before, and stands
beside the time of ``gzip -dc`` for as much content as a span has.
"""

from __future__ import annotations

import io
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from obdlab.layers.gziptarget import GzipTarget
from obdlab.layers.gzipwriter import write_gzip_index
from obdlab.layers.spancache import SpanCache
from obdlab.localfile import LocalFile
from tests.layers.gzip_samples import content, member

ROUNDS = 5
STEP = 128 << 10
READS = 40


def processor_s(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def gzip_s(path: Path) -> float:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begin = used()
    subprocess.run(["gzip", "-dc", str(path)], stdout=subprocess.DEVNULL, check=True)
    return used() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        path, index = Path(name) / "layer.tar.gz", Path(name) / "gzip.meta"
        if len(sys.argv) > 2:
            path = Path(sys.argv[2])
        else:
            size = int(sys.argv[1] if len(sys.argv) > 1 else 64) << 20
            path.write_bytes(member(content(8 << 20) * (size >> 23)))
        gz = path.read_bytes()
        sink = io.BytesIO()
        header = write_gzip_index(io.BytesIO(gz), sink)
        index.write_bytes(sink.getvalue())
        size = header.uncompressed_size

        def opened(kept: int) -> GzipTarget:
            return GzipTarget(LocalFile(path), LocalFile(index), spans=SpanCache(kept))

        def in_order() -> None:
            with opened(4 << 20) as blob:
                for at in range(0, size, STEP):
                    blob.read_at(at, min(STEP, size - at))

        def at_random() -> None:
            source = random.Random(1)
            with opened(0) as blob:
                for _ in range(READS):
                    blob.read_at(source.randrange(size - 4096), 4096)

        def making() -> None:
            write_gzip_index(io.BytesIO(gz), io.BytesIO())

        best: dict[str, float] = {}
        for _ in range(ROUNDS):
            for what, seconds in (
                ("gzip -dc", gzip_s(path)),
                ("in order", processor_s(in_order)),
                ("random", processor_s(at_random) / READS),
                ("index made", processor_s(making)),
            ):
                best[what] = min(best.get(what, seconds), seconds)
        usual = best["gzip -dc"]
        span_s = usual / header.entries
        print(
            f"{size >> 20} MiB of content in {len(gz) >> 20} MiB, {header.entries} entries, "
            f"index of {header.index_size >> 10} KiB"
        )
        for what in ("gzip -dc", "in order", "index made"):
            print(f"{what:12} {size / best[what] / 1e6:7.0f} MB/s  {usual / best[what]:5.2f} of gzip -dc")
        print(
            f"{'random':12} {best['random'] * 1e3:7.2f} ms    {best['random'] / span_s:5.2f} of gzip -dc for a span"
        )


if __name__ == "__main__":
    main()
