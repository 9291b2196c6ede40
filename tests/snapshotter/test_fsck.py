"""Roots with something wrong in them: shown, mended, and in use again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from obdlab.cli.main import main
from obdlab.formats import oci
from obdlab.image.config import ImageConfig, UpperConfig
from obdlab.snapshotter.errors import AlreadyExistsError, NotFoundError
from obdlab.snapshotter.writable import LABEL_WRITABLE, Mode, WritableDevice
from tests.snapshotter.mounting import mounted
from tests.snapshotter.test_core import CHAIN, DIGESTS, downloaded, open_snapshotter, pull, pull_labels
from tests.snapshotter.test_turbo import TARGETS, turbo_labels, unpacked
from tests.snapshotter.test_writable import SMALL, Root, golden, root

__all__ = ["root"]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Plain layers 1 and 2, a container 3 on them; layers 4 and 5 of an image in a registry."""
    snapshotter = open_snapshotter(tmp_path)
    snapshotter.prepare("key", "", {})
    snapshotter.commit("plain", "key", {})
    snapshotter.prepare("key", "plain", {})
    snapshotter.commit("upper", "key", {})
    snapshotter.prepare("container", "upper", {})
    pull(snapshotter)
    pull(snapshotter, 1, CHAIN[0])
    snapshotter.close()
    return tmp_path / "root"


def fsck(home: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str]]:
    status = main(["fsck", str(home), "--run-dir", str(home.parent / "run"), "--plain-http", "plain.test", *options])
    return status, capsys.readouterr().out.splitlines()


def turbo_layers(tmp_path: Path) -> list[Path]:
    with closing(open_snapshotter(tmp_path)) as snapshotter:
        first = unpacked(snapshotter, turbo_labels())
        return [first, unpacked(snapshotter, turbo_labels(1), 1, CHAIN[0])]


def test_turbo_layers_are_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turbo_layers(tmp_path)
    home = tmp_path / "root"
    assert fsck(home, capsys, "--repair") == (0, [f"{home}: nothing wrong"])


@pytest.mark.parametrize(
    ("harm", "text", "mends"),
    [
        (lambda fs: (fs / ".turbo.target").write_text(f"{TARGETS[2]},1000\n"), "names another layer than", True),
        (lambda fs: (fs / ".turbo.target").unlink(), "its blob does not name the layer with its files", False),
        (lambda fs: (fs / "ext4.fs.meta").unlink(), "ext4.fs.meta is gone", True),
        (lambda fs: (fs / "gzip.meta").unlink(), "gzip.meta is gone", True),
    ],
)
def test_turbo_layers_of_earlier_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: object, text: str, mends: bool
) -> None:
    first, second = turbo_layers(tmp_path)
    home = tmp_path / "root"
    harm(first)  # type: ignore[operator]
    status, lines = fsck(home, capsys)
    assert status != 0
    assert text in lines[0]
    fsck(home, capsys, "--repair")
    assert second.exists() is not mends
    status, lines = fsck(home, capsys)
    assert (status == 0) is mends
    if not mends:
        config = tmp_path / "config.json"
        config.write_text('{"turboTargetsByLabel": true}')
        assert fsck(home, capsys, "--snapshotter-config", str(config))[0] == 0


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda path: path.unlink(), r"cannot open \(No such file"),
        (lambda path: path.write_bytes(bytes(999)), r"another size than its blob says \(got 999, wanted 1000\)"),
        (lambda path: path.write_bytes(b"\x1f\x8b" * 500), r"is compressed, and no index is named \(got gzip"),
    ],
    ids=["missing", "cut", "another file"],
)
def test_targets_in_the_content_store_are_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object], text: str
) -> None:
    place = tmp_path / "store" / "blobs" / TARGETS[0].replace(":", "/")
    place.parent.mkdir(parents=True)
    place.write_bytes(bytes(1000))
    labels = turbo_labels(0, oci.OCI_LAYER) | {oci.TURBO_TARGET_PLACE: oci.IN_CONTENT_STORE}
    with closing(open_snapshotter(tmp_path, content_store=tmp_path / "store")) as snapshotter:
        unpacked(snapshotter, labels, files=("ext4.fs.meta",))
    home, config = tmp_path / "root", tmp_path / "config.json"
    config.write_text(json.dumps({"contentStore": str(tmp_path / "store")}))
    options = ("--snapshotter-config", str(config))
    assert fsck(home, capsys, *options) == (0, [f"{home}: nothing wrong"])
    harm(place)
    status, lines = fsck(home, capsys, *options)
    assert status == 1
    assert re.search(rf"snapshot 1 .*cannot be read: {place}: .*{text}.*pull or make it again", lines[0]), lines


