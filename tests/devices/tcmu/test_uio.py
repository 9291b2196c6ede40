"""TCMU devices as UIO shows them: names, nodes, and whether this host has the kind."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from obdlab.devices.tcmu import tcmu_kind, uio
from obdlab.devices.tcmu.tcmu_kind import KIND, Tcmu
from obdlab.devices.tcmu.uio import UioDevice, UioName
from obdlab.errors import DeviceError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tcm-user/1/dev_a/obdlab/x", UioName("1", "dev_a", "obdlab", "x")),
        ("tcm-user/1/dev_a/obdlab/", UioName("1", "dev_a", "obdlab", "")),
        ("tcm-user/1/dev_a//x/y", UioName("1", "dev_a", "", "x/y")),
        ("tcm-user/1//obdlab/x", None),
        ("tcm-user//dev_a/obdlab/x", None),
        ("tcm-user/-1/dev_a/obdlab/x", None),
        ("tcm-use/1/dev_a/obdlab/x", None),
    ],
)
def test_the_parts_of_a_name(text: str, name: UioName | None) -> None:
    assert UioName.parse(text) == name
    assert UioName.parse(f"{text}\n") == name


@pytest.mark.parametrize(("text", "configured"), [("1\n", True), ("0\n", False), ("11\n", False), (None, False)])
def test_a_device_is_configured_once_it_is_enabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, configured: bool
) -> None:
    backstore = tmp_path / "user_1" / "dev_a"
    backstore.mkdir(parents=True)
    if text is not None:
        (backstore / "enable").write_text(text)
    monkeypatch.setattr(uio, "Path", lambda _: tmp_path)
    assert UioName("1", "dev_a", "obdlab", "x").is_configured is configured


def test_a_node_that_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Path, int, int]] = []
    monkeypatch.setattr(uio, "_SYS_UIO", tmp_path)
    monkeypatch.setattr(os, "mknod", lambda *arguments: made.append(arguments))
    (tmp_path / "uio3").mkdir()
    (tmp_path / "uio3" / "dev").write_text("241:3\n")
    uio._make_node(Path("/dev/uio3"))
    assert made == [(Path("/dev/uio3"), stat.S_IFCHR | 0o600, os.makedev(241, 3))]
    uio._make_node(tmp_path / "uio3")
    assert len(made) == 1


def test_memory_that_cannot_be_mapped_closes_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int, size: int) -> mmap.mmap:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    (tmp_path / "uio3" / "maps/map0").mkdir(parents=True)
    (tmp_path / "uio3" / "maps/map0/size").write_text("0x0000000000001800\n")
    (tmp_path / "node").touch()
    seen: list[tuple[Path, int]] = []
    opened = os.open

    def open_node(path: Path, flags: int) -> int:
        seen.append((path, flags))
        return opened(tmp_path / "node", flags)

    monkeypatch.setattr(uio, "_SYS_UIO", tmp_path)
    monkeypatch.setattr(uio, "_make_node", lambda _: None)
    monkeypatch.setattr(uio, "mmap", SimpleNamespace(mmap=refuse))
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_node)
        with pytest.raises(DeviceError, match="/dev/uio3: cannot map 6144 bytes: Cannot allocate memory"):
            UioDevice.open(3)
    assert seen == [(Path("/dev/uio3"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)]
    assert os.listdir("/proc/self/fd") == before


def test_a_device_that_is_gone_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uio, "_SYS_UIO", tmp_path)
    with pytest.raises(DeviceError, match="/dev/uio3: cannot open: No such file or directory"):
        UioDevice.open(3)


def test_a_host_has_the_kind_if_its_modules_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, modules = tmp_path / "target", tmp_path / "sys/module"
    monkeypatch.setattr(Tcmu, "control", target)
    monkeypatch.setattr(
        tcmu_kind, "Path", lambda path: tmp_path / path.removeprefix("/") if path.startswith("/sys") else Path(path)
    )
    assert KIND.directories_below(tmp_path) == set()
    for directory in (target / "core", modules / "target_core_user", modules / "tcm_loop"):
        assert KIND.missing() == f"{directory}: No such file or directory"
        directory.mkdir(parents=True)
    assert KIND.missing() == ""
    seen: list[tuple[Path, int]] = []
    monkeypatch.setattr(os, "access", lambda path, mode: bool(seen.append((path, mode))))
    assert KIND.missing() == f"{target}: Permission denied"
    assert seen == [(target / "core", os.W_OK)]
    found = SimpleNamespace(directories_below=lambda parent: {parent / "one"})
    monkeypatch.setattr(Tcmu, "module", found)
    assert KIND.directories_below(tmp_path) == {tmp_path / "one"}
    assert (KIND.name, KIND.preference, KIND.is_shared, KIND.is_file) == ("tcmu", 1, False, False)
