"""What is asked of the loop driver and what its errors mean, over a simulated driver."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from obdlab.devices import loop
from obdlab.errors import DeviceError
from obdlab.system import abi

GET_FREE, CONFIGURE, CLEAR, STATUS = 0x4C82, 0x4C0A, 0x4C01, 0x4C05
CHANGE, SET_CAPACITY, SET_READ_ONLY = 0x4C06, 0x4C07, 0x125D
READ_ONLY, AUTOCLEAR, DIRECT = 1, 4, 16
BACKING = 77


@dataclass
class Attached:
    """What the driver knows of a device."""

    label: bytes
    flags: int = 0
    block_size: int = 512
    fd: int = BACKING


class Driver:
    """The loop driver: nodes are files of a directory, and requests are noted as (device, request, argument)."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.attached: dict[str, Attached] = {}
        self.calls: list[tuple[str, int, object]] = []
        self.failures: dict[int, list[int]] = {}
        self.modes: list[tuple[str, int]] = []
        self.free = 3
        self.slept: list[float] = []
        (directory / "sys").mkdir()
        (directory / "loop-control").touch()
        self._open = os.open
        self._mknod = os.mknod
        self._exists = Path.exists
        clock = SimpleNamespace(monotonic=lambda: 100 + sum(self.slept), sleep=self.slept.append)
        monkeypatch.setattr(loop, "time", clock)
        monkeypatch.setattr(loop, "_CONTROL", str(directory / "loop-control"))
        monkeypatch.setattr(loop, "_SYS_BLOCK", directory / "sys")
        monkeypatch.setattr(fcntl, "ioctl", self._ioctl)
        monkeypatch.setattr(os, "open", self._open_here)
        monkeypatch.setattr(Path, "exists", lambda path: self._exists(self._here(path)))
        self.add(3)

    def add(self, number: int, label: bytes | None = None) -> Path:
        """Make a node; with a label the device is attached."""
        name = f"loop{number}"
        (self.directory / name).touch()
        (self.directory / "sys" / name / "queue").mkdir(parents=True, exist_ok=True)
        if label is not None:
            self.attached[name] = Attached(label)
            (self.directory / "sys" / name / "loop").mkdir()
        return Path("/dev") / name

    def _here(self, path: Path) -> Path:
        return self.directory / path.name if str(path).startswith("/dev/loop") else path

    def _open_here(self, path: str | Path, flags: int, *rest: int, **options: int) -> int:
        if str(path).startswith("/dev/loop"):
            assert flags & os.O_CLOEXEC
            self.modes.append((Path(path).name, flags & ~os.O_CLOEXEC))
        return self._open(self._here(Path(path)), flags, *rest, **options)

    def _ioctl(self, fd: int, request: int, argument: object = 0) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        self.calls.append((name, request, argument))
        if self.failures.get(request):
            code = self.failures[request].pop(0)
            raise OSError(code, os.strerror(code))
        if request == GET_FREE:
            assert name == "loop-control"
            return self.free
        if request == CONFIGURE:
            assert isinstance(argument, abi.LoopConfig)
            info = argument.info
            self.attached[name] = Attached(info.lo_file_name, info.lo_flags, argument.block_size, argument.fd)
            (self.directory / "sys" / name / "loop").mkdir(exist_ok=True)
        elif request == STATUS:
            if name not in self.attached:
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            assert isinstance(argument, abi.LoopInfo64)
            argument.lo_file_name = self.attached[name].label
        elif request == CLEAR:
            del self.attached[name]
            (self.directory / "sys" / name / "loop").rmdir()
        return 0

    def requests(self) -> list[tuple[str, int]]:
        return [(name, request) for name, request, _ in self.calls]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(tmp_path, monkeypatch)


def attach(**options: object) -> Path:
    return loop.attach(BACKING, label="ours", **({"read_only": True} | options))  # type: ignore[arg-type]


def test_a_device_is_configured_in_one_step_and_closed(driver: Driver) -> None:
    before = os.listdir("/proc/self/fd")
    assert attach(readahead_kib=96) == Path("/dev/loop3")
    assert driver.attached == {"loop3": Attached(b"ours", READ_ONLY | DIRECT)}
    assert driver.requests() == [("loop-control", GET_FREE), ("loop3", CONFIGURE)]
    assert driver.modes == [("loop3", os.O_RDONLY)]
    assert (driver.directory / "sys/loop3/queue/read_ahead_kb").read_text() == "96"
    assert os.listdir("/proc/self/fd") == before


