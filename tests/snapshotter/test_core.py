"""What the core does beyond containerd's contract: pulls of overlaybd layers, leftovers, locks. No devices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from obdlab.errors import DeviceError
from obdlab.formats import oci
from obdlab.image.config import ImageConfig
from obdlab.server.client import DeviceService
from obdlab.settings.settings import Settings
from obdlab.snapshotter.core import Snapshotter
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.imagemounts import ImageDevices
from obdlab.snapshotter.layout import Layout, RootError
from obdlab.snapshotter.overlaybd import ImageOptions
from obdlab.snapshotter.store import Kind, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIGESTS = ["sha256:" + digit * 64 for digit in "123"]
#: What containerd calls these layers, each upon the one before.
CHAIN = oci.chain_ids(DIGESTS)


def open_snapshotter(directory: Path, **options: Any) -> Snapshotter:
    layout = Layout(directory / "root")
    try:
        images = ImageDevices(
            layout, DeviceService(directory / "run", Settings(cache_dir=directory / "cache", index_at_pull=False))
        )
        return Snapshotter(layout, images, ImageOptions(plain_http_hosts=frozenset({"plain.test:5000"}), **options))
    except BaseException:
        layout.close()
        raise


@pytest.fixture
def snapshotter(tmp_path: Path) -> Iterator[Snapshotter]:
    snapshotter = open_snapshotter(tmp_path)
    yield snapshotter
    snapshotter.close()


def pull_labels(number: int = 0, image: str = "registry.test/a/b:tag", **more: str) -> dict[str, str]:
    return {
        "containerd.io/snapshot.ref": CHAIN[number],
        "containerd.io/snapshot/image-ref": image,
        oci.BLOB_DIGEST: DIGESTS[number],
        oci.BLOB_SIZE: str(1000 + number),
        **more,
    }


def pull(snapshotter: Snapshotter, number: int = 0, parent: str = "", **more: str) -> None:
    with pytest.raises(AlreadyExistsError, match=CHAIN[number]):
        snapshotter.prepare(f"extract-{number}", parent, pull_labels(number, **more))


def root(tmp_path: Path) -> Path:
    return tmp_path / "root" / "snapshots"


def test_a_pulled_layer_is_committed_at_once(snapshotter: Snapshotter, tmp_path: Path) -> None:
    pull(snapshotter)
    snapshot = snapshotter.stat(CHAIN[0])
    assert snapshot.kind is Kind.COMMITTED
    assert snapshot.labels == pull_labels() | {"containerd.io/snapshot/remote": "remote snapshot"}
    with pytest.raises(NotFoundError):
        snapshotter.stat("extract-0")
    # containerd finds it again with this filter.
    found = snapshotter.walk([f'labels."containerd.io/snapshot.ref"=={CHAIN[0]},parent==""'])
    assert found == [snapshot]
    assert (root(tmp_path) / "1" / "image_ref").read_text() == "registry.test/a/b:tag"


def test_the_configuration_is_the_originals(snapshotter: Snapshotter, tmp_path: Path) -> None:
    pull(snapshotter)
    pull(snapshotter, 1, CHAIN[0])
    path = root(tmp_path) / "2" / "block" / "config.v1.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.dumps(json.loads(path.read_bytes())) == json.dumps(
        {
            "repoBlobUrl": "https://registry.test/v2/a/b/blobs",
            "lowers": [
                {"digest": DIGESTS[0], "size": 1000, "dir": f"{root(tmp_path)}/1/fs"},
                {"digest": DIGESTS[1], "size": 1001, "dir": f"{root(tmp_path)}/2/fs"},
            ],
            "upper": {},
            "resultFile": f"{root(tmp_path)}/2/block/init-debug.log",
        }
    )


def test_an_acceleration_layer_is_marked_and_the_top(snapshotter: Snapshotter, tmp_path: Path) -> None:
    pull(snapshotter)
    pull(snapshotter, 1, CHAIN[0], **{oci.ACCELERATION_LAYER: "yes"})
    config = ImageConfig.load(root(tmp_path) / "2" / "block" / "config.v1.json")
    assert config.acceleration_layer
    assert [lower.digest for lower in config.lowers] == DIGESTS[:2]
    with pytest.raises(FailedPreconditionError, match="must be the top"):
        snapshotter.prepare("extract", CHAIN[1], pull_labels(2))


def test_a_hot_layer_is_marked(snapshotter: Snapshotter, tmp_path: Path) -> None:
    pull(snapshotter)
    pull(snapshotter, 1, CHAIN[0], **{oci.HOT_LAYER: "yes"})
    config = ImageConfig.load(root(tmp_path) / "2" / "block" / "config.v1.json")
    assert [lower.hot for lower in config.lowers] == [False, True]


def test_a_hash_tree_is_in_the_configuration(snapshotter: Snapshotter, tmp_path: Path) -> None:
    tree = f"{DIGESTS[2]},{DIGESTS[1]}"
    pull(snapshotter, **{oci.HASH_TREE: tree})
    pull(snapshotter, 1, CHAIN[0])
    config = ImageConfig.load(root(tmp_path) / "2" / "block" / "config.v1.json")
    assert [lower.hash_tree for lower in config.lowers] == [tree, ""]


def test_a_pulled_layer_is_primed_with_its_hash_tree(
    snapshotter: Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    primed: list[ImageConfig] = []
    monkeypatch.setattr(ImageDevices, "prime", lambda _self, image: primed.append(image))
    tree = f"{DIGESTS[2]},{DIGESTS[1]}"
    pull(snapshotter, **{oci.HASH_TREE: tree})
    assert [(lower.digest, lower.size, lower.hash_tree) for lower in primed[0].lowers] == [(DIGESTS[0], 1000, tree)]
    assert len(primed) == 1


@pytest.mark.parametrize("text", ["x", "sha256:12,sha256:34", f"{DIGESTS[0]},{DIGESTS[0]},x"])
def test_a_malformed_hash_tree_is_refused_and_not_ignored(snapshotter: Snapshotter, text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"obdlab/hash-tree: not a digest"):
        snapshotter.prepare("key", "", pull_labels() | {oci.HASH_TREE: text})


@pytest.mark.parametrize(
    ("image", "url"),
    [
        ("redis", "https://registry-1.docker.io/v2/library/redis/blobs"),
        ("localhost:5000/x:1", "http://localhost:5000/v2/x/blobs"),
        ("127.77.0.2/x@sha256:" + "0" * 64, "http://127.77.0.2/v2/x/blobs"),
        ("plain.test:5000/a/b", "http://plain.test:5000/v2/a/b/blobs"),
        ("plain.test/a/b", "https://plain.test/v2/a/b/blobs"),
    ],
)
def test_where_blobs_come_from(snapshotter: Snapshotter, tmp_path: Path, image: str, url: str) -> None:
    with pytest.raises(AlreadyExistsError):
        snapshotter.prepare("key", "", pull_labels(image=image))
    assert ImageConfig.load(root(tmp_path) / "1" / "block" / "config.v1.json").repo_blob_url == url


def test_the_kubelets_reference_serves_too(snapshotter: Snapshotter, tmp_path: Path) -> None:
    labels = pull_labels() | {"containerd.io/snapshot/cri.image-ref": "registry.test/cri:1"}
    del labels["containerd.io/snapshot/image-ref"]
    with pytest.raises(AlreadyExistsError):
        snapshotter.prepare("key", "", labels)
    assert (root(tmp_path) / "1" / "image_ref").read_text() == "registry.test/cri:1"


def test_a_pull_into_itself_is_refused(snapshotter: Snapshotter) -> None:
    with pytest.raises(InvalidArgumentError, match="another name"):
        snapshotter.prepare(CHAIN[0], "", pull_labels())
    assert snapshotter.walk() == []


def test_an_image_is_pulled_again_after_all_of_it_was_removed(snapshotter: Snapshotter, tmp_path: Path) -> None:
    for _ in range(2):
        pull(snapshotter)
        pull(snapshotter, 1, CHAIN[0])
        snapshotter.remove(CHAIN[1])
        snapshotter.remove(CHAIN[0])
        assert list(root(tmp_path).iterdir()) == []
    pull(snapshotter)
    assert [path.name for path in root(tmp_path).iterdir()] == ["5"]  # a number is given out once


def test_overlays_in_a_user_namespace() -> None:
    command = [sys.executable, "-c", "from obdlab.snapshotter.mounts import *; print(kernel_overlay_options())"]
    assert "userxattr" not in subprocess.check_output(command, text=True, cwd=Path(__file__).parents[2])
    inside = subprocess.run(
        ["unshare", "-U", "-r", *command], capture_output=True, text=True, check=False, timeout=60
    )
    if inside.returncode != 0:
        pytest.skip(f"no user namespaces here: {inside.stderr}")
    assert "userxattr" in inside.stdout


def test_a_layer_pulled_twice_is_one_snapshot(snapshotter: Snapshotter, tmp_path: Path) -> None:
    pull(snapshotter)
    pull(snapshotter)
    assert [snapshot.key for snapshot in snapshotter.walk()] == [CHAIN[0]]
    assert [path.name for path in root(tmp_path).iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("labels", "error", "text"),
    [
        ({oci.BLOB_SIZE: "ten"}, InvalidArgumentError, "blob-size"),
        ({oci.BLOB_SIZE: "-1"}, InvalidArgumentError, "blob-size"),
        ({oci.BLOB_SIZE: "٣"}, InvalidArgumentError, "blob-size"),
        ({oci.BLOB_SIZE: "9" * 40}, InvalidArgumentError, "blob-size"),
        ({oci.BLOB_SIZE: "0" * 20 + "9" * 40}, InvalidArgumentError, "blob-size"),
        ({oci.BLOB_SIZE: "0123"}, InvalidArgumentError, "blob-size"),
        ({oci.BLOB_DIGEST: "sha256:../../etc"}, InvalidArgumentError, "blob-digest"),
        ({"containerd.io/snapshot/image-ref": "NOT a ref"}, InvalidArgumentError, "image-ref"),
        ({oci.ACCELERATION_LAYER: "yes"}, FailedPreconditionError, "acceleration layer"),
        ({oci.TURBO_TARGET_DIGEST: DIGESTS[1]}, FailedPreconditionError, "media type"),
    ],
)
def test_what_cannot_be_served_is_refused(
    snapshotter: Snapshotter, tmp_path: Path, labels: dict[str, str], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        snapshotter.prepare("key", "", pull_labels() | labels)
    assert snapshotter.walk() == []
    assert list(root(tmp_path).iterdir()) == []


@pytest.mark.parametrize(("missing", "text"), [(oci.BLOB_SIZE, "blob-size"), (oci.BLOB_DIGEST, "blob-digest")])
def test_half_a_description_of_a_layer_is_refused(snapshotter: Snapshotter, missing: str, text: str) -> None:
    """Without both labels it is a plain layer. With one, unpacking the blob would put garbage into the container."""
    labels = pull_labels()
    del labels[missing]
    with pytest.raises(InvalidArgumentError, match=text):
        snapshotter.prepare("key", "", labels)
    assert snapshotter.walk() == []


def test_an_overlaybd_layer_does_not_lie_on_a_plain_one(snapshotter: Snapshotter, tmp_path: Path) -> None:
    snapshotter.prepare("key", "", {})
    snapshotter.commit("plain", "key", {"containerd.io/snapshot.ref": CHAIN[0]})
    with pytest.raises(FailedPreconditionError, match="lies on"):
        snapshotter.prepare("extract", "plain", pull_labels(1))
    assert [path.name for path in root(tmp_path).iterdir()] == ["1"]
    # The next snapshot is not in its way.
    pull(snapshotter)


def test_a_plain_layer_of_a_pull_is_unpacked(snapshotter: Snapshotter) -> None:
    (mount,) = snapshotter.prepare("extract", "", {"containerd.io/snapshot.ref": "chain"})
    assert (mount.type, mount.options) == ("bind", ("rw", "rbind"))


ZFILE_MAGIC = bytes.fromhex("5a46696c65000100") + b"tuji.yyf@Alibaba"


def downloaded(
    snapshotter: Snapshotter, tmp_path: Path, name: str, parent: str = "", data: bytes = b"", chain: str = ""
) -> Path:
    """Do as a client does that knows nothing of overlaybd; return the layer's directory."""
    snapshotter.prepare(f"extract {name}", parent, {})
    directory = max(root(tmp_path).iterdir(), key=lambda path: int(path.name))
    (directory / "fs" / "overlaybd.commit").write_bytes(data or ZFILE_MAGIC)
    snapshotter.commit(name, f"extract {name}", {"containerd.io/snapshot.ref": chain})
    return directory


