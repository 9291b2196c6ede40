"""What every kind of block device must do. A kind's test derives from DeviceContract and says how to make one."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import struct
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.blob import MemoryBlob
from obdlab.errors import DeviceError
from obdlab.system import mount
from tests.devices.blobs import Gated, MemoryWritable, Short, Troubled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.blob import Blob
    from obdlab.devices.device import Device

MIB = 1 << 20
#: How kinds say that a device is read-only: to who opens it for writing, or to who writes.
REFUSED = (errno.EPERM, errno.EACCES, errno.EROFS)
#: How kinds say that the device failed; a SCSI disk that its medium did.
FAILED = (errno.EIO, errno.ENODATA)
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F
BLKGETSIZE64 = 0x80081272


def read_direct(path: Path, offset: int, length: int) -> bytes:
    """Read past the page cache; offset and length are multiples of 4096."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as aligned:
            assert os.preadv(fd, [aligned], offset) == length
            return aligned[:]
    finally:
        os.close(fd)


def write_direct(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as aligned:
            aligned[:] = data
            assert os.pwritev(fd, [aligned], offset) == len(data)
    finally:
        os.close(fd)


def stop_patiently(device: Device) -> None:
    """Stop a device; others on this machine may have copied its mounts with a mount namespace of theirs."""
    deadline = time.monotonic() + 60
    while True:
        try:
            device.stop()
        except DeviceError as error:
            if "another mount namespace" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.mark.kernel
class DeviceContract(ABC):
    #: Whether a device of the kind takes on the size of a blob that has grown.
    grows = True

    @abstractmethod
    def make(self, blob: Blob, directory: Path, **options: object) -> Device:
        """Make a device of the kind under test."""

    @abstractmethod
    def leftovers(self, directory: Path) -> list[str]:
        """Name what is left of a device in the kernel."""

    @contextmanager
    def device(self, blob: Blob, directory: Path, **options: object) -> Iterator[Device]:
        device = self.make(blob, directory, **options)
        try:
            yield device
        finally:
            stop_patiently(device)
            assert self.leftovers(directory) == []

    def test_size_and_bytes(self, tmp_path: Path) -> None:
        data = random.Random(1).randbytes(5 * MIB + 512)
        with self.device(MemoryBlob(data), tmp_path) as device:
            fd = os.open(device.path, os.O_RDONLY)
            try:
                answer = fcntl.ioctl(fd, BLKGETSIZE64, bytes(8))
                assert struct.unpack("=Q", answer)[0] == device.size == len(data)
                assert os.pread(fd, len(data), 0) == data
                for offset, length in ((1, 1), (511, 2), (4095, 4098), (MIB - 7, 2 * MIB), (len(data) - 3, 3)):
                    assert os.pread(fd, length, offset) == data[offset : offset + length]
                assert os.pread(fd, 100, len(data)) == b""
            finally:
                os.close(fd)
            assert read_direct(device.path, 4 * MIB, MIB) == data[4 * MIB : 5 * MIB]

    def test_sectors_of_4096(self, tmp_path: Path) -> None:
        data = random.Random(2).randbytes(MIB)
        with self.device(MemoryBlob(data), tmp_path, sector_size=4096) as device:
            assert device.path.read_bytes() == data
        with pytest.raises(DeviceError, match="4096-byte sectors"):
            self.make(MemoryBlob(bytes(4096 + 512)), tmp_path, sector_size=4096)
        assert self.leftovers(tmp_path) == []

    @pytest.mark.parametrize("size", [0, 1, 511, 513])
    def test_refuses_sizes_that_are_no_sectors(self, tmp_path: Path, size: int) -> None:
        with pytest.raises(DeviceError, match=f"got {size} bytes"):
            self.make(MemoryBlob(bytes(size)), tmp_path)
        assert self.leftovers(tmp_path) == []

    def test_read_only_refuses_writes(self, tmp_path: Path) -> None:
        with self.device(MemoryBlob(bytes(MIB)), tmp_path) as device:
            assert device.read_only
            with pytest.raises(OSError) as caught:
                write_direct(device.path, 0, bytes(4096))
            assert caught.value.errno in REFUSED, caught.value

    def test_writable_blob_can_be_served_read_only(self, tmp_path: Path) -> None:
        blob = MemoryWritable(MIB)
        with self.device(blob, tmp_path, read_only=True) as device:
            assert device.read_only
            with pytest.raises(OSError) as caught:
                write_direct(device.path, 0, b"x" * 4096)
            assert caught.value.errno in REFUSED, caught.value
        assert blob.data == bytes(MIB)

    def test_writes_against_a_model(self, tmp_path: Path) -> None:
        blob, rng = MemoryWritable(8 * MIB), random.Random(3)
        model = bytearray(blob.size)
        with self.device(blob, tmp_path) as device:
            assert not device.read_only
            for _ in range(60):
                length = rng.choice((4096, 8192, 65536, MIB + 4096, 2 * MIB))
                offset = rng.randrange(0, blob.size - length, 4096)
                data = rng.randbytes(length)
                write_direct(device.path, offset, data)
                model[offset : offset + length] = data
            assert blob.data == model
            assert read_direct(device.path, 0, blob.size) == model
            assert device.statistics().written_bytes > 0

    def test_buffered_writes_arrive_at_fsync(self, tmp_path: Path) -> None:
        blob = MemoryWritable(4 * MIB)
        with self.device(blob, tmp_path) as device:
            fd = os.open(device.path, os.O_RDWR)
            try:
                os.pwrite(fd, b"unaligned", 4093)
                os.pwrite(fd, b"Z" * 3 * MIB, 12345)
                os.fsync(fd)
                assert blob.data[4093:4102] == b"unaligned"
                assert blob.data[12345 : 12345 + 3 * MIB] == b"Z" * 3 * MIB
                assert blob.flushes > 0
            finally:
                os.close(fd)

    @pytest.mark.parametrize("request_number", [BLKDISCARD, BLKZEROOUT])
    def test_discard_and_zeroing_read_as_zeros(self, tmp_path: Path, request_number: int) -> None:
        blob = MemoryWritable(4 * MIB)
        blob.data[:] = b"x" * blob.size
        with self.device(blob, tmp_path) as device:
            fd = os.open(device.path, os.O_RDWR)
            try:
                fcntl.ioctl(fd, request_number, struct.pack("=QQ", MIB, 2 * MIB))
            finally:
                os.close(fd)
            assert read_direct(device.path, MIB, 2 * MIB) == bytes(2 * MIB)
        assert blob.data == b"x" * MIB + bytes(2 * MIB) + b"x" * MIB

    def test_growing_while_in_use(self, tmp_path: Path) -> None:
        blob = MemoryWritable(4 * MIB)
        with self.device(blob, tmp_path) as device:
            fd = os.open(device.path, os.O_RDWR)
            try:
                os.pwrite(fd, b"before", 4 * MIB - 6)
                blob.data.extend(bytes(5 * MIB))
                if not self.grows:
                    with pytest.raises(DeviceError, match="cannot grow"):
                        device.take_on_size()
                    return
                device.take_on_size()
                assert device.size == 9 * MIB
                (size,) = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
                assert size == 9 * MIB
                os.pwrite(fd, b"after", 9 * MIB - 5)
                os.fsync(fd)
            finally:
                os.close(fd)
            assert read_direct(device.path, 4 * MIB - 4096, 8192) == bytes(4090) + b"before" + bytes(4096)
        assert blob.data[-5:] == b"after"

    def test_concurrent_readers(self, tmp_path: Path) -> None:
        data = random.Random(4).randbytes(8 * MIB)
        with self.device(MemoryBlob(data), tmp_path) as device:

            def read(seed: int) -> bool:
                rng = random.Random(seed)
                for _ in range(50):
                    length = rng.choice((4096, 65536, MIB))
                    offset = rng.randrange(0, len(data) - length, 4096)
                    if read_direct(device.path, offset, length) != data[offset : offset + length]:
                        return False
                return True

            with ThreadPoolExecutor(8) as pool:
                assert all(pool.map(read, range(8)))

    @pytest.mark.parametrize("error", [None, OSError(errno.ENOMEM, "no memory"), KeyError("a bug"), MemoryError()])
    def test_a_failing_range_gives_eio_and_others_go_on(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception | None
    ) -> None:
        data = random.Random(5).randbytes(MIB)
        blob = Troubled(data, at=512 * 1024, error=error)
        with self.device(blob, tmp_path, name="dev7") as device:
            for _ in range(2):
                with pytest.raises(OSError) as caught:
                    read_direct(device.path, 512 * 1024, 4096)
                assert caught.value.errno in FAILED, caught.value
                assert read_direct(device.path, 0, 512 * 1024) == data[: 512 * 1024]
            assert device.statistics().errors >= 2
            cause = str(blob.error)
            assert cause in device.statistics().last_error
            assert any("dev7" in message and "524288" in message and cause in message for message in caplog.messages)
            blob.error = None
            assert read_direct(device.path, 0, MIB) == data

    def test_a_blob_that_returns_too_little_gives_eio(self, tmp_path: Path) -> None:
        with (
            self.device(Short(bytes(MIB)), tmp_path) as device,
            pytest.raises(OSError) as caught,
        ):
            read_direct(device.path, 0, 4096)
        assert caught.value.errno in FAILED, caught.value

    def test_waiting_reads_do_not_hold_up_others(self, tmp_path: Path) -> None:
        data = random.Random(6).randbytes(2 * MIB)
        blob = Gated(data, at=MIB)
        waits = 6
        with self.device(blob, tmp_path, max_threads=waits + 1) as device, ThreadPoolExecutor(waits) as pool:
            try:
                slow = [pool.submit(read_direct, device.path, MIB + n * 65536, 4096) for n in range(waits)]
                for _ in range(waits):
                    assert blob.waiting.acquire(timeout=30)
                assert read_direct(device.path, 0, MIB) == data[:MIB]
                assert not any(future.done() for future in slow)
            finally:
                blob.gate.set()
            for n, future in enumerate(slow):
                assert future.result(30) == data[MIB + n * 65536 :][:4096]

    def test_more_waits_than_threads_all_end(self, tmp_path: Path) -> None:
        data = random.Random(7).randbytes(2 * MIB)
        blob = Gated(data, at=MIB)
        with self.device(blob, tmp_path, max_threads=3) as device, ThreadPoolExecutor(12) as pool:
            slow = [pool.submit(read_direct, device.path, MIB + n * 65536, 4096) for n in range(12)]
            try:
                for _ in range(3):
                    assert blob.waiting.acquire(timeout=30)
            finally:
                threading.Timer(0.2, blob.gate.set).start()
            for n, future in enumerate(slow):
                assert future.result(30) == data[MIB + n * 65536 :][:4096]
            assert read_direct(device.path, 0, MIB) == data[:MIB]

    def test_ext4_read_write(self, tmp_path: Path) -> None:
        blob = MemoryWritable(32 * MIB)
        target = tmp_path / "mnt"
        target.mkdir()
        content = random.Random(8).randbytes(3 * MIB)
        with self.device(blob, tmp_path) as device:
            subprocess.run(["mkfs.ext4", "-q", device.path], check=True, capture_output=True)
            assert mount.mount(device.path, target, read_only=False) == "ext4"
            try:
                (target / "file").write_bytes(content)
                (target / "gone").write_bytes(content)
                (target / "gone").unlink()
                os.link(target / "file", target / "link")
                with pytest.raises(DeviceError, match=f"mounted on {target}"):
                    device.stop()
            finally:
                mount.unmount(target)
        with self.device(MemoryBlob(blob.data), tmp_path) as device:
            subprocess.run(["e2fsck", "-fn", device.path], check=True, capture_output=True)
            mount.mount(device.path, target, read_only=True)
            try:
                assert (target / "file").read_bytes() == content
                assert (target / "link").stat().st_nlink == 2
                assert not (target / "gone").exists()
                with pytest.raises(OSError):
                    (target / "new").write_bytes(b"")
            finally:
                mount.unmount(target)

    def test_many_devices_come_and_go(self, tmp_path: Path) -> None:
        def one(number: int) -> bool:
            data = bytes([number]) * 65536
            directory = tmp_path / str(number)
            with self.device(MemoryBlob(data), directory) as device:
                return read_direct(device.path, 0, 65536) == data

        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(one, range(18)))

    @pytest.mark.slow
    @pytest.mark.timeout(1500)
    @pytest.mark.parametrize("quarter", range(4))
    def test_a_thousand_rounds(self, tmp_path: Path, quarter: int) -> None:
        threads = threading.active_count()
        files = len(os.listdir("/proc/self/fd"))
        for number in range(quarter * 250, (quarter + 1) * 250):
            data = number.to_bytes(4, "big") * 1024
            with self.device(MemoryBlob(data), tmp_path) as device:
                assert read_direct(device.path, 0, 4096) == data
        assert threading.active_count() <= threads + 1
        assert len(os.listdir("/proc/self/fd")) <= files + 1
