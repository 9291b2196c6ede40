"""What is written where in configfs, over a simulated tree: directories come with files, and go with them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from obdlab.devices.tcmu import configfs, iscsi
from obdlab.devices.tcmu.configfs import Target
from obdlab.errors import DeviceError
from tests.devices.tcmu.tree import Tree

INITIATORS = ["iqn.2026-01.example.org:one", "iqn.2026-01.example.org:two"]
NAME = "iqn.2026-01.example.org:disk"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("tenant", "hba", "prefix"),
    [(-1, 999999999, 199), (0, 0, 100), (1, 1, 101), (99, 99, 199), (205, 205, 105), (-2 % 100, 98, 198)],
)
def test_numbers_of_tenants(tree: Tree, tenant: int, hba: int, prefix: int) -> None:
    target = Target.of("7", tenant)
    assert target.backstore == tree.root / "core" / f"user_{hba}" / "dev_7"
    assert target.loop == tree.root / "loopback" / f"naa.{prefix}0000000000007"
    assert target.link == target.loop / "tpgt_1" / "lun" / "lun_0" / "dev_7"


def test_a_backstore_is_configured_and_enabled(tree: Tree) -> None:
    target = Target.of("7")
    configfs.create(target, "obdlab/x", ("dev_size=4096",))
    assert (target.backstore / "control").read_text() == "dev_size=4096"
    assert (target.backstore / "enable").read_text() == "1"
    assert (target.backstore / "attrib/cmd_time_out").read_text() == str(configfs.TIMEOUT_S)
    with pytest.raises(DeviceError, match="there is such a device already"):
        configfs.create(target, "obdlab/x")
    configfs.remove(target)
    configfs.remove(target)
    assert tree.left() == []


def test_a_backstore_that_fails_is_taken_back(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(configfs, "_enable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        configfs.create(Target.of("7"), "obdlab/x")
    assert tree.left() == []
    (tree.root / "core").rename(tree.root / "elsewhere")
    (tree.root / "core").write_text("")
    with pytest.raises(DeviceError, match="is target_core_user loaded"):
        configfs.create(Target.of("8"), "obdlab/x")


@pytest.mark.parametrize("text", ["a,b", "a\nb", "x" * 256])
def test_texts_the_kernel_would_cut_are_refused(tree: Tree, text: str) -> None:
    with pytest.raises(DeviceError, match="255 characters"):
        configfs.create(Target.of("7"), text)
    assert tree.left() == []


def test_a_disk_without_an_address_is_none(tree: Tree) -> None:
    target = Target.of("7")
    assert configfs.disk_of(target) is None
    os.makedirs(target.lun)
    assert configfs.disk_of(target) is None  # no such SCSI device


def test_an_export_that_gets_no_disk_leaves_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.of("7")
    configfs.create(target, "obdlab/x")
    with pytest.raises(DeviceError, match=r"SCSI device 7:0:1:0: no disk came of it within 0\.01 s"):
        configfs.export(target, timeout_s=0.01)
    assert target.backstore.is_dir()
    assert not target.loop.exists()
    monkeypatch.setattr(configfs, "_disk_at", lambda address, timeout_s: Path("/dev") / address)
    assert configfs.export(target) == Path("/dev/7:0:1")
    assert (target.group / "nexus").read_text() == target.loop.name
    assert target.link.resolve() == target.backstore
    configfs.remove(target)
    assert tree.left() == []


def test_configurations_name_their_handler() -> None:
    assert configfs.dev_config_of(Path("/a/config.v1.json")) == "overlaybd//a/config.v1.json"
    assert configfs.dev_config_of(Path("/a/c"), "live") == "overlaybd//a/c;live"


def test_actions_that_a_kernel_lacks(tree: Tree) -> None:
    target = Target.of("7")
    configfs.create(target, "obdlab/x")
    assert not configfs.control(target.backstore, "reset_ring", "1")
    (target.backstore / "action").mkdir()
    assert configfs.control(target.backstore, "reset_ring", "1")
    assert (target.backstore / "action/reset_ring").read_text() == "1"
    (target.backstore / "action/block_dev").mkdir()
    assert not configfs.control(target.backstore, "block_dev", "1")


def test_only_named_initiators_may_log_in(tree: Tree) -> None:
    target, other = Target.of("7"), Target.of("8")
    for each in (target, other):
        configfs.create(each, "obdlab/x")
    iscsi.export(target, NAME, ["127.0.0.1:3260", "[::1]:3260"], INITIATORS)
    iscsi.export(other, NAME + "2", ["127.0.0.1:3261"], INITIATORS[:1])
    group = tree.root / "iscsi" / NAME / "tpgt_1"
    assert (group / "lun/lun_0/dev_7").resolve() == target.backstore
    assert sorted(path.name for path in (group / "np").iterdir()) == ["127.0.0.1:3260", "[::1]:3260"]
    assert sorted(path.name for path in (group / "acls").iterdir()) == INITIATORS
    for initiator in INITIATORS:
        assert (group / "acls" / initiator / "lun_0/lun_0").resolve() == group / "lun/lun_0"
    for attribute in ("generate_node_acls", "authentication"):
        assert (group / "attrib" / attribute).read_text() == "0"
    assert (group / "enable").read_text() == "1"
    with pytest.raises(DeviceError, match="there is such a target already"):
        iscsi.export(target, NAME, ["127.0.0.1:3260"], INITIATORS)
    assert iscsi.unexport(target) == [NAME]
    assert [path.name for path in (tree.root / "iscsi").iterdir()] == [NAME + "2"]
    assert iscsi.unexport(target) == []
    assert iscsi.unexport(other) == [NAME + "2"]
    assert list((tree.root / "iscsi").iterdir()) == []


def test_an_iscsi_export_that_fails_leaves_nothing(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.of("7")
    configfs.create(target, "obdlab/x")
    mkdir = os.mkdir

    def no_such_address(path: str | Path, mode: int = 0o777) -> None:
        if Path(path).parent.name == "np":
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", no_such_address)
    with pytest.raises(DeviceError, match="Cannot assign requested address"):
        iscsi.export(target, NAME, ["192.0.2.1:3260"], INITIATORS)
    assert list((tree.root / "iscsi").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "portals", "initiators", "reason"),
    [
        ("iqn.2026-01.Example:x", ["1.2.3.4:1"], INITIATORS, "no iSCSI name"),
        ("../x", ["1.2.3.4:1"], INITIATORS, "no iSCSI name"),
        (NAME + "x" * 223, ["1.2.3.4:1"], INITIATORS, "no iSCSI name"),
        (NAME, ["1.2.3.4:1"], ["../../x"], "no iSCSI name"),
        (NAME, ["host:1"], INITIATORS, "no portal"),
        (NAME, ["1.2.3.4:1", "../x"], INITIATORS, "no portal"),
        (NAME, [], INITIATORS, "nobody could log in"),
        (NAME, ["1.2.3.4:1"], [], "nobody could log in"),
    ],
)
def test_names_that_lead_elsewhere(
    tree: Tree, name: str, portals: list[str], initiators: list[str], reason: str
) -> None:
    with pytest.raises(DeviceError, match=reason):
        iscsi.export(Target.of("7"), name, portals, initiators)
    assert list((tree.root / "iscsi").iterdir()) == []
