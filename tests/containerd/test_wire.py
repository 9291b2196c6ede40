"""The restated wire contracts: what a real containerd sends fills our messages, with nothing left over.

protobuf takes a wrong or missing field number silently, as an unknown field or a default value.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from obdlab.containerd._pb import (
    content_pb2,
    diff_pb2,
    images_pb2,
    leases_pb2,
    snapshots_pb2,
    types_pb2,
    version_pb2,
)
from obdlab.containerd.channel import Connection
from obdlab.containerd.services import make_stub
from obdlab.formats.oci import OCI_LAYER, digest_of
from tests.containerd.test_client import tar_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    from tests.containerd.host import ContainerdHost

pytestmark = pytest.mark.containerd

MessageT = TypeVar("MessageT", bound="Message")

LABELS = {"containerd.io/gc.root": "1", "a": "b"}
TAR = tar_of("file", b"content")
DIGEST = digest_of(TAR)
SNAPSHOTTER = "overlayfs"


@pytest.fixture(scope="module")
def wire(containerd_host: ContainerdHost) -> Iterator[Connection]:
    connection = Connection.open(containerd_host.address, "wire", 30.0)
    yield connection
    connection.channel.close()


def checked(message: MessageT) -> MessageT:
    """The message, without unknown fields at any depth."""
    unknown = UnknownFieldSet(message)
    assert len(unknown) == 0, f"{message.DESCRIPTOR.full_name}: unknown {[field.field_number for field in unknown]}"
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for item in value if not hasattr(value, "ListFields") else [value]:
            checked(item)
    return message


def is_now(stamp: Timestamp) -> bool:
    return abs(stamp.seconds - time.time()) < 300


def test_content(wire: Connection) -> None:
    stub = make_stub(wire.channel, content_pb2.DESCRIPTOR, "Content")
    options = {"metadata": wire.metadata, "timeout": 30}
    requests = [
        content_pb2.WriteContentRequest(action=content_pb2.STAT, ref="r", total=len(TAR), expected=DIGEST),
        content_pb2.WriteContentRequest(action=content_pb2.WRITE, data=TAR[:100]),
        content_pb2.WriteContentRequest(
            action=content_pb2.COMMIT, offset=100, data=TAR[100:], total=len(TAR), expected=DIGEST, labels=LABELS
        ),
    ]
    answers = [checked(answer) for answer in stub.Write(iter(requests), **options)]
    stat, write, commit, again = answers
    assert again == commit  # containerd repeats its last answer
    assert (stat.action, stat.offset, stat.total) == (content_pb2.STAT, 0, len(TAR))
    assert is_now(stat.started_at)
    assert is_now(stat.updated_at)
    assert (write.action, write.offset) == (content_pb2.WRITE, 100)
    assert (commit.action, commit.offset, commit.digest) == (content_pb2.COMMIT, len(TAR), DIGEST)

    info = checked(stub.Info(content_pb2.InfoRequest(digest=DIGEST), **options)).info
    assert (info.digest, info.size, dict(info.labels)) == (DIGEST, len(TAR), LABELS)
    assert is_now(info.created_at)
    assert is_now(info.updated_at)
    listed = [item for answer in stub.List(content_pb2.ListContentRequest(), **options) for item in answer.info]
    assert [(item.digest, item.size) for item in map(checked, listed)] == [(DIGEST, len(TAR))]
    part = list(stub.Read(content_pb2.ReadContentRequest(digest=DIGEST, offset=257, size=20), **options))
    # The answer's offset counts from where the read began.
    assert [(checked(answer).offset, answer.data) for answer in part] == [(0, TAR[257:277])]


def test_snapshots_and_diff(wire: Connection) -> None:
    stub = make_stub(wire.channel, snapshots_pb2.DESCRIPTOR, "Snapshots")
    options = {"metadata": wire.metadata, "timeout": 30}
    key = {"snapshotter": SNAPSHOTTER, "key": "k"}
    prepared = checked(stub.Prepare(snapshots_pb2.PrepareSnapshotRequest(**key, labels=LABELS), **options))
    assert list(prepared.mounts) == list(checked(stub.Mounts(snapshots_pb2.MountsRequest(**key), **options)).mounts)
    mount = prepared.mounts[0]
    assert (mount.type, list(mount.options)) == ("bind", ["rw", "rbind"])
    assert mount.source.endswith("/fs")

    differ = make_stub(wire.channel, diff_pb2.DESCRIPTOR, "Diff")
    descriptor = types_pb2.Descriptor(media_type=OCI_LAYER, digest=DIGEST, size=len(TAR))
    applied = checked(differ.Apply(diff_pb2.ApplyRequest(diff=descriptor, mounts=prepared.mounts), **options)).applied
    assert (applied.media_type, applied.digest, applied.size) == (OCI_LAYER, DIGEST, len(TAR))

    commit = snapshots_pb2.CommitSnapshotRequest(snapshotter=SNAPSHOTTER, name="n", key="k", labels=LABELS)
    stub.Commit(commit, **options)
    view = snapshots_pb2.ViewSnapshotRequest(snapshotter=SNAPSHOTTER, key="v", parent="n", labels=LABELS)
    assert list(checked(stub.View(view, **options)).mounts[0].options) == ["ro", "rbind"]

    update = snapshots_pb2.UpdateSnapshotRequest(snapshotter=SNAPSHOTTER, info=snapshots_pb2.Info(name="n"))
    update.info.labels.update(LABELS | {"new": "1"})
    update.update_mask.paths.append("labels.new")
    updated = checked(stub.Update(update, **options)).info
    named = snapshots_pb2.StatSnapshotRequest(snapshotter=SNAPSHOTTER, key="n")
    info = checked(stub.Stat(named, **options)).info
    assert updated == info
    assert (info.name, info.parent, info.kind) == ("n", "", snapshots_pb2.COMMITTED)
    assert dict(info.labels) == LABELS | {"new": "1"}
    assert is_now(info.created_at)
    assert is_now(info.updated_at)

    request = snapshots_pb2.ListSnapshotsRequest(snapshotter=SNAPSHOTTER)
    listed = {item.name: item for answer in stub.List(request, **options) for item in checked(answer).info}
    assert listed.keys() == {"n", "v"}
    assert (listed["v"].parent, listed["v"].kind) == ("n", snapshots_pb2.VIEW)
    usage = checked(stub.Usage(snapshots_pb2.UsageRequest(snapshotter=SNAPSHOTTER, key="n"), **options))
    assert usage.inodes == 2
    assert usage.size >= 4096
    for name in ("v", "n"):
        stub.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=SNAPSHOTTER, key=name), **options)


def test_images(wire: Connection) -> None:
    stub = make_stub(wire.channel, images_pb2.DESCRIPTOR, "Images")
    options = {"metadata": wire.metadata, "timeout": 30}
    target = types_pb2.Descriptor(media_type="m", digest=DIGEST, size=7, annotations={"x": "y"})
    image = images_pb2.Image(name="i", labels=LABELS, target=target)
    created = checked(stub.Create(images_pb2.CreateImageRequest(image=image), **options)).image
    got = checked(stub.Get(images_pb2.GetImageRequest(name="i"), **options)).image
    assert (got.name, got.target, dict(got.labels)) == ("i", target, LABELS)
    assert is_now(created.created_at)
    assert is_now(got.updated_at)
    image.target.size = 8
    request = images_pb2.UpdateImageRequest(image=image)
    request.update_mask.paths.append("target")
    assert checked(stub.Update(request, **options)).image.target.size == 8
    assert [item.name for item in checked(stub.List(images_pb2.ListImagesRequest(), **options)).images] == ["i"]
    stub.Delete(images_pb2.DeleteImageRequest(name="i", sync=True), **options)


def test_leases(wire: Connection) -> None:
    stub = make_stub(wire.channel, leases_pb2.DESCRIPTOR, "Leases")
    options = {"metadata": wire.metadata, "timeout": 30}
    request = leases_pb2.CreateRequest(id="l", labels=LABELS)
    lease = checked(stub.Create(request, **options)).lease
    assert (lease.id, dict(lease.labels)) == ("l", LABELS)
    assert is_now(lease.created_at)
    resource = leases_pb2.Resource(id=DIGEST, type="content")
    stub.AddResource(leases_pb2.AddResourceRequest(id="l", resource=resource), **options)
    listed = checked(stub.ListResources(leases_pb2.ListResourcesRequest(id="l"), **options))
    assert list(listed.resources) == [resource]
    assert [item.id for item in checked(stub.List(leases_pb2.ListRequest(), **options)).leases] == ["l"]
    stub.Delete(leases_pb2.DeleteRequest(id="l", sync=True), **options)


def test_version(wire: Connection) -> None:
    version = checked(make_stub(wire.channel, version_pb2.DESCRIPTOR, "Version").Version(Empty(), timeout=30))
    assert version.version
