"""The gRPC surface under an adversary: sizes, odd names, races on the same keys, and trees that containers leave."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from obdlab.containerd._pb import snapshots_pb2 as pb
from obdlab.containerd.services import make_stub
from obdlab.snapshotter import trees
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.layout import Layout, disk_usage
from obdlab.snapshotter.overlaybd import ImageOptions
from obdlab.snapshotter.service import SnapshotServer
from obdlab.snapshotter.store import Kind, Store
from tests.snapshotter.test_core import CHAIN, StuckImages, open_snapshotter, pull
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DEADLINE_S = 60.0
CONTRACT = (AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Snapshotter]:
    snapshotter = open_snapshotter(tmp_path)
    yield snapshotter
    snapshotter.close()


@pytest.fixture
def wire(core: Snapshotter, tmp_path: Path) -> Iterator[WireSnapshotter]:
    server = SnapshotServer(core, tmp_path / "s.sock")
    server.start()
    client = WireSnapshotter(str(server.address))
    yield client
    client.close()
    server.stop(1.0)


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_labels_have_a_bound(wire: WireSnapshotter) -> None:
    """An image may have thousands of annotations, and all snapshots travel to containerd in one stream."""
    most = {f"containerd.io/snapshot/{number:04}": "v" * 4000 for number in range(60)}
    too_many = {f"containerd.io/snapshot/{number:04}": "v" * 4000 for number in range(70)}
    for call in (wire.prepare, wire.view):
        with pytest.raises(InvalidArgumentError, match="labels: too many"):
            call("key", "", too_many)
    wire.prepare("key", "", most)
    with pytest.raises(InvalidArgumentError, match="labels: too many"):
        wire.commit("name", "key", too_many)
    with pytest.raises(InvalidArgumentError, match="labels: too many"):
        wire.update("key", too_many, ["labels"])
    wire.update("key", {"more": "v" * 4000}, ["labels.more"])
    with pytest.raises(InvalidArgumentError, match="labels: too many"):  # with those that are there
        wire.update("key", {"much": "v" * 20_000}, ["labels.much"])
    assert wire.stat("key").kind is Kind.ACTIVE


def test_a_list_comes_in_messages_that_clients_take(core: Snapshotter, wire: WireSnapshotter) -> None:
    labels = {f"l{number}": "v" * 4000 for number in range(50)}
    for number in range(40):
        core.prepare(f"key{number}", "", labels)
    request = pb.ListSnapshotsRequest()
    stub = make_stub(wire.channel, pb.DESCRIPTOR, "Snapshots")
    sizes = [message.ByteSize() for message in stub.List(request, timeout=_DEADLINE_S)]
    assert max(sizes) < 2 << 20
    assert len(wire.walk()) == 40
    for number in range(40):
        core.remove(f"key{number}")
    for number in range(250):
        core.prepare(f"small{number}", "", {})
    counts = [len(message.info) for message in stub.List(request, timeout=_DEADLINE_S)]
    assert counts == [100, 100, 50]
    assert wire.walk(["name==none"]) == []


def test_messages_have_a_bound(wire: WireSnapshotter) -> None:
    stub = make_stub(wire.channel, pb.DESCRIPTOR, "Snapshots")
    with pytest.raises(grpc.RpcError) as caught:
        stub.Prepare(pb.PrepareSnapshotRequest(key="k" * (8 << 20)), timeout=_DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert wire.walk() == []


def test_keys_have_a_bound(wire: WireSnapshotter) -> None:
    for call in (lambda key: wire.prepare(key, "", {}), lambda key: wire.view(key, "", {})):
        with pytest.raises(InvalidArgumentError, match="too long"):
            call("k" * 32769)
    wire.prepare("k" * 32768, "", {})
    with pytest.raises(InvalidArgumentError, match="too long"):
        wire.commit("n" * 40_000, "k" * 32768, {})
    wire.remove("k" * 32768)


def test_a_log_line_has_a_bound(wire: WireSnapshotter, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    key = "k" * (3 << 20)
    for call in (wire.stat, wire.mounts, wire.remove, wire.usage):
        with pytest.raises(NotFoundError):
            call(key)
    lines = [record.getMessage() for record in caplog.records if "NOT_FOUND" in record.getMessage()]
    assert len(lines) == 4
    assert max(map(len, lines)) < 10_000


# -- names ---------------------------------------------------------------------------------------------------------

ODD = [
    "../../etc",
    "/",
    ".",
    "..",
    "a/../../b",
    "a\0b",
    "a",
    "a\0",
    "new\nline",
    "\r\n",
    "\u2028",
    "\x7f\x1b[2J",
    "%s%n",
    "ü" * 99,
]


def test_a_key_is_a_name_and_no_path(wire: WireSnapshotter, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    for key in ODD:
        wire.prepare(key, "", {key: key})
        assert wire.stat(key).labels == {key: key}
    assert sorted(wire.stat(key).key for key in ODD) == sorted(ODD)
    for number, key in enumerate(ODD):
        wire.commit(f"name {number} {key}", key, {})
        wire.prepare(key, f"name {number} {key}", {})
    found = [snapshot.parent for snapshot in wire.walk(["kind==active"])]
    assert found == [f"name {number} {key}" for number, key in enumerate(ODD)]
    for number, key in enumerate(ODD):
        wire.remove(key)
        wire.remove(f"name {number} {key}")
    assert sorted(os.listdir(tmp_path)) == before
    assert os.listdir(tmp_path / "root/snapshots") == []


def test_no_name_forges_a_line_of_the_log(
    core: Snapshotter, wire: WireSnapshotter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    forged = "x\nERROR forged"
    labels = {"containerd.io/snapshot.ref": forged, "containerd.io/snapshot/image-ref": forged}
    wire.prepare(forged, "", labels)
    for call in (wire.stat, wire.mounts, wire.remove):
        with pytest.raises(NotFoundError):
            call("y\nERROR forged")
    wire.remove(forged)
    assert any("forged" in record.getMessage() for record in caplog.records)
    assert [record.getMessage() for record in caplog.records if "\n" in record.getMessage()] == []


def test_odd_field_masks(wire: WireSnapshotter) -> None:
    wire.prepare("key", "", {"a": "1", "b": "2"})
    for paths in (
        ["labels."],
        ["label"],
        ["name"],
        ["parent"],
        ["kind"],
        [""],
        ["labels", "kind"],
        ["Labels"],
        ["labelsx.a"],
    ):
        with pytest.raises(InvalidArgumentError, match="only labels"):
            wire.update("key", {"a": "x", "": "y"}, paths)
    assert wire.stat("key").labels == {"a": "1", "b": "2"}
    assert wire.update("key", {"a": "x"}, ["labels.a"] * 5000).labels == {"a": "x", "b": "2"}
    assert wire.update("key", {}, ["labels.b", "labels.none", "labels.\n"]).labels == {"a": "x"}


# -- races ---------------------------------------------------------------------------------------------------------


def test_calls_on_the_same_keys_from_all_sides(core: Snapshotter, wire: WireSnapshotter, tmp_path: Path) -> None:
    """Only errors of the contract come, and rows and directories agree in the end."""
    keys = ["a", "b", "c"]
    failures: list[BaseException] = []
    until = time.monotonic() + 3.0

    def hammer(seed: int) -> None:
        chooser = random.Random(seed)
        one = lambda: chooser.choice(keys)  # noqa: E731
        calls: list[Callable[[], object]] = [
            lambda: wire.prepare(one(), chooser.choice(["", *keys]), {}),
            lambda: wire.view(one(), one(), {}),
            lambda: wire.commit(one(), one(), {}),
            lambda: wire.remove(one()),
            lambda: wire.mounts(one()),
            lambda: wire.usage(one()),
            lambda: wire.update(one(), {"x": "y"}, []),
            core.cleanup,
        ]
        while time.monotonic() < until:
            try:
                chooser.choice(calls)()
            except CONTRACT:
                continue
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_DEADLINE_S)
    assert failures == []
    with core._store.read() as reader:
        ids = {str(each) for each in reader.ids()}
    assert set(os.listdir(tmp_path / "root/snapshots")) == ids
    for snapshot in core.walk():
        assert (tmp_path / f"root/snapshots/{snapshot.id}/work").is_dir() or snapshot.kind is not Kind.ACTIVE


def test_a_key_that_is_made_again_is_not_committed_for_the_old(core: Snapshotter, tmp_path: Path) -> None:
    """Between the look at it and its commit: what was counted and looked at is another directory."""
    core.prepare("key", "", {})
    real = core._layout.usage

    def usage(snapshot_id: int) -> object:
        core._layout.usage = real
        core.remove("key")
        core.prepare("key", "", {})
        return real(snapshot_id)

    core._layout.usage = usage
    with pytest.raises(NotFoundError, match="made again"):
        core.commit("name", "key", {})
    assert [snapshot.key for snapshot in core.walk()] == ["key"]
    core.commit("name", "key", {})


def test_a_parent_that_goes_meanwhile(core: Snapshotter) -> None:
    for _ in range(20):
        core.prepare("key", "", {})
        core.commit("parent", "key", {})
        results: list[object] = []

        def child(results: list[object] = results) -> None:
            try:
                results.append(core.prepare("child", "parent", {}))
            except NotFoundError as error:
                results.append(error)

        thread = threading.Thread(target=child)
        thread.start()
        try:
            core.remove("parent")
            removed = True
        except FailedPreconditionError:
            removed = False
        thread.join(_DEADLINE_S)
        assert isinstance(results[0], NotFoundError) == removed
        for snapshot in reversed(core.walk()):
            core.remove(snapshot.key)


class SlowImages(StuckImages):
    """An image whose device comes when it is let, and what happened in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.mounting, self.go_on = threading.Event(), threading.Event()

    def mount(self, *arguments: object, **more: object) -> Path:
        self.events.append("mounting")
        self.mounting.set()
        assert self.go_on.wait(_DEADLINE_S)
        self.events.append("mounted")
        return Path("/dev/null")

    def release(self, snapshot_id: int) -> bool:
        self.events.append("released")
        return True


