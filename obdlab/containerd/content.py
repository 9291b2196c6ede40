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
from obdlab.containerd.errors import (
    AlreadyExistsError,
    ContainerdError,
    FailedPreconditionError,
    NotFoundError,
    UnavailableError,
)
from obdlab.containerd.services import make_stub
from obdlab.foreign import is_ref_locked

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from obdlab.containerd._pb.content_pb2_grpc import ContentStub
    from obdlab.containerd.channel import Connection

CHUNK = 1 << 20
#: Larger than any valid document of an image.
MAX_DOCUMENT = 8 << 20
# Deadline of one transfer: a blob of some GB over a slow line. The source itself handles silence on the line.
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
        self._stub: ContentStub = make_stub(connection.channel, pb.DESCRIPTOR, "Content")

    def info(self, digest: str) -> ContentInfo:
        """Return size and labels of a blob. Raises NotFoundError."""
        answer = self._connection.call(self._stub.Info, pb.InfoRequest(digest=digest), f"content {digest}")
        return _info(answer.info)

    def exists(self, digest: str) -> bool:
        """Return True if the store has the whole blob."""
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

    def read(self, digest: str, max_size: int = MAX_DOCUMENT) -> bytes:
        """Return a whole blob (configurations and manifests, not layers), its digest checked.

        Raises NotFoundError, or ContainerdError if it is larger than ``max_size`` or does not match its digest.
        """
        return b"".join(self._checked(digest, None, max_size, self._connection.timeout_s))

    def read_range(self, digest: str, offset: int, length: int) -> bytes:
        """Return ``length`` bytes (at least 1) of a blob from ``offset``, unchecked. Raises NotFoundError.

        Returns fewer only at the end of the blob.
        """
        connection = self._connection
        with connection.errors(f"reading content {digest}"):
            answers = self._stub.Read(
                pb.ReadContentRequest(digest=digest, offset=offset, size=length),
                timeout=connection.timeout_s,
                metadata=connection.metadata,
            )
            return b"".join(answer.data for answer in answers)

    def stream(self, digest: str, size: int) -> Iterator[bytes]:
        """Yield a blob of any size in pieces, in order; the last one only if size and digest are right.

        Raises NotFoundError, or ContainerdError if the blob in the store has another size or digest. Closing the
        iterator early ends the transfer.
        """
        return self._checked(digest, size, size, TRANSFER_TIMEOUT_S)

    def _checked(self, digest: str, size: int | None, max_size: int, timeout_s: float) -> Iterator[bytes]:
        # Each piece is held back until the next one comes, the last until the digest is checked.
        held, got_size, sha256 = b"", 0, hashlib.sha256()
        for piece in self._pieces(digest, timeout_s):
            got_size += len(piece)
            if got_size > max_size:
                raise ContainerdError(f"content {digest}: larger than expected (wanted at most {max_size} bytes)")
            sha256.update(piece)
            if held:
                yield held
            held = piece
        if size is not None and got_size != size:
            raise ContainerdError(f"content {digest}: of another size (got {got_size}, wanted {size} bytes)")
        got = f"sha256:{sha256.hexdigest()}"
        if digest.startswith("sha256:") and got != digest:
            raise ContainerdError(f"content {digest}: the store holds other bytes (got {got}, wanted {digest})")
        if held:
            yield held

    def _pieces(self, digest: str, timeout_s: float) -> Iterator[bytes]:
        connection = self._connection
        with connection.errors(f"reading content {digest}"):
            answers = self._stub.Read(
                pb.ReadContentRequest(digest=digest), timeout=timeout_s, metadata=connection.metadata
            )
            try:
                for answer in answers:
                    if answer.data:
                        yield answer.data
            finally:
                answers.cancel()  # type: ignore[no-untyped-call]  # no effect after the last piece

    def label(self, digest: str, labels: Mapping[str, str]) -> None:
        """Set these labels of a blob and keep its others. Raises NotFoundError."""
        request = pb.UpdateRequest(
            info=pb.Info(digest=digest, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
        )
        self._connection.call(self._stub.Update, request, f"labelling content {digest}")

    def delete(self, digest: str) -> None:
        """Remove a blob. Raises NotFoundError."""
        self._connection.call(self._stub.Delete, pb.DeleteContentRequest(digest=digest), f"deleting content {digest}")

    def write(self, digest: str, data: bytes, labels: Mapping[str, str] | None = None) -> None:
        """Store bytes under their digest; an existing blob keeps its labels and gains these.

        Raises FailedPreconditionError if the bytes have another digest.
        """
        self.ingest(digest, len(data), (data[at : at + CHUNK] for at in range(0, len(data), CHUNK)), labels)

    def ingest(
        self, digest: str, size: int, chunks: Iterable[bytes], labels: Mapping[str, str] | None = None
    ) -> bool:
        """Stream a blob into the store; containerd checks size and digest before it can be read.

        A failed transfer leaves nothing behind. If another client is writing the same blob, waits for it. Returns
        False if the blob exists already (perhaps in another namespace): then ``chunks`` has not been read, and the
        blob has gained the labels. Errors of ``chunks`` pass through.
        """
        labels = dict(labels or {})
        deadline = time.monotonic() + TRANSFER_TIMEOUT_S
        while True:
            try:
                return self._write(digest, size, chunks, labels)
            except AlreadyExistsError:
                if not labels.items() <= self.info(digest).labels.items():  # reading is cheap, writing is not
                    self.label(digest, labels)
                return False
            except _StaleError:
                continue
            except _RefLockedError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_LOCK_POLL_S)

    def abort(self, ref: str) -> None:
        """Drop an unfinished transfer. Raises NotFoundError."""
        self._connection.call(self._stub.Abort, pb.AbortRequest(ref=ref), f"aborting {ref}")

    def _write(self, digest: str, size: int, chunks: Iterable[bytes], labels: Mapping[str, str]) -> bool:
        ref = f"obdlab-{digest}"
        transfer = _Transfer(self._connection, self._stub, f"writing content {digest}")
        begun = False
        try:
            offset = transfer.begin(ref, digest, size)
            begun = True
            if offset == size:
                # Another namespace has the blob, or a client died before its commit.
                transfer.commit_whole(digest, size, labels)
                return False
            if offset:
                transfer.exchange(pb.WriteContentRequest(action=pb.WRITE, offset=0))
            offset = 0
            for chunk in chunks:
                transfer.exchange(pb.WriteContentRequest(action=pb.WRITE, offset=offset, data=chunk))
                offset += len(chunk)
            transfer.commit(digest, offset, size, labels)
        except BaseException:
            transfer.cancel()
            if begun:
                with suppress(ContainerdError):  # the error being raised matters more
                    self.abort(ref)
            raise
        return True


