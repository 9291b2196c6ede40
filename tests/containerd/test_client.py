"""Images, leases, snapshots and the differ against a real containerd, and the wire contracts with it."""

from __future__ import annotations

import io
import socket
import tarfile
import time
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd.client import Containerd
from obdlab.containerd.errors import (
    AlreadyExistsError,
    ContainerdError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from obdlab.containerd.images import Image
from obdlab.containerd.snapshots import Kind, Mount
from obdlab.errors import ObdlabError
from obdlab.formats.oci import OCI_LAYER, digest_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.containerd.host import ContainerdHost

pytestmark = pytest.mark.containerd


def test_version(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    version = containerd.version()
    printed = containerd_host.ctr("version")
    assert version.version in printed
    assert version.revision in printed


def test_nobody_there(tmp_path: Path) -> None:
    with (
        Containerd(str(tmp_path / "none.sock")) as client,
        pytest.raises(UnavailableError, match=r"none\.sock.*No such file"),
    ):
        client.version()


def test_somebody_who_never_answers(tmp_path: Path) -> None:
    address = str(tmp_path / "silent.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        with Containerd(address, timeout_s=0.2) as client, pytest.raises(DeadlineError, match=r"silent\.sock"):
            client.version()


def test_every_error_is_ours() -> None:
    assert issubclass(ContainerdError, ObdlabError)


class TestImages:
    IMAGE = Image("example.test/a:1", "application/x", digest_of(b"a"), 1, {"k.with/dots": "1"})

    def test_put_get_list_delete(self, containerd: Containerd) -> None:
        with containerd.lease(expire_s=60) as leased:
            leased.content.write(digest_of(b"a"), b"a")
            containerd.images.put(self.IMAGE)
        assert containerd.images.get(self.IMAGE.name) == self.IMAGE
        assert containerd.images.list() == [self.IMAGE]
        assert containerd.images.list("name==other") == []
        containerd.images.delete(self.IMAGE.name, sync=True)
        assert not containerd.content.exists(digest_of(b"a"))
        for call in (containerd.images.get, containerd.images.delete):
            with pytest.raises(NotFoundError, match="image"):
                call(self.IMAGE.name)

    def test_put_again_moves_target_and_keeps_other_labels(self, containerd: Containerd) -> None:
        containerd.images.put(self.IMAGE)
        containerd.images.put(Image(self.IMAGE.name, "application/y", digest_of(b"b"), 2, {"second.one": "2"}))
        assert containerd.images.get(self.IMAGE.name) == Image(
            self.IMAGE.name, "application/y", digest_of(b"b"), 2, {"k.with/dots": "1", "second.one": "2"}
        )


class TestLeases:
    def test_lease_holds_and_its_end_lets_go(self, containerd: Containerd) -> None:
        with containerd.lease(expire_s=60) as leased:
            leased.content.write(digest_of(b"held"), b"held")
            leased.snapshots("overlayfs").prepare("held", "")
            assert containerd.leases.list() == [leased.lease_id]
            collect_garbage(containerd)
            assert containerd.content.exists(digest_of(b"held"))
            assert ("content", digest_of(b"held")) in containerd.leases.resources(leased.lease_id)
            assert ("snapshots/overlayfs", "held") in containerd.leases.resources(leased.lease_id)
        assert containerd.leases.list() == []
        collect_garbage(containerd)
        assert not containerd.content.exists(digest_of(b"held"))
        assert containerd.snapshots("overlayfs").list() == []

    def test_failure_collects_at_once(self, containerd: Containerd) -> None:
        def interrupted() -> None:
            with containerd.lease(expire_s=60) as leased:
                leased.content.write(digest_of(b"failed"), b"failed")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert containerd.content.list() == []
        assert containerd.leases.list() == []

    def test_holds_what_is_older(self, containerd: Containerd) -> None:
        root = {"containerd.io/gc.root": "1"}
        containerd.content.write(digest_of(b"older"), b"older", root)  # containerd itself adds it to the lease below
        snapshots = containerd.snapshots("overlayfs")
        snapshots.prepare("older", "", root)
        with containerd.lease(expire_s=60) as leased:
            leased.content.write(digest_of(b"older"), b"older")
            leased.hold_snapshot("overlayfs", "older")
            held = containerd.leases.resources(leased.lease_id)
            assert set(held) == {("content", digest_of(b"older")), ("snapshots/overlayfs", "older")}
        snapshots.remove("older")

    def test_expired_lease_holds_nothing(self, containerd: Containerd) -> None:
        containerd.leases.create("soon", expire_s=1)
        with pytest.raises(AlreadyExistsError, match="soon"):
            containerd.leases.create("soon", expire_s=1)
        deadline = time.monotonic() + 30
        while containerd.leases.list():
            assert time.monotonic() < deadline
            time.sleep(0.2)
            collect_garbage(containerd)
        with pytest.raises(NotFoundError, match="soon"):
            containerd.leases.delete("soon")


class TestSnapshots:
    ROOT = {"containerd.io/gc.root": "1"}  # noqa: RUF012 - not changed

    def test_life_of_a_layer(self, containerd: Containerd) -> None:
        tar = tar_of("hello", b"world")
        snapshots = containerd.snapshots("overlayfs")
        with containerd.lease(expire_s=60) as leased:
            leased.content.write(digest_of(tar), tar)
            mounts = snapshots.prepare("active", "", self.ROOT)
            assert mounts == snapshots.mounts("active")
            assert [(mount.type, mount.options) for mount in mounts] == [("bind", ("rw", "rbind"))]
            assert leased.differ.apply(OCI_LAYER, digest_of(tar), len(tar), mounts) == digest_of(tar)
            snapshots.commit("layer", "active", self.ROOT | {"x": "y"})

        info = snapshots.stat("layer")
        assert (info.parent, info.kind, info.labels) == ("", Kind.COMMITTED, self.ROOT | {"x": "y"})
        usage = snapshots.usage("layer")
        assert usage.inodes == 2
        assert usage.size >= len(b"world")

        overlay = snapshots.prepare("child", "layer", self.ROOT)
        assert overlay[0].type == "overlay"
        assert any(option.startswith("upperdir=") for option in overlay[0].options)
        assert snapshots.view("look", "layer", self.ROOT)[0].options == ("ro", "rbind")
        assert snapshots.stat("look").kind is Kind.VIEW
        assert {info.name for info in snapshots.list()} == {"layer", "child", "look"}
        assert [info.name for info in snapshots.list("kind==active")] == ["child"]
        assert [info.name for info in snapshots.list("labels.x==y", "name==look")] != []

        with pytest.raises(FailedPreconditionError, match="child"):
            snapshots.remove("layer")
        for key in ("child", "look", "layer"):
            snapshots.remove(key)
        assert snapshots.list() == []

    def test_target_that_exists_needs_no_download(self, containerd: Containerd) -> None:
        snapshots = containerd.snapshots("overlayfs")
        snapshots.prepare("a", "", self.ROOT)
        snapshots.commit("target", "a", self.ROOT)
        with pytest.raises(AlreadyExistsError, match="target"):
            snapshots.prepare("b", "", {"containerd.io/snapshot.ref": "target"})
        snapshots.remove("target")

    def test_what_is_missing(self, containerd: Containerd) -> None:
        snapshots = containerd.snapshots("overlayfs")
        for call in (snapshots.stat, snapshots.mounts, snapshots.remove, snapshots.usage):
            with pytest.raises(NotFoundError, match="'none'"):
                call("none")
        with pytest.raises(NotFoundError, match="'new'"):
            snapshots.prepare("new", "none")
        with pytest.raises(NotFoundError):
            containerd.differ.apply(OCI_LAYER, digest_of(b"absent"), 6, [Mount("bind", "/nonexistent")])
        assert snapshots.exists()
        assert not containerd.snapshots("absent").exists()
        with pytest.raises(InvalidArgumentError, match="not loaded: absent"):
            containerd.snapshots("absent").stat("x")

    def test_cleanup_is_asked_of_the_snapshotter(self, containerd: Containerd) -> None:
        # overlayfs removes at once unless configured otherwise, and then has no such call.
        with pytest.raises(UnsupportedError, match="Cleanup"):
            containerd.snapshots("overlayfs").cleanup()


def collect_garbage(containerd: Containerd) -> None:
    """Have containerd collect now: removing anything with sync waits for it."""
    containerd.images.put(Image("collector", "application/x", digest_of(b"c"), 1, {}))
    containerd.images.delete("collector", sync=True)


def tar_of(name: str, data: bytes) -> bytes:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return output.getvalue()
