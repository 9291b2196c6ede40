"""Project quotas over a simulated kernel: which ids are given, and what limit the kernel is asked for.

(tests/snapshotter/test_quota.py has the real kernel's file systems, in a virtual machine.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obdlab.snapshotter.errors import FailedPreconditionError, InvalidArgumentError
from obdlab.snapshotter.quota import LABEL_QUOTA, QuotaError, Quotas, parse_size, quota_asked
from obdlab.system import mount

GET, SET = 0x800007, 0x800008
DQBLK = struct.Struct("=QQQQQQQQI4x")
FSXATTR = struct.Struct("=IIIII8s")
PROJINHERIT = 0x200


class Kernel:
    """Limits by project, as ext4 keeps them, and the attributes of directories."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limits: dict[int, tuple[int, ...]] = defaultdict(lambda: (0,) * 8)
        self.attributes: dict[int, bytes] = defaultdict(lambda: FSXATTR.pack(1, 2, 3, 0, 5, b"8 bytes."))
        self.enforced = True
        monkeypatch.setattr(Quotas, "_control", lambda _, *arguments: self._quotactl(*arguments))
        monkeypatch.setattr(Quotas, "_enforced", lambda _: self.enforced)
        monkeypatch.setattr(fcntl, "ioctl", self._ioctl)

    def _quotactl(self, command: int, project: int, buffer: Any) -> None:
        if command == GET:
            buffer.raw = DQBLK.pack(*self.limits[project], 63)
            return
        assert command == SET
        *values, valid = DQBLK.unpack(buffer.raw[: DQBLK.size])
        assert valid == 1  # the limits of blocks, nothing else
        self.limits[project] = (*values[:2], *self.limits[project][2:])

    def _ioctl(self, fd: int, request: int, data: bytes) -> bytes:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        inode = os.fstat(fd).st_ino
        if request == 0x801C581F:
            return self.attributes[inode]
        assert request == 0x401C5820
        self.attributes[inode] = data
        return data


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def directories(parent: Path, name: str) -> list[Path]:
    made = [parent / name / "fs", parent / name / "work"]
    for directory in made:
        directory.mkdir(parents=True)
    return made


@pytest.mark.parametrize("size", [1024, 1025, 4096, 20 << 20, (20 << 20) + 1])
def test_a_limit_holds_the_size_and_less_than_a_block_more(kernel: Kernel, tmp_path: Path, size: int) -> None:
    quotas = Quotas(tmp_path)
    project = quotas.limit(directories(tmp_path, "a"), 1, size)
    hard, soft, *rest = kernel.limits[project]
    assert size <= hard * 1024 < size + 1024
    assert (soft, rest) == (0, [0] * 6)
    quotas.forget(project)
    assert kernel.limits[project] == (0,) * 8


def test_the_directories_of_a_container_share_a_project_and_others_do_not(kernel: Kernel, tmp_path: Path) -> None:
    quotas = Quotas(tmp_path)
    one, two = directories(tmp_path, "a"), directories(tmp_path, "b")
    first = quotas.limit(one, 7, 1 << 20)
    # Another root on the same file system has a snapshot of the same number.
    second = Quotas(tmp_path).limit(two, 7, 1 << 20)
    assert first != second
    assert [Quotas.project_of(each) for each in one + two] == [first, first, second, second]
    for directory in one:
        flags, extent, extents, project, copied, padding = FSXATTR.unpack(kernel.attributes[directory.stat().st_ino])
        assert (flags, extent, extents, project, copied, padding) == (1 | PROJINHERIT, 2, 3, first, 5, b"8 bytes.")


@given(st.integers(1, (1 << 62)))
def test_ids_are_never_those_of_others(snapshot_id: int) -> None:
    """Projects below 1 << 24 belong to users of quota; the kernel's numbers have 32 bits, and 2^32 - 1 is none."""
    with pytest.MonkeyPatch.context() as patch:
        kernel = Kernel(patch)
        quotas = Quotas(Path("/"))
        first = quotas._free_project(snapshot_id)
        kernel.limits[first] = (0, 0, 1, 0, 0, 0, 0, 0)  # in use, without a limit
        second = quotas._free_project(snapshot_id)
        assert first != second
        assert all(1 << 24 <= each < (1 << 32) - 1 for each in (first, second))