def test_a_downloaded_layer_becomes_part_of_the_device(snapshotter: Snapshotter, tmp_path: Path) -> None:
    directory = downloaded(snapshotter, tmp_path, "one", chain=CHAIN[0])
    config = ImageConfig.load(directory / "block" / "config.v1.json")
    assert [lower.to_json() for lower in config.lowers] == [{"dir": f"{directory}/fs"}]
    pull(snapshotter, 1, "one")
    config = ImageConfig.load(root(tmp_path) / "2" / "block" / "config.v1.json")
    assert config.repo_blob_url == "https://registry.test/v2/a/b/blobs"
    assert [lower.dir for lower in config.lowers] == [f"{directory}/fs", f"{root(tmp_path)}/2/fs"]


def test_what_only_looks_like_a_layer_is_none(snapshotter: Snapshotter, tmp_path: Path) -> None:
    directory = downloaded(snapshotter, tmp_path, "other", data=b"x" * 100)
    assert not (directory / "block").exists()
    snapshotter.prepare("key", "", {})
    (root(tmp_path) / "2" / "fs" / "overlaybd.commit").write_bytes(ZFILE_MAGIC)
    (root(tmp_path) / "2" / "fs" / "more").touch()
    snapshotter.commit("more", "key", {})
    assert not (root(tmp_path) / "2" / "block").exists()
    snapshotter.prepare("key", "", {})
    (root(tmp_path) / "3" / "fs" / "overlaybd.commit").symlink_to(directory / "fs" / "overlaybd.commit")
    snapshotter.commit("link", "key", {})
    assert not (root(tmp_path) / "3" / "block").exists()
    snapshotter.prepare("key", "", {})
    os.mkfifo(root(tmp_path) / "4" / "fs" / "overlaybd.commit")
    snapshotter.commit("pipe", "key", {})
    assert not (root(tmp_path) / "4" / "block").exists()


