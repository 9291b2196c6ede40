"""BuildKit's calls on an overlaybd snapshotter (0.22 and later), played against the socket: a build on a lazy base.

By contract: BuildKit itself is not packaged for Debian 13. The calls and their order are those of its worker with the
snapshotter "overlaybd" (pull without data, steps on writable devices, commit by the original's tool, export, prune).
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from obdlab.formats import oci
from obdlab.image.config import ImageConfig
from obdlab.image.open import open_image
from obdlab.registry.client import RegistryClient
from obdlab.registry.credentials import Credentials
from obdlab.registry.reference import Reference
from obdlab.settings.settings import Settings
from obdlab.snapshotter.errors import AlreadyExistsError, FailedPreconditionError, NotFoundError
from obdlab.snapshotter.store import Kind
from obdlab.snapshotter.writable import LABEL_COMMIT_PATH, LABEL_WRITABLE
from obdlab.volumes.detect import FileTree
from tests import capabilities
from tests.containerd_host import SnapshotterProcess
from tests.e2e.conftest import BIG
from tests.e2e.running import blob_bytes
from tests.snapshotter.mounting import mounted
from tests.snapshotter.wire import WireSnapshotter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.snapshotter.mounts import Mount
    from tests.registry.server import RegistryServer

pytestmark = [pytest.mark.containerd, pytest.mark.registry]

DEV = {LABEL_WRITABLE: "dev"}
_STARGZ = "containerd.io/snapshot/remote/stargz."


class Builder:
    """The part of BuildKit that speaks to a snapshotter: its own process, no containerd."""

    def __init__(self, address: Path, work: Path) -> None:
        self.wire = WireSnapshotter(str(address))
        self._work = work
        self._numbers = itertools.count(1)
        self._opt = installed_tools(work / "opt")

    def new_id(self) -> str:
        return f"{next(self._numbers):025d}"

    def pull(self, image: str) -> list[str]:
        """Pull without data; return the names of the layers' snapshots, bottom first."""
        reference = Reference.parse(image)
        with closing(RegistryClient(Credentials.load(None))) as client:
            manifest = oci.Manifest.parse(client.get_manifest(reference).data, image)
        names: list[str] = []
        chain = ""
        for layer in manifest.layers:
            chain, parent = oci.chain_id_over(chain, layer.digest), chain
            names.append(chain)
            labels = {
                key: value for key, value in layer.annotations.items() if key.startswith("containerd.io/snapshot/")
            }
            labels |= {
                f"{_STARGZ}reference": image,
                f"{_STARGZ}digest": layer.digest,
                f"{_STARGZ}layers": ",".join(each.digest for each in manifest.layers),
                "containerd.io/snapshot/cri.image-ref": image,
                "containerd.io/snapshot.ref": chain,
            }
            with pytest.raises(NotFoundError):
                self.wire.stat(chain)
            with pytest.raises(AlreadyExistsError):
                self.wire.prepare(f"tmp-{self.new_id()} {chain}", parent, labels)
            assert self.wire.stat(chain).kind is Kind.COMMITTED
        return names

    def step(self, parent: str, command: str) -> str:
        """Run a command on a writable snapshot and commit it; return the committed snapshot's name."""
        key, name = self.new_id(), self.new_id()
        mounts = self.wire.prepare(key, parent, DEV)
        assert mounts == self.wire.mounts(key)  # the executor asks again
        assert [mount.type for mount in mounts] == ["ext4"]
        with mounted_device(mounts, self._work / key) as rootfs:
            subprocess.run(["chroot", rootfs, "/bin/busybox", "sh", "-ec", command], check=True)
        self.wire.commit(name, key, {})
        return name

    def merge(self, *diffs: tuple[str, str]) -> str:
        """Make a committed snapshot of the differences (lower, upper), from nothing on; return its name.

        So BuildKit makes the results of its operations "merge" and "diff" with a snapshotter that it does not know as
        one of overlays. There is no label: the snapshot is an ordinary one.
        """
        key, name = self.new_id(), self.new_id()
        self.wire.prepare(key, "", {})
        (mount,) = mounts = self.wire.mounts(key)
        assert mount.type == "bind"
        with mounted(mounts, self._work / key) as target:
            for diff in diffs:
                views = [self.new_id() for _ in diff]
                with ExitStack() as stack:
                    lower, upper = (
                        stack.enter_context(mounted(self.wire.view(view, of, DEV), self._work / view))
                        for view, of in zip(views, diff, strict=True)
                    )
                    for path in upper.iterdir():
                        before = lower / path.name
                        if path.is_file() and (not before.exists() or before.read_bytes() != path.read_bytes()):
                            shutil.copy2(path, target)
                for view in views:
                    self.wire.remove(view)
        usage = {"buildkit.mergeUsageSize": "4096", "buildkit.mergeUsageInodes": "2"}
        self.wire.commit(name, key, usage)
        assert self.wire.stat(name).labels == usage
        return name

    def step_on_merged(self, parent: str, name: str) -> str:
        """Write a file on a merged snapshot: BuildKit asks for a device, and takes the overlay that it gets."""
        key, committed = self.new_id(), self.new_id()
        self.wire.prepare(key, parent, DEV)
        mounts = self.wire.mounts(key)
        assert [mount.type for mount in mounts] == ["overlay"]
        with mounted(mounts, self._work / key) as rootfs:
            (rootfs / name).write_text(f"{name}\n")
        self.wire.commit(committed, key, {})
        # BuildKit's own differ exports it.
        assert LABEL_COMMIT_PATH not in self.wire.stat(committed).labels
        return committed

    def look(self, name: str, path: str) -> str:
        """Read a file of a committed snapshot, as COPY --from does."""
        key = self.new_id()
        mounts = self.wire.view(key, name, DEV)
        try:
            with mounted(mounts, self._work / key) as rootfs:
                with pytest.raises(OSError, match="Read-only"):
                    (rootfs / "new").touch()
                return (rootfs / path).read_text()
        finally:
            self.wire.remove(key)

    def export(self, name: str, parent: str) -> bytes:
        """Return the blob of a committed snapshot."""
        lower, upper = self.new_id(), self.new_id()  # mounted for a diff that is not made
        for key, of in ((lower, parent), (upper, name)):
            self.wire.view(key, of, DEV)
        directory = Path(self.wire.stat(name).labels[LABEL_COMMIT_PATH]).parent
        committed = directory / "overlaybd.commit"
        commit_tool(self._opt, directory / "overlaybd.sealed", directory / "overlaybd.commit.temp")
        (directory / "overlaybd.commit.temp").rename(committed)
        for key in (upper, lower):
            self.wire.remove(key)
        return committed.read_bytes()


