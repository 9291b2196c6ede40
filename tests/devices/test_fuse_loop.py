"""FUSE file under a loop device: the contract, and what is special about this kind."""

from __future__ import annotations

import errno
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from obdlab.blob import Blob, MemoryBlob
from obdlab.devices import loop
from obdlab.devices.device import Device
from obdlab.devices.fuse import FuseServer
from obdlab.devices.fuse_loop import KIND, FuseLoopDevice, devices_of, take_down
from obdlab.devices.kind import Place
from obdlab.errors import DeviceError
from obdlab.system import mount
from tests.devices.blobs import Gated, MemoryWritable
from tests.devices.contract import MIB, DeviceContract, read_direct, stop_patiently
from tests.devices.simulated import Connection


class TestFuseLoopDevice(DeviceContract):
    def make(self, blob: Blob, directory: Path, **options: Any) -> Device:
        return FuseLoopDevice(blob, directory, **options)

    def leftovers(self, directory: Path) -> list[str]:
        return [str(path) for path in devices_of(directory)]

    def test_hits_need_one_thread(self, tmp_path: Path) -> None:
        with self.device(MemoryBlob(bytes(MIB)), tmp_path) as device:
            for _ in range(20):
                read_direct(device.path, 0, MIB)
            assert device.statistics().threads == 1

    def test_a_hit_never_waits_behind_misses(self, tmp_path: Path) -> None:
        # As many as a loop device has under way at a time, one of them left for the hit. None beside another: the
        # kernel may make one of two that wait in its queue.
        data = random.Random(9).randbytes(2 * MIB)
        blob, waits, step = Gated(data, at=MIB // 2), 127, 8192
        with self.device(blob, tmp_path) as device, ThreadPoolExecutor(waits) as pool:
            try:
                slow = [pool.submit(read_direct, device.path, MIB // 2 + n * step, 4096) for n in range(waits)]
                for _ in range(waits):
                    assert blob.waiting.acquire(timeout=60)
                assert read_direct(device.path, 0, 65536) == data[:65536]
                assert not any(future.done() for future in slow)
            finally:
                blob.gate.set()
            for n, future in enumerate(slow):
                assert future.result(60) == data[MIB // 2 + n * step :][:4096]

    def test_reads_past_the_page_cache_of_the_served_file(self, tmp_path: Path) -> None:
        # A changed blob is seen at once by direct reads: nothing between it and the loop device keeps a copy.
        blob = MemoryWritable(MIB)
        with self.device(blob, tmp_path) as device:
            assert read_direct(device.path, 0, 4096) == bytes(4096)
            blob.data[0] = 7
            assert read_direct(device.path, 0, 4096)[0] == 7

    def test_stop_twice(self, tmp_path: Path) -> None:
        device = self.make(MemoryBlob(bytes(MIB)), tmp_path)
        device.stop()
        device.stop()
        assert device.wait(0)

    def test_take_down_by_another_hand(self, tmp_path: Path) -> None:
        device = self.make(MemoryBlob(bytes(MIB)), tmp_path)
        take_down(tmp_path)
        assert device.wait(60)
        assert self.leftovers(tmp_path) == []
        take_down(tmp_path)

    def test_a_device_that_cannot_be_made_leaves_nothing_open(self, tmp_path: Path) -> None:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(DeviceError, match="cannot attach"):
            FuseLoopDevice(MemoryBlob(bytes(MIB)), tmp_path, sector_size=256)  # the kernel wants 512 at least
        assert os.listdir("/proc/self/fd") == before
        assert not [thread for thread in threading.enumerate() if thread.name == "fuse"]

    def test_readahead_is_set(self, tmp_path: Path) -> None:
        with self.device(MemoryBlob(bytes(MIB)), tmp_path, readahead_kib=384) as device:
            assert Path(f"/sys/block/{device.path.name}/queue/read_ahead_kb").read_text() == "384\n"

    def test_direct_io_is_on(self, tmp_path: Path) -> None:
        with self.device(MemoryBlob(bytes(MIB)), tmp_path) as device:
            assert Path(f"/sys/block/{device.path.name}/loop/dio").read_text() == "1\n"

    def test_only_an_exchangeable_read_only_device_has_another_below(self, tmp_path: Path) -> None:
        for blob, exchangeable in ((MemoryBlob(bytes(MIB)), False), (MemoryWritable(MIB), True)):
            with self.device(blob, tmp_path, exchangeable=exchangeable) as device:
                assert loop.backing_of(device.path).endswith("/disk")
        with self.device(MemoryBlob(bytes(MIB)), tmp_path, exchangeable=True) as device:
            assert loop.backing_of(device.path).startswith("/dev/loop")
        device = KIND.open(MemoryBlob(bytes(MIB)), Place(tmp_path, connection=KIND.connect()))
        try:
            assert loop.backing_of(device.path).endswith("/disk")
        finally:
            stop_patiently(device)

    def test_a_used_device_is_taken_from_its_users_only_by_force(self, tmp_path: Path) -> None:
        device = self.make(MemoryBlob(bytes(MIB)), tmp_path)
        with device.path.open("rb"):
            with pytest.raises(DeviceError, match="still in use"):
                take_down(tmp_path, timeout_s=0.1)
            take_down(tmp_path, timeout_s=0.1, force=True)
        assert device.wait(60)
        assert self.leftovers(tmp_path) == []

    def test_no_mount_is_to_be_seen(self, tmp_path: Path) -> None:
        with self.device(MemoryBlob(bytes(MIB)), tmp_path):
            assert [entry for entry in mount.mounts() if entry.source == "obdlab"] == []


def test_another_process_goes_on_with_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_SYS_BLOCK", tmp_path)
    (tmp_path / "loop7").mkdir()
    (tmp_path / "loop7" / "size").write_text("8\n")
    node, data = Path("/dev/loop7"), random.Random(2).randbytes(4096)
    with Connection() as connection:
        device = FuseLoopDevice(MemoryBlob(data), tmp_path, connection=connection.server, path=node)
        assert device.path == node
        assert device.can_change_servers is True
        assert connection.read(0, 4096) == (0, data)
    assert device.wait(30)
    with pytest.raises(DeviceError, match=r"smaller than its device /dev/loop7 \(got 512 bytes, wanted 4096\)"):
        FuseLoopDevice(MemoryBlob(bytes(512)), tmp_path, connection=-1, path=node)


@pytest.mark.kernel
class TestServedFile:
    """The served file itself, seen through system calls."""

    @pytest.fixture
    def served(self) -> Any:
        blob = MemoryWritable(3 * MIB)
        blob.data[:] = random.Random(1).randbytes(3 * MIB)
        server = FuseServer(blob, name="served")
        root = server.start()
        yield Path(f"/proc/self/fd/{root}"), blob
        os.close(root)
        assert server.wait(60)

    def test_serving_ends_with_the_last_open_file(self) -> None:
        server = FuseServer(MemoryBlob(b"content"), name="served")
        root = server.start()
        disk = server.open_disk(root)
        os.close(root)
        assert os.pread(disk, 100, 0) == b"content"
        assert not server.wait(0.1)
        os.close(disk)
        assert server.wait(60)

    def test_a_read_only_blob_refuses_writers(self) -> None:
        server = FuseServer(MemoryBlob(bytes(512)))
        root = server.start()
        with pytest.raises(OSError) as caught:
            os.open("disk", os.O_RDWR, dir_fd=root)
        assert caught.value.errno == errno.EROFS
        os.close(root)
        assert server.wait(60)

    def test_listing_and_attributes(self, served: Any) -> None:
        root, blob = served
        assert os.listdir(root) == ["disk"]
        status = (root / "disk").stat()
        assert (status.st_size, status.st_nlink, status.st_mode) == (blob.size, 1, 0o100600)
        assert os.statvfs(root).f_bsize == 4096
        with pytest.raises(FileNotFoundError):
            (root / "other").stat()

    def test_what_is_refused(self, served: Any) -> None:
        root, blob = served
        with pytest.raises(OSError):
            (root / "new").write_bytes(b"")
        with pytest.raises(OSError):
            os.truncate((root / "disk"), 1)
        with pytest.raises(OSError):
            os.unlink(root / "disk")
        with pytest.raises(OSError):
            os.setxattr((root / "disk"), "user.x", b"")
        with (root / "disk").open("r+b", buffering=0) as file, pytest.raises(OSError):
            os.posix_fallocate(file.fileno(), 0, blob.size + 4096)
        os.utime((root / "disk"), (1, 1))
        assert (root / "disk").stat().st_size == blob.size

    def test_write_past_the_end_is_an_error(self, served: Any) -> None:
        root, blob = served
        before = bytes(blob.data)
        fd = os.open((root / "disk"), os.O_RDWR)
        try:
            with pytest.raises(OSError):
                os.pwrite(fd, b"x" * 512, blob.size)
        finally:
            os.close(fd)
        assert blob.data == before