def test_projects_of_others_are_no_limits(kernel: Kernel, tmp_path: Path) -> None:
    kernel.attributes[tmp_path.stat().st_ino] = FSXATTR.pack(0, 0, 0, 77, 0, bytes(8))
    assert Quotas.project_of(tmp_path) == 0
    assert Quotas.project_of(tmp_path / "missing") == 0


def test_when_all_ids_are_taken_none_is_given(kernel: Kernel, tmp_path: Path) -> None:
    kernel.limits = defaultdict(lambda: (1, 0, 0, 0, 0, 0, 0, 0))
    with pytest.raises(FailedPreconditionError, match="no free project id"):
        Quotas(tmp_path).limit(directories(tmp_path, "a"), 1, 1 << 20)


def test_more_than_the_file_system_holds_is_refused(kernel: Kernel, tmp_path: Path) -> None:
    total = os.statvfs(tmp_path)
    size = total.f_blocks * total.f_frsize
    Quotas(tmp_path).check(size)
    with pytest.raises(QuotaError, match=rf"got {size + 1} bytes, wanted at most {size}\)"):
        Quotas(tmp_path).check(size + 1)


def test_without_enforcement_there_is_no_limit(kernel: Kernel, tmp_path: Path) -> None:
    kernel.enforced = False
    with pytest.raises(FailedPreconditionError, match="not enforced"):
        Quotas(tmp_path).limit(directories(tmp_path, "a"), 1, 1 << 20)


@pytest.mark.parametrize(
    ("options", "enforced"), [("rw,prjquota", True), ("rw,pquota", True), ("rw,usrquota", False), ("rw", False)]
)
def test_the_mount_of_the_directory_counts_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, enforced: bool
) -> None:
    device = tmp_path.stat().st_dev
    other = "rw" if enforced else "rw,prjquota"
    lines = [
        f"1 0 0:0 / /lower rw - xfs /dev/a {other}",
        f"2 0 99999:0 / /higher rw - xfs /dev/b {other}",
        f"3 0 {os.major(device)}:{os.minor(device)} / / rw - xfs /dev/c {options}",
    ]
    monkeypatch.setattr(mount, "mounts", lambda: mount.parse_mountinfo("\n".join(lines)))
    monkeypatch.setattr(Quotas, "_control", lambda *_: None)
    if enforced:
        Quotas(tmp_path).check(1024)
    else:
        with pytest.raises(QuotaError, match="not enforced"):
            Quotas(tmp_path).check(1024)


@pytest.mark.parametrize(("code", "refused"), [(errno.ENOENT, False), (errno.ESRCH, False), (errno.EPERM, True)])
def test_xfs_knows_nothing_of_an_id_without_quota(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, refused: bool
) -> None:
    def unknown(_: Quotas, command: int, project: int, buffer: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Quotas, "_control", unknown)
    if refused:
        with pytest.raises(QuotaError, match="keeps no project quota"):
            Quotas(tmp_path).check(1024)
    else:
        Quotas(tmp_path).check(1024)
    with pytest.raises(QuotaError, match="cannot set the limit of project 5"):
        Quotas(tmp_path)._set_limit(5, 1024)
    Quotas(tmp_path).forget(5)


@pytest.mark.parametrize(("text", "size"), [("2048b", 2048), ("2048B", 2048), ("1k", 1024), ("1p", 1 << 50)])
def test_units(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_label_may_only_lower_the_limit() -> None:
    assert quota_asked({}, 0) == 0
    assert quota_asked({}, 5000) == 5000
    assert quota_asked({LABEL_QUOTA: "2k"}, 0) == 2048
    assert quota_asked({LABEL_QUOTA: "2k"}, 5000) == 2048
    assert quota_asked({LABEL_QUOTA: "8k"}, 5000) == 5000
    with pytest.raises(InvalidArgumentError, match=f"label {LABEL_QUOTA}: not a quota"):
        quota_asked({LABEL_QUOTA: "much"}, 5000)
