"""The contract suite's side of the wire: a snapshots API on a socket, with the errors its codes stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from obdlab.containerd._pb import snapshots_pb2 as pb
from obdlab.containerd.services import make_stub
from obdlab.errors import ObdlabError
from obdlab.snapshotter.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from obdlab.snapshotter.mounts import Mount
from obdlab.snapshotter.store import Kind, Snapshot, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_TIMEOUT_S = 60.0
_ERRORS: dict[grpc.StatusCode, type[ObdlabError]] = {
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
}


class WireSnapshotter:
    """A snapshotter behind a unix socket: ours, or through containerd's own API one of its built-in ones."""

    def __init__(self, address: str, name: str = "", *metadata: tuple[str, str]) -> None:
        # A pool of its own, or a new client would share the back-off of one whose server was killed.
        options = [("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"unix:{address}", options=options)
        self._stub = make_stub(self.channel, pb.DESCRIPTOR, "Snapshots")
        self._name = name
        self._metadata = metadata

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        request = pb.PrepareSnapshotRequest(snapshotter=self._name, key=key, parent=parent, labels=labels)
        return _mounts(self._call(self._stub.Prepare, request))

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        request = pb.ViewSnapshotRequest(snapshotter=self._name, key=key, parent=parent, labels=labels)
        return _mounts(self._call(self._stub.View, request))

    def mounts(self, key: str) -> list[Mount]:
        return _mounts(self._call(self._stub.Mounts, pb.MountsRequest(snapshotter=self._name, key=key)))

    def commit(self, name: str, key: str, labels: Mapping[str, str]) -> None:
        request = pb.CommitSnapshotRequest(snapshotter=self._name, name=name, key=key, labels=labels)
        self._call(self._stub.Commit, request)

    def remove(self, key: str) -> None:
        self._call(self._stub.Remove, pb.RemoveSnapshotRequest(snapshotter=self._name, key=key))

    def stat(self, key: str) -> Snapshot:
        return _snapshot(self._call(self._stub.Stat, pb.StatSnapshotRequest(snapshotter=self._name, key=key)).info)

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        request = pb.UpdateSnapshotRequest(snapshotter=self._name, info=pb.Info(name=key, labels=labels))
        request.update_mask.paths.extend(paths)
        return _snapshot(self._call(self._stub.Update, request).info)

    def walk(self, filters: Sequence[str] = ()) -> list[Snapshot]:
        request = pb.ListSnapshotsRequest(snapshotter=self._name, filters=filters)
        answers = self._call(lambda *a, **k: list(self._stub.List(*a, **k)), request)
        return [_snapshot(info) for answer in answers for info in answer.info]

    def usage(self, key: str) -> Usage:
        answer = self._call(self._stub.Usage, pb.UsageRequest(snapshotter=self._name, key=key))
        return Usage(answer.inodes, answer.size)

    def cleanup(self) -> None:
        self._call(self._stub.Cleanup, pb.CleanupRequest(snapshotter=self._name))

    def close(self) -> None:
        self.channel.close()

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _ERRORS.get(error.code(), ObdlabError)(error.details()) from error


def _mounts(answer: Any) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options)) for mount in answer.mounts]


def _snapshot(info: pb.Info) -> Snapshot:
    return Snapshot(
        0,
        info.name,
        info.parent,
        Kind(info.kind),
        dict(info.labels),
        info.created_at.ToNanoseconds(),
        info.updated_at.ToNanoseconds(),
        Usage(),
    )