def test_a_writable_device_is_made_writable_first(driver: Driver) -> None:
    attach(read_only=False, direct_io=False, sector_size=4096)
    assert driver.attached == {"loop3": Attached(b"ours", 0, 4096)}
    assert [(name, request) for name, request, _ in driver.calls[1:]] == [
        ("loop3", SET_READ_ONLY),
        ("loop3", CONFIGURE),
    ]
    assert driver.calls[1][2] == bytes(4)
    assert driver.modes[-1] == ("loop3", os.O_RDWR)


def test_a_device_that_goes_with_its_last_user_stays_open(driver: Driver) -> None:
    device, opened = loop.attach_while_open(BACKING, label="below", sector_size=4096)
    try:
        assert driver.attached == {"loop3": Attached(b"below", READ_ONLY | DIRECT | AUTOCLEAR, 4096)}
        assert (device.name, Path(os.readlink(f"/proc/self/fd/{opened}")).name) == ("loop3", "loop3")
    finally:
        os.close(opened)


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENXIO, errno.ENOENT, errno.EAGAIN], ids=os.strerror)
def test_a_device_lost_to_another_process_is_given_up_for_the_next(driver: Driver, code: int) -> None:
    driver.failures[CONFIGURE] = [code, code]
    before = os.listdir("/proc/self/fd")
    assert attach() == Path("/dev/loop3")
    assert driver.requests() == [("loop-control", GET_FREE), ("loop3", CONFIGURE)] * 3
    assert len(driver.slept) == 2
    assert max(driver.slept) < 0.1
    assert os.listdir("/proc/self/fd") == before


def test_a_race_that_does_not_end_is_an_error_in_time(driver: Driver) -> None:
    driver.failures[CONFIGURE] = [errno.EBUSY] * 10_000
    with pytest.raises(DeviceError, match="/dev/loop3: cannot attach ours: Device or resource busy"):
        attach(timeout_s=1.0)
    assert sum(driver.slept) == pytest.approx(1.0, abs=0.01)


def test_other_errors_end_at_once(driver: Driver) -> None:
    driver.failures[CONFIGURE] = [errno.EINVAL]
    before = os.listdir("/proc/self/fd")
    with pytest.raises(DeviceError, match="/dev/loop3: cannot attach ours: Invalid argument"):
        attach()
    assert driver.slept == []
    assert os.listdir("/proc/self/fd") == before
    driver.failures[GET_FREE] = [errno.ENOSPC]
    with pytest.raises(DeviceError, match="loop-control: no free loop device: No space left on device"):
        attach()
    assert os.listdir("/proc/self/fd") == before


def test_a_node_that_is_missing_is_made(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Path, int, int]] = []

    def mknod(path: Path, mode: int, device: int) -> None:
        made.append((path, mode, device))
        driver.add(5)
        raise FileExistsError  # another process was faster

    monkeypatch.setattr(os, "mknod", mknod)
    attach()
    assert made == []
    driver.free = 5
    assert attach() == Path("/dev/loop5")
    assert made == [(Path("/dev/loop5"), stat.S_IFBLK | 0o660, os.makedev(7, 5))]


def test_a_read_only_sys_keeps_its_readahead(driver: Driver) -> None:
    (driver.directory / "sys/loop3/queue").rmdir()
    assert attach() == Path("/dev/loop3")


def test_a_new_size_is_taken_on_after_the_attributes_are_read(driver: Driver) -> None:
    device = driver.add(4, b"ours")
    before = os.listdir("/proc/self/fd")
    loop.update_size(device)
    assert driver.requests() == [("loop4", STATUS), ("loop4", SET_CAPACITY)]
    driver.failures[SET_CAPACITY] = [errno.EBUSY]
    with pytest.raises(DeviceError, match="/dev/loop4: cannot take on the new size: Device or resource busy"):
        loop.update_size(device)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("size", "fits"), [(4095, False), (4096, True), (8192, True)])
