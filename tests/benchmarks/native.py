"""The compiled form of packing and unpacking ZFile blocks beside Python's, in one run.

Run: python -m tests.benchmarks.native [--threads]. The forms take turns, and the best of nine rounds counts.
Processor time in microseconds. ``--threads`` adds the gain of two threads over one, by the clock: that wants idle
processors.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from obdlab.blob import Blob, MemoryBlob
from obdlab.image.open import open_stack
from obdlab.layers import native
from obdlab.layers.zfile import open_zfile
from obdlab.system import abi
from tests.benchmarks.tcmu import layer_file, microseconds_a_request
from tests.benchmarks.zfile import RANDOM_READS, STEP, Contest, Null, read_at_random, write
from tests.layers.zfile_samples import golden

ROUNDS = 9
SIZE = 16 << 20
LAYOUTS = [("lz4", 4096), ("lz4", 16384), ("zstd", 16384)]
FORMS = {"compiled": "1", "python": "0"}


@contextmanager
def form(name: str) -> Iterator[None]:
    """Use this form for files that are opened inside."""
    before = os.environ.get(native.SWITCH)
    os.environ[native.SWITCH] = FORMS[name]
    try:
        yield
    finally:
        del os.environ[native.SWITCH]
        if before is not None:
            os.environ[native.SWITCH] = before


def read_by(blob: Blob, threads: int) -> None:
    """Read all of the blob in pieces of 1 MiB, each thread its part of it."""
    part = blob.size // threads

    def run(number: int) -> None:
        for offset in range(number * part, (number + 1) * part, STEP):
            blob.read_at(offset, STEP)

    others = [threading.Thread(target=run, args=(number,)) for number in range(1, threads)]
    for thread in others:
        thread.start()
    run(0)
    for thread in others:
        thread.join()


def zfiles(data: bytes, layout: tuple[str, int], *, threads: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of each measurement, and its value in each form: microseconds, or a gain."""
    contest = Contest(ROUNDS)
    for name in FORMS:
        out = io.BytesIO()
        with form(name):
            write(data, layout, out)
            blob = open_zfile(MemoryBlob(out.getvalue()))

        def writing(workers: int, name: str = name) -> Callable[[], None]:
            def run() -> None:
                with form(name):
                    write(data, layout, Null(), workers)

            return run

        contest.add(f"{name} write", writing(1))
        contest.add(f"{name} read", partial(read_by, blob, 1))
        if threads:
            contest.add(f"{name} write 2", writing(2))
            contest.add(f"{name} read 2", partial(read_by, blob, 2))
        contest.add(f"{name} random", partial(read_at_random, blob))
    contest.run()
    cpu, clock = contest.best_cpu_s, contest.best_s
    pieces = len(data) // STEP
    yield "read of 1 MiB, us", {name: cpu[f"{name} read"] / pieces * 1e6 for name in FORMS}
    yield "read of 4 KiB, us", {name: cpu[f"{name} random"] / RANDOM_READS * 1e6 for name in FORMS}
    yield "write of 1 MiB, us", {name: cpu[f"{name} write"] / pieces * 1e6 for name in FORMS}
    if not threads:
        return
    yield "read, two threads", {name: clock[f"{name} read"] / clock[f"{name} read 2"] for name in FORMS}
    yield "write, two threads", {name: clock[f"{name} write"] / clock[f"{name} write 2"] for name in FORMS}


def ring() -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the requests of a TCMU ring."""
    with tempfile.TemporaryDirectory() as directory:
        path = layer_file(Path(directory))
        for length in (4096, 131072):
            took = {}
            for name in FORMS:
                with form(name), open_stack([path]) as image:
                    took[name] = microseconds_a_request(image, length)
            yield f"{length >> 10} KiB on a ring, us", took


def main() -> None:
    """Print the values of both forms and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", action="store_true", help="also the gain of two threads")
    threads = parser.parse_args().threads
    abi.keep_freed_memory()  # as servers do
    print(f"compiled form: {native.state()}")
    part = golden("text.bin")
    data = (part * (SIZE // len(part) + 1))[:SIZE]
    rows = [
        (f"{layout[0]} {layout[1] >> 10} KiB: {what}", took)
        for layout in LAYOUTS
        for what, took in zfiles(data, layout, threads=threads)
    ]
    rows += ring()
    for what, took in rows:
        ratio = took["compiled"] / took["python"]
        print(
            f"{what:36} compiled {took['compiled']:8.2f}  python {took['python']:8.2f}  ratio {ratio:5.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
