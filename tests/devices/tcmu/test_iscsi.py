"""Exports over iSCSI in a simulated tree of configfs: only to named initiators, and nothing left behind."""

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


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("iqn.2026-01.org", True),
        ("iqn.2026-01.org.example-2:a.b:c_d-e", True),
        ("iqn.2026-01.1org", True),
        (NAME + "x" * (223 - len(NAME)), True),
        (NAME + "x" * (224 - len(NAME)), False),
        ("iqn.2026-1.org", False),
        ("iqn.226-01.org", False),
        ("iqn.2026-01.-org", False),
        ("iqn.2026-01.", False),
        ("iqn.2026-01.org:", False),
        ("iqn.2026-01.org:a/b", False),
        ("iqnx2026-01.org", False),
        (NAME + "\n", False),
    ],
)
def test_names(tree: Tree, name: str, good: bool) -> None:
    if good:
        iscsi._check(name, ["1.2.3.4:1"], [name])
        return
    for names in ((name, [NAME]), (NAME, [NAME, name])):
        with pytest.raises(DeviceError, match="no iSCSI name"):
            iscsi._check(names[0], ["1.2.3.4:1"], names[1])


@pytest.mark.parametrize(
    ("portal", "good"),
    [
        ("1.2.3.4:3260", True),
        ("[fe80::1]:3260", True),
        ("[FE80::1]:1", True),
        ("1.2.3:3260", False),
        ("1.2.3.4:", False),
        ("1.2.3.4:123456", False),
        ("1.2.3.4", False),
        ("[fe80::g]:1", False),
        ("fe80::1:1", False),
        ("1.2.3.4:1/..", False),
    ],
)
def test_portals(portal: str, good: bool) -> None:
    if good:
        iscsi._check(NAME, [portal], [NAME])
        return
    with pytest.raises(DeviceError, match="no portal of an iSCSI target"):
        iscsi._check(NAME, ["1.2.3.4:3260", portal], [NAME])


def test_an_export_is_enabled_last_and_disabled_first(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.of("7")
    configfs.create(target, "obdlab/x")
    steps: list[str] = []
    write, mkdir, take_away = iscsi.write_attribute, os.mkdir, configfs.take_away
    monkeypatch.setattr(
        iscsi, "write_attribute", lambda path, text: steps.append(f"{path.name}={text}") or write(path, text)
    )
    monkeypatch.setattr(os, "mkdir", lambda path, *mode: steps.append(Path(path).name) or mkdir(path, *mode))
    iscsi.export(target, NAME, ["1.2.3.4:3260"], INITIATORS[:1])
    assert steps[-1] == "enable=1"
    assert steps.index("authentication=0") < steps.index(INITIATORS[0])
    steps.clear()
    monkeypatch.setattr(configfs, "take_away", lambda path: steps.append(path.name) or take_away(path))
    iscsi.unexport(target)
    assert steps[0] == "enable=0"
    assert steps[-2:] == ["tpgt_1", NAME]
    assert "1.2.3.4:3260" in steps


def test_a_link_of_the_same_name_to_another_backstore_is_left_alone(tree: Tree) -> None:
    ours, theirs = Target.of("7"), Target.of("7", tenant=5)
    for each in (ours, theirs):
        configfs.create(each, "obdlab/x")
    iscsi.export(theirs, NAME, ["1.2.3.4:3260"], INITIATORS)
    assert iscsi.unexport(ours) == []
    assert iscsi.unexport(theirs) == [NAME]


def test_what_the_kernel_made_goes_with_its_parent(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.of("7")
    configfs.create(target, "obdlab/x")
    iscsi.export(target, NAME, ["1.2.3.4:3260"], INITIATORS[:1])
    group = tree.root / "iscsi" / NAME / "tpgt_1"
    taken: list[Path] = []
    take_away = configfs.take_away
    monkeypatch.setattr(configfs, "take_away", lambda path: taken.append(path) or take_away(path))
    assert (group / "lun/lun_0/alua").is_dir()
    iscsi.unexport(target)
    assert not {path.name for path in taken} & {"alua", "statistics", "attrib", "auth", "param", "fabric_statistics"}
    assert group / "acls" / INITIATORS[0] in taken
    assert group / "lun/lun_0" in taken