def mounted_device(mounts: list[Mount], target: Path):
    (mount,) = mounts
    target.mkdir()
    options = ",".join(mount.options)
    subprocess.run(["mount", "-t", mount.type, "-o", options, mount.source, target], check=True)
    return _Mounted(target)


class _Mounted:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        return self._target

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self._target], check=True)


def installed_tools(opt: Path) -> Path:
    """Install the original's tools at their places, in a mount namespace that has ``opt`` at /opt; return ``opt``."""
    opt.mkdir()
    within_opt(opt, sys.executable, "-m", "obdlab", "install-tools")
    assert (opt / "overlaybd/bin/overlaybd-commit").is_file()
    return opt


def within_opt(opt: Path, *command: str | Path) -> None:
    """Run a command in a mount namespace that has ``opt`` at /opt."""
    script = 'mount --make-rprivate / && mount --bind "$0" /opt && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, opt, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def commit_tool(opt: Path, sealed: Path, target: Path) -> None:
    """Run the tool as BuildKit does, by its fixed path."""
    tool = "/opt/overlaybd/bin/overlaybd-commit"
    within_opt(opt, tool, "--commit_sealed", sealed, target, "-t", "-z", "-f")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[SnapshotterProcess]:
    capabilities.require("kernel")
    process = SnapshotterProcess(tmp_path / "snapshotter")
    try:
        process.start()
        yield process
    finally:
        process.take_down()


@pytest.fixture
def builder(service: SnapshotterProcess, tmp_path: Path) -> Iterator[Builder]:
    (tmp_path / "work").mkdir()
    made = Builder(service.address, tmp_path / "work")
    yield made
    made.wire.close()


