"""What a TCMU device costs: processor time of a request, on a simulated ring and without the kernel's part.

Run: python -m tests.benchmarks.tcmu. The image is one LZ4 layer of ZFile blocks of 4 KiB with checksums, in the page
cache: lookup, CRC, decompression, ring and SCSI are all in the figure, the system call that tells the kernel as well.
"""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

from obdlab.blob import Blob
from obdlab.call import Call
from obdlab.devices.crew import Member
from obdlab.devices.tcmu.disk import ScsiDisk
from obdlab.devices.tcmu.server import TcmuServer
from obdlab.image.open import open_stack
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.writing import Packing
from obdlab.system import abi
from tests.devices.tcmu.simulated import KernelRing, read_10

MIB = 1 << 20
SIZE = 64 * MIB
#: What the kernel hands over at a queue depth of 16.
BATCH = 6
ROUNDS = 5


class NoCost(Blob):
    """Answers any read at once: what is left is the ring."""

    name = "no cost"
    size = SIZE

    def __init__(self) -> None:
        self._answers = {length: bytes(length) for length in (4096, 131072)}

    def read_at(self, offset: int, length: int, call: Call | None = None) -> bytes:
        return self._answers[length]


def layer_file(directory: Path) -> Path:
    """Make a layer whose blocks compress to about a half."""
    rng = random.Random(1)
    raw, path = directory / "raw", directory / "layer.obd"
    with raw.open("wb") as file:
        for _ in range(SIZE // 4096):
            file.write((rng.randbytes(1900) + bytes(148)) * 2)
    import_disk(str(raw), path, Packing(algorithm="lz4", block_size=4096), kind="raw")
    return path


def microseconds_a_request(blob: Blob, length: int, *, scattered: bool = False) -> float:
    """Return the processor time of a read, the best of some rounds, in batches as the kernel makes them.

    Its data lies in one piece, as the kernel puts it in an idle ring, or ``scattered``, each page a piece.
    """
    rng, blocks = random.Random(2), length // 512
    kernel = KernelRing(ring_size=1 << 20, data_pages=2048)
    server = TcmuServer(kernel.memory, kernel.event, ScsiDisk(blob, serial="0", description=""), name="benchmark")
    member, best, batches = Member(), float("inf"), 4 * MIB // length // BATCH + 100
    for _ in range(ROUNDS):
        spent = 0
        for _ in range(batches):
            numbers = [
                kernel.put(read_10(rng.randrange(SIZE // length) * blocks, blocks), room=length, scattered=scattered)
                for _ in range(BATCH)
            ]
            kernel.publish()
            begin = time.thread_time_ns()
            server._receive()
            while server._taken:
                command = server._taken.popleft()
                if len(command) == 5:
                    server._read(member, command)
                else:
                    server._serve(member, command)
            server._notify()
            spent += time.thread_time_ns() - begin
            answers = kernel.answers()
            assert sorted(answers) == sorted(numbers)
            assert not any(answer.status for answer in answers.values())
            kernel.forget_events()
        best = min(best, spent / batches / BATCH / 1000)
    server.end()
    kernel.close()
    return best


def main() -> None:
    """Print the figures and their ratios."""
    abi.keep_freed_memory()  # as servers do
    with tempfile.TemporaryDirectory() as name:
        path = layer_file(Path(name))
        with open_stack([path]) as image:
            for length in (4096, 131072):
                ring, whole = microseconds_a_request(NoCost(), length), microseconds_a_request(image, length)
                print(f"{length >> 10:4} KiB: {whole:6.2f} us a request, {ring:5.2f} us of it ring and SCSI")
            whole = microseconds_a_request(image, 131072, scattered=True)
            print(f" 128 KiB: {whole:6.2f} us a request in pages that do not follow each other")


if __name__ == "__main__":
    main()
