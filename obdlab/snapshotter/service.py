"""The snapshotter on containerd's wire: gRPC over a unix socket, and the mapping of errors to its codes."""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from obdlab.containerd._pb import snapshots_pb2 as pb
from obdlab.containerd._pb import types_pb2
from obdlab.containerd.services import serve
from obdlab.errors import ObdlabError, SourceError
from obdlab.observe.counters import Counter, Histogram
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    UnsupportedError,
)
from obdlab.snapshotter.grpchealth import Health
from obdlab.snapshotter.store import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from google.protobuf.descriptor import ServiceDescriptor

    from obdlab.snapshotter.core import Snapshotter
    from obdlab.snapshotter.mounts import Mount
    from obdlab.snapshotter.store import Snapshot

logger = logging.getLogger(__name__)

#: Errors by function and code, as in "Stat:NOT_FOUND". Durations are one histogram per function.
RPC_ERRORS = Counter("rpc_errors")
RPC_SECONDS = "rpc_seconds"
_SERVICE = pb.DESCRIPTOR.services_by_name["Snapshots"]

#: Threads, made as they are needed. Of these, calls that wait for registries take a part only (``shares``).
_WORKERS = 576
_LIST_BATCH = 100
_LIST_BYTES = 1 << 20
_MAX_ERROR_SIZE = 2000
_MAX_SOCKET_PATH = 107
_PROBE_TIMEOUT_S = 2.0
_THREADS_END_S = 1.0
_KINDS = {Kind.VIEW: pb.VIEW, Kind.ACTIVE: pb.ACTIVE, Kind.COMMITTED: pb.COMMITTED}
_CODES: tuple[tuple[type[ObdlabError], grpc.StatusCode], ...] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
    (SourceError, grpc.StatusCode.UNAVAILABLE),
    (ObdlabError, grpc.StatusCode.UNKNOWN),
)


class SocketError(ObdlabError):
    """The socket cannot be served on: another process serves it, or the path is not a socket."""