def test_a_build_on_a_lazy_base(
    builder: Builder, service: SnapshotterProcess, registry_server: RegistryServer, image: str, tmp_path: Path
) -> None:
    before = blob_bytes(registry_server)
    base = builder.pull(image)
    # RUN, RUN, RUN: each on the one before, which is only sealed.
    one = builder.step(base[-1], "echo one > /one; echo changed > /etc/issue")
    two = builder.step(one, "/bin/busybox cat /one > /two; /bin/busybox rm /one")
    # Stages that run at the same time on one parent, two of them from a step and one from the base.
    with ThreadPoolExecutor(3) as pool:
        stages = [
            pool.submit(builder.step, parent, f"echo {name} > /{name}")
            for parent, name in ((two, "left"), (two, "right"), (base[-1], "apart"))
        ]
        left, right, apart = (stage.result() for stage in stages)
    assert builder.look(left, "left") == "left\n"
    assert builder.look(apart, "etc/issue") == "on top\n"
    with pytest.raises(FileNotFoundError):
        builder.look(right, "left")
    four = builder.step(left, f"echo {builder.look(right, 'right').strip()} > /copied")

    chain = [one, two, left, four]
    blobs = [builder.export(name, parent) for parent, name in zip([base[-1], *chain], chain, strict=False)]
    assert blob_bytes(registry_server) - before < len(BIG)  # the base was never read whole
    result = disk_of(service, base, blobs, tmp_path)
    tree = FileTree(result)
    expected = {"etc/issue": "changed\n", "two": "one\n", "left": "left\n", "copied": "right\n"}
    assert {name: text(tree, name) for name in expected} == expected
    assert b"one" not in tree.entries(tree.root)
    assert b"right" not in tree.entries(tree.root)
    result.close()
    # A step on exported ones: their snapshots now have a sealed and a committed layer file.
    five = builder.step(four, "/bin/busybox cat /copied > /five")
    assert builder.look(five, "five") == "right\n"

    # Merge: the differences of two stages, from nothing on. Diff: that of one step.
    merged = builder.merge((two, left), (two, right))
    assert [builder.look(merged, name) for name in ("left", "right")] == ["left\n", "right\n"]
    with pytest.raises(FileNotFoundError):
        builder.look(merged, "two")
    difference = builder.merge((one, two))
    assert builder.look(difference, "two") == "one\n"
    on_merged = builder.step_on_merged(merged, "more")
    assert [builder.look(on_merged, name) for name in ("left", "more")] == ["left\n", "more\n"]

    prune(builder, [*base, *chain, right, apart, five, merged, difference, on_merged])
    assert service.devices.list() == []
    assert list((service.root / "snapshots").iterdir()) == []


def prune(builder: Builder, names: list[str]) -> None:
    """Remove in the order of BuildKit's cache: no snapshot before its children, which alone refuse it."""
    children = {name: [row.key for row in builder.wire.walk() if row.parent == name] for name in names}
    parent = next(name for name in names if children[name])
    with pytest.raises(FailedPreconditionError, match="cannot remove snapshot with child"):
        builder.wire.remove(parent)
    while names:
        free = [name for name in names if not any(row.parent == name for row in builder.wire.walk())]
        assert free
        for name in free:
            builder.wire.remove(name)
        names = [name for name in names if name not in free]
    assert builder.wire.walk() == []


def disk_of(service: SnapshotterProcess, base: list[str], blobs: list[bytes], directory: Path):
    """The image that a build pushes: the base's layers and the new blobs, in files of their own."""
    wire = WireSnapshotter(str(service.address))
    config = next(
        ImageConfig.load(path)
        for path in (service.root / "snapshots").glob("*/block/config.v1.json")
        if len(ImageConfig.load(path).lowers) == len(base) and not ImageConfig.load(path).upper.active
    )
    wire.close()
    values = config.to_json()
    values["resultFile"] = ""
    for number, blob in enumerate(blobs):
        file = directory / f"new{number}.obd"
        file.write_bytes(blob)
        values["lowers"].append({"file": str(file)})
    path = directory / "result.json"
    ImageConfig.from_json(values).save(path)
    return open_image(path, Settings(cache_dir=directory / "result-cache"), traces=False)


def text(tree: FileTree, name: str) -> str:
    return b"".join(tree.content(tree.find(os.fsencode(name)))).decode()


def test_a_step_that_is_given_up_leaves_nothing(
    builder: Builder, service: SnapshotterProcess, image: str, tmp_path: Path
) -> None:
    base = builder.pull(image)
    key = builder.new_id()
    mounts = builder.wire.prepare(key, base[-1], DEV)
    with mounted_device(mounts, tmp_path / "mnt") as rootfs:
        (rootfs / "half").write_text("made")
        with pytest.raises(FailedPreconditionError, match="in use"):
            builder.wire.commit("never", key, {})
    builder.wire.remove(key)
    with pytest.raises(NotFoundError):
        builder.wire.mounts(key)
    with pytest.raises(NotFoundError):
        builder.wire.stat("never")
    assert [path.name for path in service.root.rglob("writable_*")] == []
    for name in reversed(base):
        builder.wire.remove(name)
    assert service.devices.list() == []
    assert list((service.root / "snapshots").iterdir()) == []


def test_a_layer_that_is_none_of_ours_is_left_to_buildkit(builder: Builder, image: str) -> None:
    # The answer is an ordinary one: BuildKit removes the key and unpacks the layer itself.
    chain = "sha256:" + "3" * 64
    labels = {"containerd.io/snapshot/cri.image-ref": image, "containerd.io/snapshot.ref": chain}
    key = f"tmp-{builder.new_id()} {chain}"
    assert [mount.type for mount in builder.wire.prepare(key, "", labels)] == ["bind"]
    with pytest.raises(NotFoundError):
        builder.wire.stat(chain)
    builder.wire.remove(key)
    # A step without a base: BuildKit gives no label then, and a device has no place on the ordinary layer.
    (mount,) = builder.wire.prepare(builder.new_id(), "", {})
    assert mount.type == "bind"
