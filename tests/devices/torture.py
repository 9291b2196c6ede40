"""A writable device under everything that can happen to it, against a bytearray: fsx with deaths and live changes.

A run is a list of operations that follows from a seed. One that goes wrong is made shorter until nothing can be left
out, and printed, so that it can be looked into: ``python -m tests.devices.torture --kind append --seed 7``.
"""

from __future__ import annotations

import argparse
import fcntl
import mmap
import os
import random
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.errors import DeviceError
from obdlab.image.config import ImageConfig, LowerConfig, UpperConfig
from obdlab.image.open import open_image
from obdlab.layerfiles.diskimport import import_disk
from obdlab.layerfiles.snapshot import make_next
from obdlab.layerfiles.writing import Packing
from obdlab.server.cleanup import clean_up
from obdlab.server.client import DeviceService
from obdlab.server.live import LiveDevice
from obdlab.server.rundir import DeviceRecord
from obdlab.settings.settings import Settings
from tests.devices.contract import BLKDISCARD, BLKGETSIZE64, BLKZEROOUT, MIB
from tests.layers.uppers import KINDS, Files
from tests.server.killing import kill, kill_for_good, until

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 8 * MIB
MOST = 16 * MIB
SECTOR = 512
#: How often each comes, by its name as a method of Torture.
OPERATIONS = {
    "write": 40,
    "read": 20,
    "discard": 12,
    "zero": 4,
    "flush": 6,
    "kill": 5,
    "kill_while_writing": 5,
    "reattach": 2,
    "die_for_good": 2,
    "upgrade": 2,
    "snapshot": 3,
    "kill_while_snapshotting": 2,
    "collect": 3,
    "kill_while_collecting": 1,
    "grow": 2,
}


class WrongBytesError(AssertionError):
    """The device does not hold what the model does."""


@dataclass(frozen=True)
class Operation:
    """What to do, where (bytes; as far as it lies inside the disk of that moment), and the seed of its content."""

    name: str
    offset: int
    length: int
    seed: int


def operations(seed: int, count: int) -> list[Operation]:
    """The operations of a seed."""
    rng = random.Random(seed)
    made = []
    for name in rng.choices(list(OPERATIONS), weights=list(OPERATIONS.values()), k=count):
        unit = rng.choice((SECTOR, 4096, 4096, 65536))
        length = unit * rng.randint(1, rng.choice((1, 4, 16)))
        made.append(Operation(name, rng.randrange(0, MOST, unit), length, rng.randrange(1 << 30)))
    return made