def test_remove_waits_for_a_mount_of_the_same_image(tmp_path: Path) -> None:
    """Without its lock it would take the device away under the container that is being made."""
    images = SlowImages()
    snapshotter = Snapshotter(Layout(tmp_path / "root"), images, ImageOptions())
    outcome: list[str] = []

    def remove() -> None:
        try:
            snapshotter.remove(CHAIN[0])
            outcome.append("removed")
        except FailedPreconditionError as error:
            outcome.append(str(error))

    try:
        pull(snapshotter)
        image_id = snapshotter.stat(CHAIN[0]).id
        making = threading.Thread(target=snapshotter.prepare, args=("container", CHAIN[0], {}))
        making.start()
        assert images.mounting.wait(_DEADLINE_S)
        removing = threading.Thread(target=remove)
        removing.start()
        deadline = time.monotonic() + _DEADLINE_S
        while removing.is_alive() and snapshotter._locks._locks[image_id][1] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert images.events == ["mounting"]
        images.go_on.set()
        for thread in (making, removing):
            thread.join(_DEADLINE_S)
        assert images.events == ["mounting", "mounted"]
        assert outcome == [f"cannot remove snapshot with child: snapshot {CHAIN[0]!r}"]
        assert snapshotter.stat("container").parent == CHAIN[0]
    finally:
        images.go_on.set()
        snapshotter.close()