def test_a_blob_is_as_large_as_the_device_that_it_is_put_behind(driver: Driver, size: int, fits: bool) -> None:
    (driver.directory / "sys/loop3/size").write_text("8\n")
    if fits:
        loop.check_size(Path("/dev/loop3"), size, "blob")
        return
    with pytest.raises(
        DeviceError, match=r"blob: smaller than its device /dev/loop3 \(got 4095 bytes, wanted 4096\)"
    ):
        loop.check_size(Path("/dev/loop3"), size, "blob")


def test_a_device_that_is_gone_has_no_size(driver: Driver) -> None:
    with pytest.raises(DeviceError, match="/dev/loop9: no such device: No such file or directory"):
        loop.check_size(Path("/dev/loop9"), 0, "blob")


def test_labels(driver: Driver) -> None:
    one, two, other = driver.add(11, b"ours:1"), driver.add(7, b"ours:2"), driver.add(8, b"theirs")
    assert loop.label_of(one) == "ours:1"
    assert loop.label_of(Path("/dev/loop3")) == ""
    assert driver.modes == [("loop11", os.O_RDONLY)]  # a device without a file is not opened
    assert loop.labelled("ours") == [one, two]
    assert loop.labelled("ours:2") == [two]
    assert loop.labelled("") == [one, Path("/dev/loop3"), two, other]
    before = os.listdir("/proc/self/fd")
    driver.failures[STATUS] = [errno.EIO]
    assert loop.label_of(one) == ""
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("code", "used"), [(errno.EBUSY, True), (errno.ENXIO, False), (errno.ENOENT, False)])
def test_a_device_that_others_claim_is_in_use(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, code: int, used: bool
) -> None:
    before = os.listdir("/proc/self/fd")
    assert not loop.in_use(Path("/dev/loop3"))
    assert driver.modes == [("loop3", os.O_RDONLY | os.O_EXCL)]
    assert os.listdir("/proc/self/fd") == before

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    assert loop.in_use(Path("/dev/loop3")) is used


def test_only_the_device_of_the_label_is_detached(driver: Driver) -> None:
    device = driver.add(4, b"ours")
    loop.detach(device, label="theirs")
    loop.detach_when_unused(device, label="theirs")
    assert CLEAR not in [request for _, request, _ in driver.calls]
    loop.detach(device, label="ours")
    assert driver.attached == {}
    assert driver.slept == []
    loop.detach(device, label="ours")
    driver.add(5, b"ours")
    loop.detach_when_unused(Path("/dev/loop5"), label="ours")
    assert driver.attached == {}


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EAGAIN], ids=os.strerror)
def test_detaching_goes_on_while_the_driver_is_busy(driver: Driver, code: int) -> None:
    device = driver.add(4, b"ours")
    driver.failures[CLEAR] = [code] * 3
    loop.detach(device, label="ours", timeout_s=60)
    assert driver.attached == {}
    assert len(driver.slept) == 3
    assert max(driver.slept) < 0.1


def test_a_device_that_stays_in_use_is_an_error_in_time(driver: Driver) -> None:
    device = driver.add(4, b"ours")
    driver.failures[CLEAR] = [errno.EBUSY] * 10_000
    with pytest.raises(DeviceError, match=r"/dev/loop4: still in use 2\.5 s after it was told to detach"):
        loop.detach(device, label="ours", timeout_s=2.5)
    assert sum(driver.slept) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("code", [errno.ENXIO, errno.ENOENT], ids=os.strerror)
def test_a_device_that_is_gone_meanwhile_is_detached(driver: Driver, code: int) -> None:
    device = driver.add(4, b"ours")
    driver.failures[CLEAR] = [code, code]
    loop.detach(device, label="ours")
    loop.detach_when_unused(device, label="ours")
    assert driver.slept == []
    assert driver.failures[CLEAR] == []


def test_other_errors_of_detaching_are_told(driver: Driver) -> None:
    device = driver.add(4, b"ours")
    driver.failures[CLEAR] = [errno.EPERM, errno.EPERM]
    before = os.listdir("/proc/self/fd")
    for detach in (loop.detach, loop.detach_when_unused):
        with pytest.raises(DeviceError, match="/dev/loop4: cannot detach: Operation not permitted"):
            detach(device, label="ours")
    assert os.listdir("/proc/self/fd") == before