class Torture:
    """One device, its model, and its files in a directory of their own."""

    def __init__(self, directory: Path, kind: str, *, lowers: bool) -> None:
        self.model = bytearray(SIZE)
        self._directory = directory
        self._kind = kind
        self._layers = 1
        self._fd = -1
        self._service = DeviceService(directory / "run", Settings(cache_dir=directory / "cache"))
        self._config = directory / "config.v1.json"
        base = (LowerConfig(file=str(self._base())),) if lowers else ()
        files = Files.named(directory, kind)
        files.create(0 if lowers else SIZE).close()
        ImageConfig(lowers=base, upper=UpperConfig(data=str(files.data), index=str(files.index))).save(self._config)

    def _base(self) -> Path:
        rng, raw, layer = random.Random(0), self._directory / "raw", self._directory / "base.obd"
        for at in range(0, SIZE, 256 * 1024):
            if rng.random() < 0.6:
                self.model[at : at + 65536] = rng.randbytes(65536)
        raw.write_bytes(self.model)
        import_disk(raw, layer, Packing(), kind="raw")
        return layer

    def run(self, todo: Sequence[Operation]) -> None:
        """Do it all. Raises WrongBytesError, OSError or DeviceError with the number of the operation."""
        try:
            self._attach()
            for number, operation in enumerate(todo):
                try:
                    getattr(self, operation.name)(operation)
                except (AssertionError, OSError, DeviceError) as error:
                    raise WrongBytesError(
                        f"operation {number}, {operation}: {type(error).__name__}: {error}"
                    ) from error
            self._check(0, len(self.model))
            self.reattach(None)
            self._check(0, len(self.model))
            self._detach()
            with open_image(ImageConfig.load(self._config), Settings()) as image:
                if image.read_at(0, image.size) != self.model:
                    raise WrongBytesError("the layers, read by the library after all operations")
        finally:
            if self._fd >= 0:
                os.close(self._fd)
            clean_up(self._service, force=True)

    def _attach(self) -> None:
        for _ in range(3):  # a busy machine may be late with it
            with suppress(DeviceError):
                self._service.start_host()
                break
        device = self._service.attach(self._config, "torture")
        self._fd = os.open(device.path, os.O_RDWR | os.O_DIRECT)

    def _detach(self) -> None:
        os.close(self._fd)
        self._fd = -1
        self._service.detach("torture")

    def _range(self, operation: Operation) -> tuple[int, int]:
        offset = operation.offset % len(self.model)
        return offset, min(operation.length, len(self.model) - offset)

    def _check(self, offset: int, length: int) -> None:
        with mmap.mmap(-1, length) as aligned:
            got = os.preadv(self._fd, [aligned], offset)
            wanted = self.model[offset : offset + length]
            if got != length or aligned[:] != wanted:
                wrong = next(
                    at for at in range(0, length, SECTOR) if aligned[at : at + SECTOR] != wanted[at : at + SECTOR]
                )
                raise WrongBytesError(f"the sector at {offset + wrong}")

    def write(self, operation: Operation) -> None:
        offset, length = self._range(operation)
        data = random.Random(operation.seed).randbytes(length)
        with mmap.mmap(-1, length) as aligned:
            aligned[:] = data
            assert os.pwritev(self._fd, [aligned], offset) == length
        self.model[offset : offset + length] = data
        self._check(offset, length)

    def read(self, operation: Operation) -> None:
        self._check(*self._range(operation))

    def discard(self, operation: Operation, request: int = BLKDISCARD) -> None:
        offset, length = self._range(operation)
        fcntl.ioctl(self._fd, request, struct.pack("=QQ", offset, length))
        self.model[offset : offset + length] = bytes(length)
        self._check(offset, length)

    def zero(self, operation: Operation) -> None:
        self.discard(operation, BLKZEROOUT)

    def flush(self, _: Operation) -> None:
        os.fsync(self._fd)

    def _server(self) -> int:
        found: list[DeviceRecord] = []

        def is_there() -> bool:
            record = DeviceRecord.load(self._service.run_dir.device("torture"))
            found[:] = [record] if record is not None and record.process.alive else []
            return bool(found)

        until(is_there)
        return found[0].pid

    def kill(self, operation: Operation) -> None:
        kill(self._server())
        self.read(operation)

    @contextmanager
    def _killed_meanwhile(self, operation: Operation) -> Iterator[None]:
        def kill_soon() -> None:
            time.sleep(operation.seed % 1000 / 1e5)
            kill(server)

        server = self._server()
        thread = threading.Thread(target=kill_soon)
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def kill_while_writing(self, operation: Operation) -> None:
        with self._killed_meanwhile(operation):
            for seed in range(operation.seed, operation.seed + 8):
                self.write(Operation("write", operation.offset + seed % 97 * SECTOR, operation.length, seed))

    def reattach(self, _: Operation | None) -> None:
        self._detach()
        self._attach()

    def die_for_good(self, operation: Operation) -> None:
        """Without its keeper nothing goes on; what was answered is there for the next one."""
        os.close(self._fd)
        self._fd = -1
        self._server()
        kill_for_good(self._service.list()[0])
        self._attach()
        self.read(operation)

    def upgrade(self, operation: Operation) -> None:
        assert self._service.upgrade("torture", force=True)
        self.read(operation)

    @property
    def _live(self) -> LiveDevice:
        self._server()
        return LiveDevice(self._service, "torture")

    def snapshot(self, operation: Operation) -> None:
        if self._layers > 40:
            return
        self._layers += 1
        kind = KINDS[operation.seed % 2]
        files = Files.named(self._directory, kind, f"layer{self._layers}")
        fresh = make_next(self._config, files.data, files.index if kind == "append" else None)
        path = self._directory / f"new{self._layers}.json"
        fresh.save(path)
        self._live.snapshot(path)
        self.read(operation)

    def kill_while_snapshotting(self, operation: Operation) -> None:
        with self._killed_meanwhile(operation), suppress(DeviceError):
            self.snapshot(operation)
        self._server()
        self._check(0, len(self.model))

    def collect(self, operation: Operation) -> None:
        self._live.collect()
        self.read(operation)

    def kill_while_collecting(self, operation: Operation) -> None:
        with self._killed_meanwhile(operation), suppress(DeviceError):
            self.collect(operation)
        self._check(0, len(self.model))

    def grow(self, operation: Operation) -> None:
        size = min(MOST, len(self.model) + operation.length // 4096 * 4096)
        if size == len(self.model):
            return
        self._live.resize(size)
        (seen,) = struct.unpack("=Q", fcntl.ioctl(self._fd, BLKGETSIZE64, bytes(8)))
        assert seen == size
        before = len(self.model)
        self.model.extend(bytes(size - before))
        self._check(before, size - before)


def torture(directory: Path, kind: str, *, lowers: bool, seed: int, count: int) -> None:
    """Run a seed's operations; raises WrongBytesError with the fewest of them that still go wrong."""

    def failure_of(todo: Sequence[Operation]) -> Exception | None:
        with tempfile.TemporaryDirectory(dir=directory) as fresh:
            try:
                Torture(Path(fresh).resolve(), kind, lowers=lowers).run(todo)
            except (AssertionError, OSError, DeviceError) as error:
                return error
        return None

    todo = operations(seed, count)
    failure = failure_of(todo)
    if failure is not None:
        print(f"{failure}; looking for what of it is needed", file=sys.stderr, flush=True)
        fewest = shrink(todo, lambda fewer: failure_of(fewer) is not None, tries=60)
        lines = "\n".join(map(str, fewest))
        raise WrongBytesError(
            f"{kind}, lowers={lowers}, seed {seed}: {failure}; as few as these do:\n{lines}"
        ) from failure


def shrink(todo: Sequence[Operation], fails: Callable[[Sequence[Operation]], bool], *, tries: int) -> list[Operation]:
    """Leave out operations while it still fails, ever smaller pieces; ``tries`` runs at most."""
    kept, piece = list(todo), len(todo) // 2
    while piece and tries:
        at = 0
        while at < len(kept) and tries:
            fewer = kept[:at] + kept[at + piece :]
            tries -= 1
            if fails(fewer):
                kept = fewer
            else:
                at += piece
        piece //= 2
    return kept


def main() -> None:
    """Run seeds until one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default="append")
    parser.add_argument("--lowers", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(args.seed, args.seed + args.seeds):
            torture(Path(directory), args.kind, lowers=args.lowers, seed=seed, count=args.count)
            print(f"{args.kind}, lowers={args.lowers}, seed {seed}: {args.count} operations", flush=True)


if __name__ == "__main__":
    main()