def test_a_downloaded_layer_does_not_lie_on_a_plain_one(snapshotter: Snapshotter, tmp_path: Path) -> None:
    snapshotter.prepare("key", "", {})
    snapshotter.commit("plain", "key", {})
    with pytest.raises(FailedPreconditionError, match="lies on"):
        downloaded(snapshotter, tmp_path, "layer", "plain")
    assert snapshotter.stat("extract layer").kind is Kind.ACTIVE
    assert not (root(tmp_path) / "2" / "block").exists()


class StuckImages:
    """Mounts nothing, and has devices that cannot be taken away."""

    def check_place(self) -> None:
        pass

    def admitted(self, snapshot_id: int) -> AbstractContextManager[None]:
        return nullcontext()

    def mount(
        self, snapshot_id: int, spec: object, asked_s: float, mode: object = None, *, make: bool = False
    ) -> Path:
        pass

    def prime(self, image: object) -> None:
        pass

    def release(self, snapshot_id: int) -> None:
        raise DeviceError("another attach or detach of it is still going on")


def test_a_commit_stands_although_the_device_below_stays(tmp_path: Path) -> None:
    snapshotter = Snapshotter(Layout(tmp_path / "root"), StuckImages(), ImageOptions())
    try:
        downloaded(snapshotter, tmp_path, "one")
        downloaded(snapshotter, tmp_path, "two", "one")
        assert snapshotter.stat("two").kind is Kind.COMMITTED
        with pytest.raises(DeviceError):  # whoever wants it away is told
            snapshotter.remove("two")
    finally:
        snapshotter.close()


