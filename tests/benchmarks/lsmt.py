"""Indexes, writable layers and commits of LSMT layers, each beside the least that the same work could cost.

Run: python -m tests.benchmarks.lsmt [lookup] [merge] [write] [restack] [gc] [open] [commit]   (all if none is named)
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from obdlab.formats.lsmt.index import SegmentIndex, merge
from obdlab.formats.lsmt.layout import encode_segments
from obdlab.layers.append import AppendUpper
from obdlab.layers.commit import commit
from obdlab.layers.gc import collect
from obdlab.layers.stack import WritableStack
from tests.benchmarks.merge import best_ms, random_layer

_SEGMENTS = 100_000


def bench_lookup() -> None:
    """Single and batched lookups at 100,000 segments."""
    disk = 128 * _SEGMENTS
    columns = random_layer(np.random.default_rng(1), _SEGMENTS, disk)
    index = SegmentIndex(columns)
    begin = np.random.default_rng(2).integers(0, disk - 256, 1_000_000)
    singles = begin[:100_000].tolist()

    def one_by_one() -> None:
        for sector in singles:
            index.lookup(sector, sector + 8)

    print(f"lookup of 4 KiB, one by one: {best_ms(one_by_one, 5) / len(singles) * 1000:.2f} us")
    searched = best_ms(lambda: np.searchsorted(columns.end_sectors, begin, side="right"), 5)
    for length in (8, 256):
        end = begin + length
        taken = best_ms(lambda end=end: index.lookup_batch(begin, end), 5)  # type: ignore[misc]
        print(
            f"batches of {length * 512} bytes: {len(begin) / taken / 1000:.1f} M ranges/s, "
            f"{taken / searched:.2f} of one numpy.searchsorted over the same"
        )


def bench_merge() -> None:
    """Merge of 100 layers of 10,000 segments."""
    rng = np.random.default_rng(1)
    indexes = [SegmentIndex(random_layer(rng, 10_000, 128 * 10_000)) for _ in range(100)]
    starts = np.concatenate([index.segments().offset_sectors for index in indexes])
    sorting = best_ms(lambda: np.sort(starts, kind="stable"), 5)
    taken = best_ms(lambda: merge(indexes), 5)
    print(f"merge of 100 x 10,000 segments: {taken:.0f} ms, {taken / sorting:.1f} of sorting their starts")


def bench_write(folder: Path) -> None:
    """Writes of an append-mode layer, beside pwrite of the same."""
    block, count = os.urandom(4096), 50_000
    with (folder / "plain").open("wb", buffering=0) as file:
        bare = best_ms(lambda: [os.pwrite(file.fileno(), block, at * 4096) for at in range(count)], 3)
    places = random.Random(1).sample(range(count * 2), count)
    for group in (0, 256):
        with AppendUpper.create(folder / f"d{group}", folder / f"i{group}", 8192 * count) as upper:
            upper.set_group_commit(group)
            begin = time.perf_counter()
            for place in places:
                upper.write_at(place * 4096, block)
            taken = (time.perf_counter() - begin) * 1000
        print(
            f"random 4 KiB writes, group commit {group}: {count / taken:.0f} k/s, {taken / bare:.1f} of bare pwrite"
        )


def bench_restack(folder: Path) -> None:
    """How long writes wait for a live snapshot of a layer of 100,000 records."""
    upper = filled(folder, "old", _SEGMENTS)
    records = encode_segments(upper.index.segments())
    upper.flush()
    with (folder / "plain").open("wb", buffering=0) as file:

        def write_and_sync() -> None:
            file.seek(0)
            file.write(records)
            os.fsync(file.fileno())
            file.write(records[:4096])
            os.fsync(file.fileno())

        bare = best_ms(write_and_sync, 5)
    stack = WritableStack(None, upper)
    slowest = [0.0]
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.wait(0.001):
            begin = time.perf_counter()
            stack.write_at(0, bytes(4096))
            slowest[0] = max(slowest[0], time.perf_counter() - begin)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    fresh = AppendUpper.create(folder / "new", folder / "new.i", 0)
    begin = time.perf_counter()
    paused_s = stack.restack(fresh).paused_s
    taken = (time.perf_counter() - begin) * 1000
    stop.set()
    writer.join()
    stack.close()
    print(
        f"restack of {_SEGMENTS} records: {taken:.0f} ms, writes held for {paused_s * 1000:.0f} ms, "
        f"the slowest write took {slowest[0] * 1000:.0f} ms; "
        f"bare write and sync of the index: {bare:.0f} ms"
    )


def bench_gc(folder: Path) -> None:
    """Collection of a layer whose 64 MiB were written ten times."""
    size = 64 << 20
    with AppendUpper.create(folder / "gc", folder / "gc.i", size) as upper:
        for turn in range(10):
            for at in range(0, size, 1 << 16):
                upper.write_at(at, bytes([turn + 1]) * (1 << 16))
        begin = time.perf_counter()
        done = collect(upper)
        taken = time.perf_counter() - begin
    print(
        f"gc of {size >> 20} MiB written ten times: {done.allocated_before >> 20} -> "
        f"{done.allocated_after / size:.3f} x {size >> 20} MiB in {taken:.2f} s"
    )


def bench_open(folder: Path) -> None:
    """Opening a layer after many writes: the log is replayed."""
    filled(folder, "opened", _SEGMENTS).close()
    taken = best_ms(lambda: AppendUpper.open(folder / "opened", folder / "opened.i").close(), 3)
    reading = best_ms((folder / "opened.i").read_bytes, 3)
    print(f"opening a layer of {_SEGMENTS} records: {taken:.0f} ms, {taken / reading:.0f} of reading its index file")


def bench_commit(folder: Path) -> None:
    """Commit of 300 MiB in memory use and beside a plain copy."""
    upper = AppendUpper.create(folder / "c", folder / "c.i", 1 << 40)
    block = os.urandom(65536)
    for number in range(300 * 16):
        upper.write_at(number * 7919 % 9600 * 131072, block)
    out = (folder / "out").open("wb")

    def run() -> None:
        out.seek(0)
        commit(upper, out)

    def copy() -> None:
        out.seek(0)
        for at in range(4096, 4096 + (300 << 20), 1 << 20):
            out.write(upper.data.read_at(at, 1 << 20))

    bare, taken = best_ms(copy, 3), best_ms(run, 3)
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    out.close()
    upper.close()
    print(
        f"commit of 300 MiB: {taken:.0f} ms, {taken / bare:.2f} of copying it; peak memory {peak / (1 << 20):.0f} MiB"
    )


def filled(folder: Path, name: str, records: int) -> AppendUpper:
    """A layer that holds that many separate blocks."""
    upper = AppendUpper.create(folder / name, folder / f"{name}.i", 8192 * records)
    upper.set_group_commit(256)
    block = bytes(512)
    for place in random.Random(2).sample(range(records), records):
        upper.write_at(place * 8192, block)
    upper.flush()
    upper.set_group_commit(0)
    return upper


def main() -> None:
    benches: dict[str, Callable[..., None]] = {
        name.removeprefix("bench_"): call for name, call in globals().items() if name.startswith("bench_")
    }
    for name in sys.argv[1:] or benches:
        if name in ("lookup", "merge"):
            benches[name]()
            continue
        with tempfile.TemporaryDirectory() as folder:
            benches[name](Path(folder))


if __name__ == "__main__":
    main()
