"""A FUSE connection: opening, mounting, notices to the kernel, and the end."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

import pytest

from obdlab.blob import MemoryBlob
from obdlab.devices import fuse
from obdlab.devices.fuse import FuseServer
from obdlab.errors import DeviceError
from obdlab.system import abi
from obdlab.system.abi import FuseOpcode
from tests.devices.blobs import MemoryWritable
from tests.devices.simulated import Connection, joined

DATA = bytes(range(256)) * 32


def test_the_kernel_forgets_the_attributes_of_the_file_and_no_data() -> None:
    with joined(MemoryBlob(DATA)) as (connection, server):
        server.forget_size()
        # Length, code 2 (FUSE_NOTIFY_INVAL_INODE), no request; inode, negative offset: attributes only, length.
        assert connection.notice() == struct.pack("=IiQ", 40, 2, 0) + struct.pack("=Qqq", 2, -1, 0)


def test_the_end_of_a_connection_is_seen_from_its_descriptor() -> None:
    with joined(MemoryBlob(DATA)) as (connection, _):
        another = os.dup(connection.server)
        assert not fuse.has_ended(another)
    try:
        assert fuse.has_ended(another)
    finally:
        os.close(another)


def test_the_kernel_is_told_once_to_hand_out_requests_again() -> None:
    with Connection() as connection:
        another = os.dup(connection.server)
        server = FuseServer(MemoryBlob(DATA))
        server.join(connection.server)
        fuse.send_again(another)
        assert connection.notice() == struct.pack("=IiQ", 16, 7, 0)  # FUSE_NOTIFY_RESEND
    assert server.wait(30)
    os.close(another)


@pytest.mark.parametrize("code", [errno.ENODEV, errno.ECONNABORTED, errno.EPERM])
def test_a_file_system_that_is_gone_hands_out_nothing(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: int, __: bytes) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", gone)
    fuse.send_again(-1)


def test_a_kernel_that_cannot_hand_out_requests_again() -> None:
    read_only = os.open(os.devnull, os.O_RDONLY)
    try:
        with pytest.raises(DeviceError, match="the kernel does not hand out requests again: Bad file descriptor"):
            fuse.send_again(read_only)
    finally:
        os.close(read_only)


def test_a_size_that_the_kernel_does_not_take() -> None:
    with pytest.raises(DeviceError, match="one: cannot tell the kernel of a new size: Bad file descriptor"):
        FuseServer(MemoryBlob(DATA), name="one").forget_size()


def test_a_host_without_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        assert (path, flags) == ("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DeviceError, match="cannot open /dev/fuse: No such file or directory"):
        fuse.open_connection()


class Mounts:
    """Notes how a file system is mounted; refuses it if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refusal: OSError | None = None
        self.seen: tuple[str, dict[str, str | None], int] = ("", {}, 0)
        monkeypatch.setattr(abi, "mount_detached", self._mount)

    def _mount(self, kind: str, options: dict[str, str | None], attributes: int) -> int:
        self.seen = kind, options, attributes
        if self.refusal is not None:
            raise self.refusal
        return 99


@pytest.mark.parametrize("writable", [True, False])
def test_how_the_file_system_is_mounted(writable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = Mounts(monkeypatch)
    with Connection() as connection:
        server = FuseServer(MemoryWritable(8192) if writable else MemoryBlob(DATA))
        descriptor = str(connection.server)
        assert server.start(connection.server) == 99
        assert connection.do(FuseOpcode.STATFS)[0] == 0
    assert server.wait(30)
    ids = {"user_id": str(os.geteuid()), "group_id": str(os.getegid())}
    names = {"source": "obdlab", "subtype": "obdlab", "rootmode": "40000", "allow_other": None}
    options = {"fd": descriptor, "max_read": str(1 << 20)} | ids | names
    nosuid, nodev, noatime, read_only = 2, 4, 0x10, 1
    if writable:
        assert mounts.seen == ("fuse", options, nosuid | nodev | noatime)
    else:
        assert mounts.seen == ("fuse", options | {"ro": None}, nosuid | nodev | noatime | read_only)


def test_a_mount_that_is_refused_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    Mounts(monkeypatch).refusal = OSError(errno.EPERM, os.strerror(errno.EPERM))
    connection = os.open(os.devnull, os.O_RDWR)
    with pytest.raises(DeviceError, match="cannot mount FUSE: Operation not permitted"):
        FuseServer(MemoryBlob(DATA)).start(connection)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(connection)


def test_the_served_file_is_opened_for_writing_only_if_it_is_writable(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(DATA)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for blob, mode in ((MemoryBlob(DATA), os.O_RDONLY), (MemoryWritable(8192), os.O_RDWR)):
            disk = FuseServer(blob).open_disk(directory)
            assert fcntl.fcntl(disk, fcntl.F_GETFL) & os.O_ACCMODE == mode
            assert not os.get_inheritable(disk)
            os.close(disk)
        (tmp_path / "disk").unlink()
        with pytest.raises(DeviceError, match="one: cannot open the served file: No such file"):
            FuseServer(MemoryBlob(DATA), name="one").open_disk(directory)
    finally:
        os.close(directory)


def test_waiting_for_a_server_closes_its_connection_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Connection() as connection:
        server = FuseServer(MemoryBlob(DATA))
        descriptor = connection.server
        server.join(descriptor)
        assert server.wait(0) is False
        os.fstat(descriptor)
    assert server.wait(30) is True
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    closed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "close", closed.append)
        assert server.wait(30) is True
    assert closed == []