def test_removed_files_are_gone_at_once(snapshotter: Snapshotter, tmp_path: Path) -> None:
    snapshotter.prepare("key", "", {})
    (root(tmp_path) / "1" / "fs" / "file").write_text("x")
    snapshotter.remove("key")
    assert list(root(tmp_path).iterdir()) == []


def test_leftovers_go_and_snapshots_stay(snapshotter: Snapshotter, tmp_path: Path) -> None:
    snapshotter.prepare("key", "", {})
    for name in ("new-abc", "77", "strange"):
        (root(tmp_path) / name / "fs").mkdir(parents=True)
    snapshotter.cleanup()
    assert [path.name for path in root(tmp_path).iterdir()] == ["1"]
    (root(tmp_path) / "2" / "fs").mkdir(parents=True)
    snapshotter.prepare("next", "", {})  # gets the number of the leftover
    snapshotter.close()
    (root(tmp_path) / "new-abc").mkdir()
    again = open_snapshotter(tmp_path)
    assert sorted(path.name for path in root(tmp_path).iterdir()) == ["1", "2"]
    assert {snapshot.key for snapshot in again.walk()} == {"key", "next"}
    again.close()


def test_a_root_has_one_snapshotter(snapshotter: Snapshotter, tmp_path: Path) -> None:
    with pytest.raises(RootError, match="another snapshotter"):
        open_snapshotter(tmp_path)
    snapshotter.close()
    snapshotter.close()
    open_snapshotter(tmp_path).close()


