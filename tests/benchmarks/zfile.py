"""ZFile read and write, MB/s of content in one process, LZ4 and zstd by block size.

Run: python -m tests.benchmarks.zfile [MiB of content]

Reads are of 1 MiB in order, and of 4 KiB at random. ``memcpy`` is the same 1 MiB reads of the uncompressed content:
the figures of one run may be compared with each other, those of two machines may not. Best of five rounds, the
layouts taking turns.
"""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Callable

from obdlab.blob import Blob, MemoryBlob
from obdlab.layers.zfile import ZFileReader, ZFileWriter, open_zfile
from tests.layers.zfile_samples import golden

ROUNDS = 5
STEP = 1 << 20
LAYOUTS = [(algorithm, kib << 10) for algorithm in ("lz4", "zstd") for kib in (4, 16, 64)]


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compress(data: bytes, algorithm: str, block_size: int) -> bytes:
    out = io.BytesIO()
    with ZFileWriter(out, block_size, algorithm) as writer:
        writer.write(data)
    return out.getvalue()


def read_in_order(blob: Blob) -> None:
    for offset in range(0, blob.size, STEP):
        blob.read_at(offset, min(STEP, blob.size - offset))


def read_at_random(blob: Blob, count: int) -> None:
    blocks = blob.size // 4096
    for block in random.Random(1).choices(range(blocks), k=count):
        blob.read_at(block * 4096, 4096)


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 32) << 20
    part = golden("text.bin")  # compresses to about half, as system files do
    data = (part * (size // len(part) + 1))[:size]
    written: dict[tuple[str, int], float] = {}
    readers: dict[tuple[str, int], ZFileReader] = {}
    for layout in LAYOUTS:
        elapsed = seconds(lambda: compress(data[: size // 4], *layout))  # noqa: B023 - called at once
        written[layout] = size / 4 / elapsed
        readers[layout] = open_zfile(MemoryBlob(compress(data, *layout)))
    plain = MemoryBlob(data)
    in_order = dict.fromkeys(LAYOUTS, 1e9)
    at_random = dict.fromkeys(LAYOUTS, 1e9)
    copy = 1e9
    for _ in range(ROUNDS):
        copy = min(copy, seconds(lambda: read_in_order(plain)))
        for layout, reader in readers.items():
            in_order[layout] = min(in_order[layout], seconds(lambda: read_in_order(reader)))  # noqa: B023
            at_random[layout] = min(at_random[layout], seconds(lambda: read_at_random(reader, 2000)))  # noqa: B023
    print(f"memcpy {size / copy / 1e6:.0f} MB/s")
    print("algorithm  block  write MB/s  read 1 MiB MB/s  of memcpy  4 KiB at random us")
    for layout in LAYOUTS:
        algorithm, block_size = layout
        read = size / in_order[layout]
        print(
            f"{algorithm:9}  {block_size >> 10:2} KiB  {written[layout] / 1e6:9.0f}  {read / 1e6:15.0f}"
            f"  {read * copy / size:9.2f}  {at_random[layout] / 2000 * 1e6:18.2f}"
        )


if __name__ == "__main__":
    main()
