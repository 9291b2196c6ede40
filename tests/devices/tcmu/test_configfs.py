"""What is written where in configfs, over a simulated tree: directories come with files, and go with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from obdlab.devices.tcmu import configfs
from obdlab.devices.tcmu.configfs import Target
from obdlab.errors import DeviceError
from tests.devices.tcmu.tree import Tree


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