def test_what_was_answered_survives_a_power_cut(tmp_path: Path) -> None:
    """That is, each transaction is flushed: containerd's own records would outlive ours otherwise."""
    store = Store(tmp_path / "metadata.sqlite")
    try:
        for connection in (store._writer, store._reader):
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)
    finally:
        store.close()


# -- what containers leave -----------------------------------------------------------------------------------------


def deep(directory: Path, depth: int, name: str = "d") -> None:
    """Nest directories, far beyond what a path or a recursion reaches."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=descriptor)
        child = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = child
    os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Path]:
    """A directory that is gone in the end however deep it is, which pytest's own cleaning does not manage."""
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path / "root"], check=True, timeout=_DEADLINE_S)


@pytest.mark.parametrize(("depth", "name"), [(1500, "d"), (3000, "long name" * 20)])
def test_a_deep_tree_stops_neither_remove_nor_the_next_start(workshop: Path, depth: int, name: str) -> None:
    snapshotter = open_snapshotter(workshop)
    snapshotter.prepare("key", "", {})
    deep(workshop / "root/snapshots/1/fs", depth, name)
    snapshotter.commit("name", "key", {})
    assert snapshotter.usage("name").inodes > 100
    snapshotter.remove("name")
    assert os.listdir(workshop / "root/snapshots") == []
    snapshotter.close()
    leftover = workshop / "root/snapshots/new-left"
    leftover.mkdir()
    deep(leftover, depth, name)
    open_snapshotter(workshop).close()
    assert os.listdir(workshop / "root/snapshots") == []


def test_deleting_and_counting_follow_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"x" * 100_000)
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "link").symlink_to(outside)
    (tree / "sub/link").symlink_to(outside / "precious")
    os.link(outside / "precious", tree / "hard")
    os.mkfifo(tree / "pipe")
    assert disk_usage([tree]).inodes == 6
    trees.delete_tree(tree)
    assert not tree.exists()
    assert (outside / "precious").read_bytes() == b"x" * 100_000
    (tmp_path / "top").symlink_to(outside)
    trees.delete_tree(tmp_path / "top")
    assert disk_usage([tmp_path / "top"]).inodes == 0
    assert (outside / "precious").exists()


def test_counting_goes_on_when_files_vanish(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).touch()
    counted = trees.statuses(tmp_path)
    assert [next(counted).st_ino, next(counted).st_size] == [tmp_path.stat().st_ino, 0]
    for path in tmp_path.iterdir():  # the walk has their names already
        path.unlink()
    assert list(counted) == []


def test_a_directory_swapped_for_a_link_is_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its container may do, between the look and the entering."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for number in range(50):
        (outside / f"precious{number}").touch()
    real = os.open

    def swapping(path: object, flags: int, *rest: object, **more: object) -> int:
        if path == "sub":
            os.rmdir(tmp_path / "tree/sub")
            (tmp_path / "tree/sub").symlink_to(outside)
        return real(path, flags, *rest, **more)

    for act in (lambda: disk_usage([tmp_path / "tree"]), lambda: trees.delete_tree(tmp_path / "tree")):
        (tmp_path / "tree/sub").mkdir(parents=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", swapping)
            found = act()
        assert found is None or found.inodes <= 2
        assert len(os.listdir(outside)) == 50
        (tmp_path / "tree/sub").unlink(missing_ok=True)


def test_files_with_several_names_count_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 8192)
    for number in range(10):
        os.link(tmp_path / "a", tmp_path / f"b{number}")
    assert disk_usage([tmp_path]).inodes == 2
    assert disk_usage([tmp_path], skip="a").inodes == 2
