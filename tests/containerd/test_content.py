"""The content store client against a real containerd."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from obdlab.containerd._pb import content_pb2
from obdlab.containerd.channel import Connection
from obdlab.containerd.client import Containerd
from obdlab.containerd.content import CHUNK
from obdlab.containerd.errors import ContainerdError, FailedPreconditionError, NotFoundError
from obdlab.containerd.services import make_stub
from obdlab.formats.oci import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.containerd.host import ContainerdHost

pytestmark = pytest.mark.containerd

KEEP = {"containerd.io/gc.root": "yes"}


@pytest.mark.parametrize("size", [0, 1, CHUNK, 2 * CHUNK + 1])
def test_write_and_read(containerd: Containerd, size: int) -> None:
    data = os.urandom(size)
    digest = digest_of(data)
    assert not containerd.content.exists(digest)
    containerd.content.write(digest, data, KEEP)
    assert containerd.content.exists(digest)
    assert containerd.content.read(digest) == data
    info = containerd.content.info(digest)
    assert (info.size, info.labels) == (size, KEEP)


def test_ctr_sees_what_was_written(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    containerd.content.write(digest_of(b"seen"), b"seen", KEEP | {"a.b/c": "1"})
    listed = containerd_host.ctr("-n", containerd.namespace, "content", "ls")
    assert digest_of(b"seen") in listed
    assert "a.b/c=1" in listed
    assert containerd_host.ctr("-n", containerd.namespace, "content", "get", digest_of(b"seen")) == "seen"


def test_writing_again_adds_labels(containerd: Containerd) -> None:
    digest = digest_of(b"again")
    containerd.content.write(digest, b"again", KEEP | {"first": "1"})
    containerd.content.write(digest, b"again", {"second.with.dots/and": "2"})
    assert containerd.content.info(digest).labels == KEEP | {"first": "1", "second.with.dots/and": "2"}


def test_ingest_does_not_read_what_is_there(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    digest = digest_of(b"there")
    containerd.content.write(digest, b"there", KEEP)

    def never() -> Iterator[bytes]:
        raise AssertionError("read although the blob is there")
        yield b""

    assert not containerd.content.ingest(digest, 5, never())
    with Containerd(containerd_host.address, "elsewhere") as other:
        assert not other.content.ingest(digest, 5, never(), {"of": "other"})
        assert other.content.info(digest).labels == {"of": "other"}
    assert containerd.content.info(digest).labels == KEEP


def test_wrong_digest_is_refused_and_leaves_nothing(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    digest = digest_of(b"expected")
    with pytest.raises(FailedPreconditionError, match=digest):
        containerd.content.write(digest, b"was sent", KEEP)
    assert not containerd.content.exists(digest)
    assert_no_ingest(containerd, containerd_host)


def test_short_source_is_refused_and_leaves_nothing(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    with pytest.raises(FailedPreconditionError, match="3 != 8"):
        containerd.content.ingest(digest_of(b"expected"), 8, iter([b"exp"]), KEEP)
    assert_no_ingest(containerd, containerd_host)


def test_error_of_source_passes_through_and_leaves_nothing(
    containerd: Containerd, containerd_host: ContainerdHost
) -> None:
    def breaks() -> Iterator[bytes]:
        yield b"exp"
        raise ConnectionResetError("source broke")

    with pytest.raises(ConnectionResetError, match="source broke"):
        containerd.content.ingest(digest_of(b"expected"), 8, breaks(), KEEP)
    assert_no_ingest(containerd, containerd_host)
    # and the blob can be written afterwards
    containerd.content.write(digest_of(b"expected"), b"expected", KEEP)


@pytest.mark.parametrize("left", [b"half", b"whole but wrong", b"whole and right"])
def test_what_a_dead_client_left(containerd: Containerd, containerd_host: ContainerdHost, left: bytes) -> None:
    data = b"whole and right"
    digest = digest_of(data)
    connection = Connection.open(containerd_host.address, containerd.namespace, 30.0)
    requests = [
        content_pb2.WriteContentRequest(action=content_pb2.STAT, ref=f"obdlab-{digest}", total=len(data)),
        content_pb2.WriteContentRequest(action=content_pb2.WRITE, data=left),
    ]
    stub = make_stub(connection.channel, content_pb2.DESCRIPTOR, "Content")
    assert list(stub.Write(iter(requests), metadata=connection.metadata, timeout=30))[-1].offset == len(left)
    connection.channel.close()
    assert "obdlab-" in containerd_host.ctr("-n", containerd.namespace, "content", "active")
    containerd.content.write(digest, data, KEEP)
    assert containerd.content.read(digest) == data


def test_second_writer_waits_for_first(containerd: Containerd) -> None:
    data = os.urandom(3 * CHUNK)
    digest = digest_of(data)
    first_writes, second_started = threading.Event(), threading.Event()
    read_by_second = []

    def slowly() -> Iterator[bytes]:
        yield data[:CHUNK]
        first_writes.set()
        assert second_started.wait(30)
        yield data[CHUNK:]

    def second() -> Iterator[bytes]:
        read_by_second.append(True)
        yield data

    first = threading.Thread(target=containerd.content.ingest, args=(digest, len(data), slowly(), KEEP))
    first.start()
    assert first_writes.wait(30)
    threading.Timer(0.3, second_started.set).start()
    containerd.content.ingest(digest, len(data), second(), {"second": "1"})
    first.join(30)
    assert not first.is_alive()
    assert read_by_second == []
    assert containerd.content.info(digest).labels == KEEP | {"second": "1"}


def test_list_delete_and_what_is_missing(containerd: Containerd) -> None:
    digests = {digest_of(data): data for data in (b"l1", b"l2")}
    for number, (digest, data) in enumerate(digests.items()):
        containerd.content.write(digest, data, KEEP | {"number": str(number)})
    assert {info.digest for info in containerd.content.list()} == set(digests)
    assert [info.digest for info in containerd.content.list("labels.number==1")] == [digest_of(b"l2")]
    containerd.content.delete(digest_of(b"l1"))
    for call in (containerd.content.info, containerd.content.read, containerd.content.delete):
        with pytest.raises(NotFoundError, match=digest_of(b"l1")):
            call(digest_of(b"l1"))
    with pytest.raises(NotFoundError):
        containerd.content.label(digest_of(b"l1"), {"x": "y"})


def test_damaged_blob_is_not_returned(containerd: Containerd, containerd_host: ContainerdHost) -> None:
    digest = digest_of(b"undamaged")
    containerd.content.write(digest, b"undamaged", KEEP)
    path = containerd_host.root / "io.containerd.content.v1.content/blobs/sha256" / digest.partition(":")[2]
    path.chmod(0o644)
    path.write_bytes(b"xndamaged")
    with pytest.raises(ContainerdError, match="other bytes"):
        containerd.content.read(digest)


def assert_no_ingest(containerd: Containerd, host: ContainerdHost) -> None:
    assert "obdlab-" not in host.ctr("-n", containerd.namespace, "content", "active")


@pytest.mark.parametrize("size", [0, 1, CHUNK, 5 * CHUNK + 1])
def test_a_large_blob_is_streamed(containerd: Containerd, size: int) -> None:
    data = os.urandom(size)
    digest = digest_of(data)
    containerd.content.write(digest, data, KEEP)
    assert b"".join(containerd.content.stream(digest, size)) == data


def test_a_stream_of_another_size_or_digest_never_ends_well(
    containerd: Containerd, containerd_host: ContainerdHost
) -> None:
    data = os.urandom(2 * CHUNK)
    digest = digest_of(data)
    containerd.content.write(digest, data, KEEP)
    for size in (len(data) - 1, len(data) + 1):
        with pytest.raises(ContainerdError, match=f"{digest}.*wanted .*{size} bytes"):
            list(containerd.content.stream(digest, size))
    stored = containerd_host.root / "io.containerd.content.v1.content/blobs" / digest.replace(":", "/")
    stored.chmod(0o644)
    stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    got: list[bytes] = []
    with pytest.raises(ContainerdError, match="other bytes"):
        got.extend(containerd.content.stream(digest, len(data)))
    assert sum(map(len, got)) < len(data)
    stored.unlink()
    with pytest.raises(NotFoundError):
        list(containerd.content.stream(digest_of(b"absent"), 6))


def test_a_document_too_large_is_not_read(containerd: Containerd) -> None:
    data = bytes(2 * CHUNK)
    containerd.content.write(digest_of(data), data, KEEP)
    with pytest.raises(ContainerdError, match=f"larger than expected .wanted at most {CHUNK} bytes"):
        containerd.content.read(digest_of(data), CHUNK)
    stream = containerd.content.stream(digest_of(data), len(data))
    next(stream)
    stream.close()