def test_a_sound_root(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fsck(home, capsys) == (0, [f"{home}: nothing wrong"])
    assert fsck(home, capsys, "--repair") == (0, [f"{home}: nothing wrong"])


def break_config(home: Path) -> None:
    (home / "snapshots/5/block/config.v1.json").write_text("{")


def break_lowers(home: Path) -> None:
    path = home / "snapshots/5/block/config.v1.json"
    values = json.loads(path.read_text())
    values["lowers"] = values["lowers"][1:]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda home: shutil.rmtree(home / "snapshots/5"), "snapshots/5 is gone"),
        pytest.param(lambda home: shutil.rmtree(home / "snapshots/4"), "snapshots/4 is gone", marks=pytest.mark.slow),
        (lambda home: (home / "snapshots/5/block/config.v1.json").unlink(), "config.v1.json is gone"),
        pytest.param(
            lambda home: (home / "snapshots/5/block/mountpoint").rmdir(), "mountpoint is gone", marks=pytest.mark.slow
        ),
        pytest.param(lambda home: (home / "snapshots/3/work").rmdir(), "work is gone", marks=pytest.mark.slow),
        (lambda home: (home / "snapshots/4/fs/overlaybd.commit").write_text("damaged"), "overlaybd.commit"),
        (lambda home: (home / "snapshots/99/fs").mkdir(parents=True), "snapshots/99: belongs to no snapshot"),
        pytest.param(
            lambda home: (home / "snapshots/file").write_text("x"),
            "file: belongs to no snapshot",
            marks=pytest.mark.slow,
        ),
        (break_config, "not JSON"),
        (break_lowers, "names other layers"),
    ],
)
def test_what_can_be_made_again(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, harm: object, text: str
) -> None:
    wanted = ImageConfig.load(home / "snapshots/5/block/config.v1.json")
    assert callable(harm)
    harm(home)
    status, lines = fsck(home, capsys)
    assert status == 1
    assert text in lines[0]
    assert "remedy: " in lines[0]
    assert "belongs" in text or fsck(home, capsys)[0] == 1  # looking changes nothing
    status, lines = fsck(home, capsys, "--repair")
    assert status == 0, lines
    assert lines[-1].endswith("mended")
    assert fsck(home, capsys) == (0, [f"{home}: nothing wrong"])
    assert ImageConfig.load(home / "snapshots/5/block/config.v1.json") == wanted
    snapshotter = open_snapshotter(tmp_path)
    assert len(snapshotter.walk()) == 5
    snapshotter.mounts("container")
    snapshotter.close()


