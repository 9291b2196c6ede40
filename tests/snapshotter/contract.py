"""What containerd expects of every snapshotter, as tests that each implementation runs."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import pytest

from obdlab.errors import ObdlabError
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.store import Kind, Snapshot, Usage
from tests.snapshotter.mounting import mounted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from obdlab.snapshotter.mounts import Mount

MIB = 1 << 20


class SnapshotterLike(Protocol):
    """What the suite calls."""

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]: ...
    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]: ...
    def mounts(self, key: str) -> list[Mount]: ...
    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None: ...
    def remove(self, key: str) -> None: ...
    def stat(self, key: str) -> Snapshot: ...
    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot: ...
    def walk(self, filters: Sequence[str] = ()) -> list[Snapshot]: ...
    def usage(self, key: str) -> Usage: ...


@pytest.mark.kernel
class SnapshotterContract:
    """Derive from it and give a ``snapshotter`` fixture: empty, or emptied of everything the test names."""

    #: The deepest chain to try; each test of it makes as many directories.
    deepest = 100

    @pytest.fixture
    def snapshotter(self) -> SnapshotterLike:
        raise NotImplementedError

    @contextmanager
    def mounted(self, mounts: list[Mount], tmp_path: Path) -> Iterator[Path]:
        with mounted(mounts, tmp_path / "mnt") as target:
            yield target

    def layer(self, snapshotter: SnapshotterLike, tmp_path: Path, name: str, parent: str, **files: str) -> None:
        with self.mounted(snapshotter.prepare(f"{name}-key", parent, {}), tmp_path) as root:
            for file, text in files.items():
                (root / file).write_text(text)
        snapshotter.commit(name, f"{name}-key", {})

    def test_layers_add_up(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        self.layer(snapshotter, tmp_path, "one", "", a="1", b="1")
        self.layer(snapshotter, tmp_path, "two", "one", b="2", c="2")
        with self.mounted(snapshotter.prepare("top", "two", {}), tmp_path) as root:
            assert {path.name: path.read_text() for path in root.iterdir()} == {"a": "1", "b": "2", "c": "2"}
            (root / "d").write_text("3")
            (root / "a").unlink()
        # Made again from Mounts, it is as it was left.
        with self.mounted(snapshotter.mounts("top"), tmp_path) as root:
            assert sorted(path.name for path in root.iterdir()) == ["b", "c", "d"]
        with self.mounted(snapshotter.view("below", "two", {}), tmp_path) as root:
            assert sorted(path.name for path in root.iterdir()) == ["a", "b", "c"]

    def test_a_view_is_read_only(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        self.layer(snapshotter, tmp_path, "one", "", a="1")
        self.layer(snapshotter, tmp_path, "two", "one", b="2")
        for key, parent in (("of-nothing", ""), ("of-one", "one"), ("of-two", "two")):
            mounts = snapshotter.view(key, parent, {})
            assert snapshotter.mounts(key) == mounts
            with self.mounted(mounts, tmp_path) as root, pytest.raises(OSError, match="Read-only"):
                (root / "new").write_text("x")

    def test_stat_tells_what_was_made(self, snapshotter: SnapshotterLike) -> None:
        before = time.time_ns()
        snapshotter.prepare("active", "", {"a": "b", "containerd.io/gc.root": "x"})
        active = snapshotter.stat("active")
        assert (active.key, active.parent, active.kind) == ("active", "", Kind.ACTIVE)
        assert active.labels.items() >= {"a": "b", "containerd.io/gc.root": "x"}.items()
        assert before <= active.created_ns <= active.updated_ns <= time.time_ns()
        snapshotter.commit("committed", "active", {"c": "d"})
        committed = snapshotter.stat("committed")
        assert (committed.key, committed.parent, committed.kind) == ("committed", "", Kind.COMMITTED)
        assert committed.labels.items() >= {"c": "d"}.items()
        assert "a" not in committed.labels
        assert committed.created_ns >= active.created_ns
        snapshotter.view("view", "committed", {})
        view = snapshotter.stat("view")
        assert (view.key, view.parent, view.kind) == ("view", "committed", Kind.VIEW)
        with pytest.raises(NotFoundError):
            snapshotter.stat("active")

    def test_walk_agrees_with_stat_and_filters(self, snapshotter: SnapshotterLike) -> None:
        snapshotter.prepare("walk-a", "", {"team": "red", "dotted.key/x": "1"})
        snapshotter.commit("walk-base", "walk-a", {"team": "blue"})
        snapshotter.prepare("walk-b", "walk-base", {"team": "red"})
        snapshotter.view("walk-c", "walk-base", {"dotted.key/x": "2"})
        everything = {snapshot.key: snapshot for snapshot in snapshotter.walk() if snapshot.key.startswith("walk-")}
        assert set(everything) == {"walk-base", "walk-b", "walk-c"}
        assert all(snapshotter.stat(key) == snapshot for key, snapshot in everything.items())
        for filters, wanted in (
            (["labels.team==red"], {"walk-b"}),
            (['labels."dotted.key/x"'], {"walk-c"}),
            (['labels."dotted.key/x"==2', "labels.team==blue"], {"walk-c", "walk-base"}),
            (["parent==walk-base,labels.team!=red"], {"walk-c"}),
            (["name~=/^walk-[bc]$/"], {"walk-b", "walk-c"}),
        ):
            assert {snapshot.key for snapshot in snapshotter.walk(filters)} & set(everything) == wanted, filters
        with pytest.raises(ObdlabError, match="==="):
            snapshotter.walk(["name==="])

    def test_keys_are_taken_once(self, snapshotter: SnapshotterLike) -> None:
        snapshotter.prepare("taken", "", {})
        for make in (snapshotter.prepare, snapshotter.view):
            with pytest.raises(AlreadyExistsError):
                make("taken", "", {})
        snapshotter.commit("name", "taken", {})
        snapshotter.prepare("taken", "name", {})
        with pytest.raises(AlreadyExistsError):
            snapshotter.commit("name", "taken", {})
        assert snapshotter.stat("taken").kind is Kind.ACTIVE

    def test_parents_are_committed(self, snapshotter: SnapshotterLike) -> None:
        snapshotter.prepare("open", "", {})
        for make in (snapshotter.prepare, snapshotter.view):
            with pytest.raises(NotFoundError):
                make("child", "missing", {})
            with pytest.raises(InvalidArgumentError):
                make("child", "open", {})
        with pytest.raises(NotFoundError):
            snapshotter.stat("child")

    def test_only_active_snapshots_are_committed(self, snapshotter: SnapshotterLike) -> None:
        with pytest.raises(NotFoundError):
            snapshotter.commit("name", "missing", {})
        snapshotter.view("look", "", {})
        with pytest.raises(FailedPreconditionError):
            snapshotter.commit("name", "look", {})
        with pytest.raises(NotFoundError):
            snapshotter.stat("name")

    def test_mounts_are_for_active_snapshots_and_views(self, snapshotter: SnapshotterLike) -> None:
        with pytest.raises(NotFoundError):
            snapshotter.mounts("missing")
        snapshotter.prepare("key", "", {})
        snapshotter.commit("name", "key", {})
        with pytest.raises(FailedPreconditionError):
            snapshotter.mounts("name")

    def test_parents_outlive_their_children(self, snapshotter: SnapshotterLike) -> None:
        snapshotter.prepare("key", "", {})
        snapshotter.commit("base", "key", {})
        snapshotter.prepare("child", "base", {})
        snapshotter.commit("middle", "child", {})
        snapshotter.view("leaf", "middle", {})
        for key in ("base", "middle"):
            with pytest.raises(FailedPreconditionError, match="cannot remove snapshot with child"):
                snapshotter.remove(key)
        for key in ("leaf", "middle", "base"):
            snapshotter.remove(key)
            with pytest.raises(NotFoundError):
                snapshotter.remove(key)
        snapshotter.prepare("child", "", {})

    def test_labels_are_updated_by_path(self, snapshotter: SnapshotterLike) -> None:
        snapshotter.prepare("key", "", {"a": "1", "b.c/d": "2"})
        created = snapshotter.stat("key")
        updated = snapshotter.update("key", {"b.c/d": "3", "ignored": "x"}, ["labels.b.c/d"])
        assert updated.labels == {"a": "1", "b.c/d": "3"}
        assert updated.created_ns == created.created_ns
        assert updated.updated_ns >= created.updated_ns
        assert snapshotter.update("key", {"n": "4"}, ["labels"]).labels == {"n": "4"}
        assert snapshotter.update("key", {"n": "", "m": "5"}, ["labels.n", "labels.m"]).labels == {"m": "5"}
        assert snapshotter.update("key", {"o": "6"}, []).labels == {"o": "6"}
        assert snapshotter.stat("key").labels == {"o": "6"}
        with pytest.raises(InvalidArgumentError):
            snapshotter.update("key", {}, ["parent"])
        with pytest.raises(NotFoundError):
            snapshotter.update("missing", {}, ["labels"])

    def test_usage_counts_own_files_only(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        with self.mounted(snapshotter.prepare("key", "", {}), tmp_path) as root:
            (root / "big").write_bytes(os.urandom(MIB))
            os.link(root / "big", root / "again")
            os.sync()
        active = snapshotter.usage("key")
        assert MIB <= active.size < MIB + 64 * 1024
        assert active.inodes == 2
        snapshotter.commit("base", "key", {})
        assert snapshotter.usage("base") == active
        snapshotter.prepare("child", "base", {})
        assert snapshotter.usage("child").size < 64 * 1024
        with pytest.raises(NotFoundError):
            snapshotter.usage("missing")

    def test_deletions_and_renames_carry_on(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        with self.mounted(snapshotter.prepare("key1", "", {}), tmp_path) as root:
            for name in ("gone", "kept", "moved"):
                (root / name).mkdir()
                (root / name / "file").write_text(name)
        snapshotter.commit("one", "key1", {})
        with self.mounted(snapshotter.prepare("key2", "one", {}), tmp_path) as root:
            (root / "gone" / "file").unlink()
            (root / "gone").rmdir()
            (root / "gone").mkdir()
            os.chown(root / "kept" / "file", 12, 34)
            (root / "kept" / "file").chmod(0o4711)
            (root / "moved" / "file").rename(root / "moved" / "other")
        snapshotter.commit("two", "key2", {})
        with self.mounted(snapshotter.view("look", "two", {}), tmp_path) as root:
            assert list((root / "gone").iterdir()) == []
            status = (root / "kept" / "file").stat()
            assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o4711, 12, 34)
            assert [path.name for path in (root / "moved").iterdir()] == ["other"]

    def test_the_root_keeps_its_owner(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        with self.mounted(snapshotter.prepare("key", "", {}), tmp_path) as root:
            assert root.stat().st_mode & 0o7777 == 0o755
            os.chown(root, 123, 456)
        snapshotter.commit("one", "key", {})
        with self.mounted(snapshotter.prepare("top", "one", {}), tmp_path) as root:
            assert (root.stat().st_uid, root.stat().st_gid, root.stat().st_mode & 0o7777) == (123, 456, 0o755)

    def test_many_layers(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        parent = ""
        for number in range(self.deepest):
            mounts = snapshotter.prepare(f"key{number}", parent, {})
            if number in (0, self.deepest - 1):
                with self.mounted(mounts, tmp_path) as root:
                    (root / f"file{number}").write_text("x")
            parent = f"layer{number}"
            snapshotter.commit(parent, f"key{number}", {})
        with self.mounted(snapshotter.prepare("top", parent, {}), tmp_path) as root:
            assert sorted(path.name for path in root.iterdir()) == ["file0", f"file{self.deepest - 1}"]

    @pytest.mark.parametrize("key", ["a b", "/../../x", "ünï/ço:dé,\\=\"'", "x" * 3000, "-rf", "%00\t\n"])
    def test_odd_keys(self, snapshotter: SnapshotterLike, key: str) -> None:
        mounts = snapshotter.prepare(key, "", {"label": key[:1000]})
        assert snapshotter.mounts(key) == mounts
        name = f"{key} committed"
        snapshotter.commit(name, key, {"label": key[:1000]})
        assert snapshotter.stat(name).labels["label"] == key[:1000]
        snapshotter.view(key, name, {})
        assert snapshotter.stat(key).parent == name
        snapshotter.remove(key)
        snapshotter.remove(name)
        assert all(snapshot.key not in (key, name) for snapshot in snapshotter.walk())

    def test_concurrent_calls(self, snapshotter: SnapshotterLike, tmp_path: Path) -> None:
        self.layer(snapshotter, tmp_path, "base", "", a="1")

        def race(number: int) -> bool:
            try:
                snapshotter.prepare("same", "base", {})
            except AlreadyExistsError:
                won = False
            else:
                won = True
            for round_number in range(4):
                key = f"{number}-{round_number}"
                snapshotter.prepare(key, "base", {})
                snapshotter.commit(f"{key}-done", key, {})
                snapshotter.remove(f"{key}-done")
            return won

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(race, range(8))) == 1
        assert {snapshot.key for snapshot in snapshotter.walk()} >= {"base", "same"}
        with self.mounted(snapshotter.mounts("same"), tmp_path) as root:
            assert (root / "a").read_text() == "1"