class _Transfer:
    # One Write call. Each request is answered before the next is made. So the source is read in the caller's thread,
    # which can raise its errors, and not in gRPC's sender, which would log them.

    def __init__(self, connection: Connection, stub: ContentStub, doing: str) -> None:
        self._connection = connection
        self._doing = doing
        self._requests: queue.SimpleQueue[pb.WriteContentRequest | None] = queue.SimpleQueue()
        with connection.errors(doing):
            self._call = stub.Write(
                iter(self._requests.get, None), timeout=TRANSFER_TIMEOUT_S, metadata=connection.metadata
            )
        self._answers: Iterator[pb.WriteContentResponse] = iter(self._call)

    def begin(self, ref: str, digest: str, size: int) -> int:
        # Returns the number of bytes that containerd already has.
        try:
            return self.exchange(pb.WriteContentRequest(action=pb.STAT, ref=ref, total=size, expected=digest)).offset
        except UnavailableError as error:
            if is_ref_locked(str(error)):
                raise _RefLockedError(str(error)) from error
            raise

    def exchange(self, request: pb.WriteContentRequest) -> pb.WriteContentResponse:
        self._requests.put(request)
        with self._connection.errors(self._doing):
            answer = next(self._answers, None)
        if answer is None:
            raise ContainerdError(f"{self._doing}: containerd ended the call without an answer")
        return answer

    def commit(self, digest: str, offset: int, size: int, labels: Mapping[str, str]) -> None:
        self.exchange(
            pb.WriteContentRequest(action=pb.COMMIT, offset=offset, total=size, expected=digest, labels=labels)
        )
        self._requests.put(None)
        with self._connection.errors(self._doing):
            deque(self._answers, maxlen=0)  # to the end of the call, which frees the ref

    def commit_whole(self, digest: str, size: int, labels: Mapping[str, str]) -> None:
        try:
            self.commit(digest, size, size, labels)
        except FailedPreconditionError as error:
            if size:
                raise _StaleError(str(error)) from error
            raise

    def cancel(self) -> None:
        self._requests.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]


class _RefLockedError(UnavailableError):
    # Another client holds the write of this ref.
    pass


class _StaleError(ContainerdError):
    # The bytes that a dead client left have the right size but are wrong; they have been dropped.
    pass


def _info(info: pb.Info) -> ContentInfo:
    return ContentInfo(info.digest, info.size, dict(info.labels))
