"""containerd's content store: blobs by digest, with labels that the garbage collector reads."""

from __future__ import annotations

import hashlib
import queue
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.field_mask_pb2 import FieldMask

from obdlab.containerd._pb import content_pb2 as pb
from obdlab.containerd._pb.content_pb2_grpc import ContentStub
from obdlab.containerd.errors import AlreadyExistsError, ContainerdError, NotFoundError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from obdlab.containerd.connection import Connection

CHUNK = 1 << 20
# A blob of some GB over a slow line takes this long at most; silence on the line is the source's business.
TRANSFER_TIMEOUT_S = 3600.0
_LOCK_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class ContentInfo:
    """A blob of the content store."""

    digest: str
    size: int
    labels: Mapping[str, str]


class ContentStore:
    """The content service. All methods may be called from several threads at once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = ContentStub(connection.channel)

    def info(self, digest: str) -> ContentInfo:
        """Return size and labels of a blob. Raises NotFoundError."""
        answer = self._connection.call(self._stub.Info, pb.InfoRequest(digest=digest), f"content {digest}")
        return _info(answer.info)

    def exists(self, digest: str) -> bool:
        """Whether the store has the blob, whole."""
        try:
            self.info(digest)
        except NotFoundError:
            return False
        return True

    def list(self, *filters: str) -> list[ContentInfo]:
        """Return the blobs that match any of containerd's filter expressions; all of them without one."""
        connection = self._connection
        with connection.errors("listing content"):
            answers = self._stub.List(
                pb.ListContentRequest(filters=filters), timeout=connection.timeout_s, metadata=connection.metadata
            )
            return [_info(info) for answer in answers for info in answer.info]

    def read(self, digest: str) -> bytes:
        """Return a whole blob (configurations and manifests, not layers), its digest checked."""
        connection = self._connection
        with connection.errors(f"reading content {digest}"):
            answers = self._stub.Read(
                pb.ReadContentRequest(digest=digest), timeout=connection.timeout_s, metadata=connection.metadata
            )
            data = b"".join(answer.data for answer in answers)
        got = "sha256:" + hashlib.sha256(data).hexdigest()
        if digest.startswith("sha256:") and got != digest:
            raise ContainerdError(f"content {digest}: the store holds other bytes (got {got})")
        return data

    def label(self, digest: str, labels: Mapping[str, str]) -> None:
        """Set these labels of a blob and leave its others alone. Raises NotFoundError."""
        request = pb.UpdateRequest(
            info=pb.Info(digest=digest, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
        )
        self._connection.call(self._stub.Update, request, f"labelling content {digest}")

    def delete(self, digest: str) -> None:
        """Remove a blob. Raises NotFoundError."""
        self._connection.call(self._stub.Delete, pb.DeleteContentRequest(digest=digest), f"deleting content {digest}")

    def write(self, digest: str, data: bytes, labels: Mapping[str, str] | None = None) -> None:
        """Store bytes under their digest; a blob that is there keeps its labels and gains these.

        Raises FailedPreconditionError if the bytes have another digest.
        """
        self.ingest(digest, len(data), (data[at : at + CHUNK] for at in range(0, len(data), CHUNK)), labels)

    def ingest(
        self, digest: str, size: int, chunks: Iterable[bytes], labels: Mapping[str, str] | None = None
    ) -> None:
        """Stream a blob into the store; containerd checks size and digest before anybody can see it.

        Nothing of a failed transfer stays. If another client is writing the same blob, waits for it. A blob that is
        there already is not read from ``chunks``; it gains the labels. What ``chunks`` raises passes through.
        """
        labels = dict(labels or {})
        ref = f"obdlab-{digest}"
        deadline = time.monotonic() + TRANSFER_TIMEOUT_S
        while True:
            try:
                self._write(ref, digest, size, chunks, labels)
            except AlreadyExistsError:
                if not labels.items() <= self.info(digest).labels.items():  # reading is cheap, writing is not
                    self.label(digest, labels)
                return
            except _RefLockedError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_LOCK_POLL_S)
            else:
                return

    def _write(self, ref: str, digest: str, size: int, chunks: Iterable[bytes], labels: Mapping[str, str]) -> None:
        # Requests go one at a time, each answered before the next is made: the reading of ``chunks`` then happens in
        # this thread, where its errors can be raised, and not inside gRPC's sender, which would only log them.
        requests: queue.SimpleQueue[pb.WriteContentRequest | None] = queue.SimpleQueue()
        connection = self._connection
        doing = f"writing content {digest}"
        with connection.errors(doing):
            call = self._stub.Write(
                iter(requests.get, None), timeout=TRANSFER_TIMEOUT_S, metadata=connection.metadata
            )
        answers: Iterator[pb.WriteContentResponse] = iter(call)
        begun = committed = False

        def exchange(request: pb.WriteContentRequest) -> pb.WriteContentResponse:
            requests.put(request)
            with connection.errors(doing):
                return next(answers)

        try:
            try:
                status = exchange(pb.WriteContentRequest(action=pb.STAT, ref=ref, total=size, expected=digest))
            except UnavailableError as error:
                if "locked" in str(error):
                    raise _RefLockedError(str(error)) from error
                raise
            begun = True
            offset = 0
            if status.offset:  # left over from a client that died: begin anew
                exchange(pb.WriteContentRequest(action=pb.WRITE, offset=0))
            for chunk in chunks:
                exchange(pb.WriteContentRequest(action=pb.WRITE, offset=offset, data=chunk))
                offset += len(chunk)
            exchange(
                pb.WriteContentRequest(action=pb.COMMIT, offset=offset, total=size, expected=digest, labels=labels)
            )
            committed = True
            requests.put(None)
            with connection.errors(doing):
                deque(answers, maxlen=0)  # to the end of the call, which frees the ref
        finally:
            requests.put(None)
            if not committed:
                call.cancel()  # type: ignore[no-untyped-call]
            if begun and not committed:
                with suppress(ContainerdError):  # an error is under way already
                    self.abort(ref)

    def abort(self, ref: str) -> None:
        """Drop an unfinished transfer. Raises NotFoundError."""
        self._connection.call(self._stub.Abort, pb.AbortRequest(ref=ref), f"aborting {ref}")


class _RefLockedError(UnavailableError):
    # Another client holds the write of this ref.
    pass


def _info(info: pb.Info) -> ContentInfo:
    return ContentInfo(info.digest, info.size, dict(info.labels))
