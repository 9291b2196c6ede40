"""ZFile write and read beside a bare loop over the codec library, by algorithm and block size.

Run: python -m tests.benchmarks.zfile [MiB of content]

Every figure is MB/s of content a core (of processor time, which a busy machine disturbs less than what the clock
says), best of nine rounds, with all contenders taking turns, so that those of one run can be compared with each
other. ``bare`` is the codec library alone on the same blocks: cramjam block by block into one buffer, zstandard's own
batch calls with one thread. Reads are of 1 MiB in order and of 4 KiB at random; memcpy is the same 1 MiB reads of the
uncompressed content. ``2 workers`` writes with two threads that compress, by the clock, and stands beside the plain
write by the clock.
"""

from __future__ import annotations

import io
import random
import struct
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import cramjam
import zstandard

from obdlab.blob import Blob, MemoryBlob
from obdlab.layers.zfile import ZFileReader, ZFileWriter, open_zfile
from tests.layers.zfile_samples import golden

ROUNDS = 9
STEP = 1 << 20
RANDOM_READS = 2000
LAYOUTS = [(algorithm, kib << 10) for algorithm in ("lz4", "zstd") for kib in (4, 16, 64)]


class Null:
    """A sink that keeps nothing."""

    def write(self, data: bytes) -> None:
        pass


class Contest:
    """Contenders that take turns; the best time of each."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._calls: dict[str, Callable[[], object]] = {}
        self.best_s: dict[str, float] = {}
        self.best_cpu_s: dict[str, float] = {}

    def add(self, name: str, call: Callable[[], object]) -> None:
        self._calls[name] = call

    def run(self) -> None:
        for _ in range(self._rounds):
            for name, call in self._calls.items():
                begin, begin_cpu = time.perf_counter(), time.process_time()
                call()
                elapsed, elapsed_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
                self.best_s[name] = min(self.best_s.get(name, elapsed), elapsed)
                self.best_cpu_s[name] = min(self.best_cpu_s.get(name, elapsed_cpu), elapsed_cpu)


def write(data: bytes, layout: tuple[str, int], sink: Null | io.BytesIO, workers: int = 1) -> None:
    algorithm, block_size = layout
    with ZFileWriter(sink, block_size, algorithm, workers=workers) as writer:
        for begin in range(0, len(data), STEP):
            writer.write(data[begin : begin + STEP])


def bare_encode(data: bytes, layout: tuple[str, int]) -> None:
    algorithm, block_size = layout
    blocks = [memoryview(data)[begin : begin + block_size] for begin in range(0, len(data), block_size)]
    if algorithm == "zstd":
        zstandard.ZstdCompressor(level=3).multi_compress_to_buffer(blocks, threads=1)
        return
    out = bytearray(block_size + 512)
    for block in blocks:
        cramjam.lz4.compress_block_into(block, out, store_size=False)


def bare_decode(blocks: list[bytes], layout: tuple[str, int]) -> None:
    algorithm, block_size = layout
    if algorithm == "zstd":
        decompressor = zstandard.ZstdDecompressor()
        sizes = struct.pack("<Q", block_size)
        for begin in range(0, len(blocks), STEP // block_size):
            part = blocks[begin : begin + STEP // block_size]
            decompressor.multi_decompress_to_buffer(part, decompressed_sizes=sizes * len(part), threads=1)
        return
    out = memoryview(bytearray(block_size))
    for block in blocks:
        cramjam.lz4.decompress_block_into(block, out, output_len=block_size)


def read_in_order(blob: Blob) -> None:
    for offset in range(0, blob.size, STEP):
        blob.read_at(offset, min(STEP, blob.size - offset))


def read_at_random(blob: Blob) -> None:
    blocks = blob.size // 4096
    for block in random.Random(1).choices(range(blocks), k=RANDOM_READS):
        blob.read_at(block * 4096, 4096)


def stored_blocks(data: bytes, reader: ZFileReader) -> list[bytes]:
    bounds = reader._table.boundaries(0, reader.header.index_size)
    return [data[begin : end - 4] for begin, end in pairwise(bounds)]


def compete(data: bytes, layout: tuple[str, int]) -> Contest:
    out = io.BytesIO()
    write(data, layout, out)
    reader = open_zfile(MemoryBlob(out.getvalue()))
    blocks = stored_blocks(out.getvalue(), reader)
    contest = Contest(ROUNDS)
    contest.add("memcpy", lambda: read_in_order(MemoryBlob(data)))
    contest.add("bare encode", lambda: bare_encode(data, layout))
    contest.add("write", lambda: write(data, layout, Null()))
    contest.add("2 workers", lambda: write(data, layout, Null(), 2))
    contest.add("bare decode", lambda: bare_decode(blocks, layout))
    contest.add("read", lambda: read_in_order(reader))
    contest.add("random", lambda: read_at_random(reader))
    contest.run()
    return contest


def main() -> None:
    size = int(sys.argv[1] if len(sys.argv) > 1 else 16) << 20
    part = golden("text.bin")  # compresses to about half, as system files do
    data = (part * (size // len(part) + 1))[:size]
    print("                write   bare of bare | clock: 1  2 workers |  read   bare of bare of memcpy | 4 KiB us")
    for layout in LAYOUTS:
        contest = compete(data, layout)
        speed = {name: size / seconds / 1e6 for name, seconds in contest.best_cpu_s.items()}
        clock = {name: size / seconds / 1e6 for name, seconds in contest.best_s.items()}
        print(
            f"{layout[0]:5} {layout[1] >> 10:3} KiB {speed['write']:8.0f} {speed['bare encode']:6.0f}"
            f" {speed['write'] / speed['bare encode']:7.2f} | {clock['write']:8.0f} {clock['2 workers']:10.0f} |"
            f" {speed['read']:5.0f} {speed['bare decode']:6.0f} {speed['read'] / speed['bare decode']:7.2f}"
            f" {speed['read'] / speed['memcpy']:9.2f} | {contest.best_cpu_s['random'] / RANDOM_READS * 1e6:8.2f}"
        )


if __name__ == "__main__":
    main()