def test_bad_roots_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RootError, match="file"):
        Layout(tmp_path / "file")
    with pytest.raises(RootError, match="overlay"):
        Layout(tmp_path / "a:b")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "metadata.sqlite").write_bytes(b"x" * 5000)
    with pytest.raises(StoreError, match="metadata"):
        open_snapshotter(tmp_path)


# Every call below is a step at which a kill -9 leaves something half done.
STEPS = ["os.mkdir", "os.chmod", "os.rename", "os.replace", "os.rmdir", "os.unlink", "COMMIT", "after COMMIT"]
KILLED = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from tests.snapshotter.test_core import CHAIN, open_snapshotter, pull_labels
    import obdlab.snapshotter.store as store

    step, count, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    snapshotter = open_snapshotter(directory)

    def killing(function, when_after=False):
        def wrapped(*args, **kwargs):
            global count
            count -= 1
            if count == 0 and not when_after:
                os.kill(os.getpid(), 9)
            result = function(*args, **kwargs)
            if count == 0:
                os.kill(os.getpid(), 9)
            return result
        return wrapped

    class Connection:
        def __init__(self, real):
            self.real = real
            self.commit = killing(real.execute, when_after=step == "after COMMIT")
        def execute(self, text, *rest):
            return (self.commit if text == "COMMIT" else self.real.execute)(text, *rest)
        def __getattr__(self, name):
            return getattr(self.real, name)

    if "COMMIT" in step:
        snapshotter._store._writer = Connection(snapshotter._store._writer)
    else:
        name = step.removeprefix("os.")
        setattr(os, name, killing(getattr(os, name)))
    snapshotter.prepare("new", "base", {})
    snapshotter.commit("committed", "new", {})
    try:
        snapshotter.prepare("extract", "", pull_labels())
    except store.AlreadyExistsError:
        pass
    snapshotter.remove("committed")
    snapshotter.remove(CHAIN[0])
    snapshotter.remove("old")
""")


@pytest.mark.parametrize("step", STEPS)
def test_kill_at_every_step_leaves_a_consistent_root(tmp_path: Path, step: str) -> None:
    snapshotter = open_snapshotter(tmp_path)
    for key, name in (("key", "base"), ("key", "old")):
        snapshotter.prepare(key, "", {})
        snapshotter.commit(name, key, {})
    snapshotter.close()
    kills = 0
    for count in range(1, 40):
        trial = tmp_path / "trial"
        shutil.copytree(tmp_path / "root", trial / "root")
        done = subprocess.run(
            [sys.executable, "-c", KILLED, step, str(count), str(trial)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        check_consistent(trial)
        shutil.rmtree(trial)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert 1 <= kills < 39


def check_consistent(directory: Path) -> None:
    snapshotter = open_snapshotter(directory)
    snapshots = snapshotter.walk()
    keys = {snapshot.key for snapshot in snapshots}
    assert "base" in keys
    assert keys <= {"base", "old", "new", "committed", CHAIN[0]}
    assert not {"new", "committed"} <= keys
    directories = {path.name for path in root(directory).iterdir()}
    assert directories == {str(snapshot.id) for snapshot in snapshots}
    for snapshot in snapshots:
        assert (root(directory) / str(snapshot.id) / "fs").is_dir()
        if snapshot.key == CHAIN[1]:
            ImageConfig.load(root(directory) / str(snapshot.id) / "block" / "config.v1.json")
    snapshotter.prepare("works", "base", {})
    snapshotter.close()