class SnapshotService:
    """``containerd.services.snapshots.v1.Snapshots`` on top of a :class:`Snapshotter`."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def Prepare(
        self, request: pb.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.PrepareSnapshotResponse:
        """Make an active snapshot."""
        with answering(context, "Prepare", f"prepare {request.key!r}"):
            mounts = self._snapshotter.prepare(request.key, request.parent, dict(request.labels))
            return pb.PrepareSnapshotResponse(mounts=_mounts(mounts))

    def View(self, request: pb.ViewSnapshotRequest, context: grpc.ServicerContext) -> pb.ViewSnapshotResponse:
        """Make a read-only snapshot."""
        with answering(context, "View", f"view {request.key!r}"):
            mounts = self._snapshotter.view(request.key, request.parent, dict(request.labels))
            return pb.ViewSnapshotResponse(mounts=_mounts(mounts))

    def Mounts(self, request: pb.MountsRequest, context: grpc.ServicerContext) -> pb.MountsResponse:
        """Return the mounts of a snapshot."""
        with answering(context, "Mounts", f"mounts of {request.key!r}"):
            return pb.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def Commit(self, request: pb.CommitSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        """Turn an active snapshot into a committed one."""
        with answering(context, "Commit", f"commit {request.key!r} as {request.name!r}"):
            self._snapshotter.commit(request.name, request.key, dict(request.labels))
            return Empty()

    def Remove(self, request: pb.RemoveSnapshotRequest, context: grpc.ServicerContext) -> Empty:
        """Forget a snapshot."""
        with answering(context, "Remove", f"remove {request.key!r}"):
            self._snapshotter.remove(request.key)
            return Empty()

    def Stat(self, request: pb.StatSnapshotRequest, context: grpc.ServicerContext) -> pb.StatSnapshotResponse:
        """Describe a snapshot."""
        with answering(context, "Stat", f"stat {request.key!r}"):
            return pb.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def Update(self, request: pb.UpdateSnapshotRequest, context: grpc.ServicerContext) -> pb.UpdateSnapshotResponse:
        """Change labels."""
        with answering(context, "Update", f"update {request.info.name!r}"):
            snapshot = self._snapshotter.update(
                request.info.name, dict(request.info.labels), list(request.update_mask.paths)
            )
            return pb.UpdateSnapshotResponse(info=_info(snapshot))

    def List(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListSnapshotsResponse]:
        """Describe all snapshots that match."""
        with answering(context, "Walk", "list"):
            snapshots = self._snapshotter.walk(list(request.filters))
        for batch in _batches(snapshots):
            yield pb.ListSnapshotsResponse(info=batch)

    def Usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageResponse:
        """Return the disk space of a snapshot."""
        with answering(context, "Usage", f"usage of {request.key!r}"):
            usage = self._snapshotter.usage(request.key)
            return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(self, request: pb.CleanupRequest, context: grpc.ServicerContext) -> Empty:
        """Delete leftovers."""
        with answering(context, "Cleanup", "cleanup"):
            self._snapshotter.cleanup()
            return Empty()


class SnapshotServer:
    """A gRPC server on a unix socket. The socket has mode 0600: containerd runs as the same user."""

    def __init__(
        self, snapshotter: Snapshotter, address: Path, more: Sequence[tuple[ServiceDescriptor, object]] = ()
    ) -> None:
        """Bind the socket, replacing one without a server, also for ``more`` services. Raises SocketError."""
        self.address = address
        _make_room(address)
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="rpc")
        self._server = grpc.server(self._pool)
        services = [(_SERVICE, SnapshotService(snapshotter)), *more]
        self._health = Health(frozenset(service.full_name for service, _ in services), snapshotter.is_well)
        self._health.add_to(self._server)
        for service, servicer in services:
            serve(self._server, service, servicer)
        try:
            self._server.add_insecure_port(f"unix:{address}")
            address.chmod(0o600)
        except (RuntimeError, OSError) as error:
            raise SocketError(f"{address}: cannot be listened on ({error})") from error

    def start(self) -> None:
        """Start answering."""
        self._server.start()

    def stop(self, grace_s: float) -> bool:
        """Refuse new calls, give running calls ``grace_s`` to end, and remove the socket.

        Returns True if all threads have ended. A call that waits for a device is cancelled, but its thread goes on.
        """
        self._health.stop()
        self._server.stop(grace_s).wait()
        self.address.unlink(missing_ok=True)
        ending = threading.Thread(target=self._pool.shutdown, daemon=True)
        ending.start()
        ending.join(_THREADS_END_S)
        return not ending.is_alive()


def _make_room(address: Path) -> None:
    if len(os.fsencode(address)) > _MAX_SOCKET_PATH:
        raise SocketError(f"{address}: too long for a socket's path (wanted at most {_MAX_SOCKET_PATH} bytes)")
    try:
        address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = address.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketError(f"{address}: cannot be listened on ({error})") from error
    if not stat.S_ISSOCK(mode):
        raise SocketError(f"{address}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_TIMEOUT_S)
        try:
            probe.connect(str(address))
        except OSError:
            address.unlink(missing_ok=True)
            return
    raise SocketError(f"{address}: another server answers on this socket")


@contextmanager
def answering(context: grpc.ServicerContext, function: str, what: str) -> Iterator[None]:
    """Count and time a call, for the block; end it with the code of the error that the block raises."""
    began = time.perf_counter()
    try:
        with _timed(function, began):
            yield
    except ObdlabError as error:
        code = next(code for kind, code in _CODES if isinstance(error, kind))
        RPC_ERRORS.add(label=f"{function}:{code.name}")
        expected = code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE)
        level = logging.INFO if expected else logging.WARNING
        logger.log(level, "%s: %s (%s)", _shortened(what), _shortened(str(error)), code.name)
        context.abort(code, _shortened(str(error)))
    except OSError as error:
        logger.exception("%s failed", _shortened(what))
        RPC_ERRORS.add(label=f"{function}:{grpc.StatusCode.INTERNAL.name}")
        context.abort(grpc.StatusCode.INTERNAL, _shortened(f"{what}: {error}"))


@contextmanager
def _timed(function: str, began: float) -> Iterator[None]:
    try:
        yield
    finally:
        Histogram(f"{RPC_SECONDS}:{function}").observe(time.perf_counter() - began)


def _shortened(text: str) -> str:
    # An error travels in a header. Clients accept 8 KiB of headers, where a byte may need three characters. If it is
    # longer they see neither text nor code.
    data = text.encode(errors="replace")
    if len(data) <= _MAX_ERROR_SIZE:
        return text
    half = _MAX_ERROR_SIZE // 2
    return f"{data[:half].decode(errors='ignore')} [...] {data[-half:].decode(errors='ignore')}"


def _mounts(mounts: Sequence[Mount]) -> list[types_pb2.Mount]:
    return [types_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


# Clients accept 4 MiB per message. The labels of a single snapshot are bounded elsewhere.
def _batches(snapshots: Sequence[Snapshot]) -> Iterator[list[pb.Info]]:
    batch: list[pb.Info] = []
    size = 0
    for snapshot in snapshots:
        info = _info(snapshot)
        if batch and (len(batch) == _LIST_BATCH or size + info.ByteSize() > _LIST_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(info)
        size += info.ByteSize()
    if batch:
        yield batch


def _info(snapshot: Snapshot) -> pb.Info:
    return pb.Info(
        name=snapshot.key,
        parent=snapshot.parent,
        kind=_KINDS[snapshot.kind],
        created_at=_timestamp(snapshot.created_ns),
        updated_at=_timestamp(snapshot.updated_ns),
        labels=snapshot.labels,
    )


def _timestamp(time_ns: int) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(time_ns)
    return timestamp