def test_what_is_lost_is_forgotten_with_all_above(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.rmtree(home / "snapshots/2")
    status, lines = fsck(home, capsys)
    assert (status, len(lines)) == (1, 2)
    assert "snapshots/2 is gone; remedy: forget it" in lines[0]
    assert fsck(home, capsys, "--repair")[0] == 0
    snapshotter = open_snapshotter(tmp_path)
    assert {snapshot.key for snapshot in snapshotter.walk()} == {"plain", *CHAIN[:2]}
    assert sorted(path.name for path in (home / "snapshots").iterdir()) == ["1", "4", "5"]
    with pytest.raises(NotFoundError):
        snapshotter.stat("container")
    snapshotter.close()


def test_a_lost_layer_does_not_end_the_check(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(home / "snapshots/1")
    break_config(home)
    status, lines = fsck(home, capsys)
    assert (status, len(lines)) == (1, 3)
    assert "snapshots/1 is gone" in lines[0]
    assert "snapshot 5 " in lines[1]
    assert "not JSON" in lines[1]


@pytest.mark.parametrize("lost", ["data", "index"])
def test_a_container_without_its_own_layer_is_forgotten(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, lost: str
) -> None:
    for name in ("data", "index"):
        (tmp_path / name).touch()
    (home / "snapshots/3/block").mkdir()
    device = WritableDevice(Mode.DIR, UpperConfig(str(tmp_path / "index"), str(tmp_path / "data"), 1))
    device.save(home / "snapshots/3/block/writable.json")
    assert fsck(home, capsys)[0] == 0
    (tmp_path / lost).unlink()
    status, lines = fsck(home, capsys, "--repair")
    assert status == 0, lines
    assert f"what it wrote is gone ({tmp_path / lost})" in lines[0]
    snapshotter = open_snapshotter(tmp_path)
    assert {snapshot.key for snapshot in snapshotter.walk()} == {"plain", "upper", *CHAIN[:2]}
    snapshotter.close()


def test_the_only_copy_of_what_a_container_wrote_stays(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (home / "snapshots/3/block").mkdir()
    device = WritableDevice(Mode.DIR, UpperConfig(str(tmp_path / "index"), str(tmp_path / "data"), 1))
    device.save(home / "snapshots/3/block/writable.json")
    sealed = home / "snapshots/3/fs/overlaybd.sealed"
    sealed.write_text("written")
    status, lines = fsck(home, capsys, "--repair")
    assert status == 1
    assert f"{sealed} is the only copy of what it wrote" in lines[0]
    assert sealed.read_text() == "written"


def test_names_of_the_originals_converter_are_right(
    home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """They are no chain IDs, so no layer has a wrong one."""
    snapshotter = open_snapshotter(tmp_path)
    parent = ""
    for number in (0, 1):
        target = f"overlaybd-conv-sha256:{number}"
        with pytest.raises(AlreadyExistsError):
            snapshotter.prepare("extract", parent, pull_labels(number) | {"containerd.io/snapshot.ref": target})
        parent = target
    snapshotter.close()
    assert fsck(home, capsys) == (0, [f"{home}: nothing wrong"])


def test_a_local_layer_that_is_gone_is_lost(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    snapshotter = open_snapshotter(tmp_path)
    directory = downloaded(snapshotter, tmp_path, "local")
    snapshotter.close()
    (directory / "fs/overlaybd.commit").unlink()
    status, lines = fsck(home, capsys, "--repair")
    assert (status, len(lines)) == (0, 2)
    assert "neither in" in lines[0]
    assert DIGESTS[0] not in lines[0]


def test_a_root_in_use_is_only_looked_at(home: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    snapshotter = open_snapshotter(tmp_path)
    try:
        assert fsck(home, capsys)[0] == 0
        assert main(["fsck", "--repair", str(home)]) == 1
        assert "another snapshotter uses this root" in capsys.readouterr().err
    finally:
        snapshotter.close()


def test_what_is_no_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fsck", str(tmp_path)]) == 1
    assert "no root of a snapshotter" in capsys.readouterr().err
    (tmp_path / "metadata.db").touch()
    assert main(["fsck", str(tmp_path)]) == 1
    assert "takes it over at its first start" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "metadata.db"]


def test_damaged_metadata_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "metadata.sqlite"
    data = bytearray(path.read_bytes())
    data[5000:12000] = bytes(7000)
    path.write_bytes(data)
    for options in ((), ("--repair",)):
        status = main(["fsck", str(home), *options])
        output = capsys.readouterr()
        assert status == 1
        assert "metadata" in output.out + output.err


@pytest.mark.kernel
def test_devices_of_nobody_are_detached(root: Root, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    home = tmp_path / "root"
    with root.opened() as snapshotter:
        image = golden(snapshotter, root)
        snapshotter.prepare("one", "", {LABEL_WRITABLE: "dir"} | SMALL)
        snapshotter.view("look", image, {})
        snapshotter.remove("look")
    shutil.rmtree(root.home(2) / "work")
    with root.opened() as snapshotter, snapshotter._store.write() as writer:
        writer.remove("golden")  # as if its row had been lost
    # The next start would delete what it does not know, were it not mounted.
    assert len(root.devices.list()) == 2
    status, lines = fsck(home, capsys, "--repair")
    assert status == 0, lines
    assert len(root.devices.list()) == 1
    with root.opened() as snapshotter, mounted(snapshotter.mounts("one"), tmp_path / "rootfs") as rootfs:
        assert rootfs.is_dir()
