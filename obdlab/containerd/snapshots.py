"""A snapshotter as seen through containerd, and the differ that fills its snapshots."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from obdlab.containerd._pb import diff_pb2, types_pb2
from obdlab.containerd._pb import snapshots_pb2 as pb
from obdlab.containerd.errors import InvalidArgumentError, NotFoundError
from obdlab.containerd.services import make_stub

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from obdlab.containerd._pb.diff_pb2_grpc import DiffStub
    from obdlab.containerd._pb.snapshots_pb2_grpc import SnapshotsStub
    from obdlab.containerd.channel import Connection

# Deadline for unpacking a layer of some GB on a slow disk.
APPLY_TIMEOUT_S = 1800.0


class Kind(enum.IntEnum):
    """Kind of a snapshot, with containerd's numbers."""

    UNKNOWN = 0
    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount(2) call, as containerd describes it."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot by its name (committed) or key (active, view). ``parent`` is '' at the bottom."""

    name: str
    parent: str
    kind: Kind
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk usage of a snapshot, in bytes and inodes."""

    size: int
    inodes: int


class Snapshots:
    """The snapshot service for one named snapshotter."""

    def __init__(self, connection: Connection, snapshotter: str) -> None:
        self._connection = connection
        self._stub: SnapshotsStub = make_stub(connection.channel, pb.DESCRIPTOR, "Snapshots")
        self.snapshotter = snapshotter

    def exists(self) -> bool:
        """Return True if containerd knows a snapshotter of this name; it may still fail when used."""
        request = pb.StatSnapshotRequest(snapshotter=self.snapshotter, key="obdlab-probe")
        try:
            self._connection.call(self._stub.Stat, request, f"looking for snapshotter {self.snapshotter}")
        except NotFoundError:
            return True
        except InvalidArgumentError:  # "snapshotter not loaded"
            return False
        return True

    def prepare(self, key: str, parent: str, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make a writable snapshot and return its mounts.

        Raises AlreadyExistsError if ``key`` is taken, or if the snapshotter has provided the snapshot named by the
        label ``containerd.io/snapshot.ref``, so that no work is left.
        """
        request = pb.PrepareSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        return _mounts(self._connection.call(self._stub.Prepare, request, self._doing("preparing", key)).mounts)

    def view(self, key: str, parent: str, labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make a read-only snapshot and return its mounts. Raises AlreadyExistsError, NotFoundError (parent)."""
        request = pb.ViewSnapshotRequest(snapshotter=self.snapshotter, key=key, parent=parent, labels=labels)
        return _mounts(self._connection.call(self._stub.View, request, self._doing("viewing", key)).mounts)

    def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or view. Raises NotFoundError."""
        request = pb.MountsRequest(snapshotter=self.snapshotter, key=key)
        return _mounts(self._connection.call(self._stub.Mounts, request, self._doing("mounts of", key)).mounts)

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Turn the active snapshot ``key`` into the committed ``name``. Raises AlreadyExistsError, NotFoundError."""
        request = pb.CommitSnapshotRequest(snapshotter=self.snapshotter, name=name, key=key, labels=labels)
        self._connection.call(self._stub.Commit, request, self._doing("committing", name))

    def remove(self, key: str) -> None:
        """Delete a snapshot. Raises NotFoundError, and FailedPreconditionError while it has children."""
        request = pb.RemoveSnapshotRequest(snapshotter=self.snapshotter, key=key)
        self._connection.call(self._stub.Remove, request, self._doing("removing", key))

    def stat(self, key: str) -> SnapshotInfo:
        """Return containerd's record of a snapshot. Raises NotFoundError."""
        request = pb.StatSnapshotRequest(snapshotter=self.snapshotter, key=key)
        return _info(self._connection.call(self._stub.Stat, request, self._doing("stat of", key)).info)

    def list(self, *filters: str) -> list[SnapshotInfo]:
        """Return the snapshots that match any of containerd's filter expressions; all of them without one."""
        connection = self._connection
        with connection.errors(f"listing snapshots of {self.snapshotter}"):
            answers = self._stub.List(
                pb.ListSnapshotsRequest(snapshotter=self.snapshotter, filters=filters),
                timeout=connection.timeout_s,
                metadata=connection.metadata,
            )
            return [_info(info) for answer in answers for info in answer.info]

    def usage(self, key: str) -> Usage:
        """Return the disk usage of a snapshot. Raises NotFoundError."""
        request = pb.UsageRequest(snapshotter=self.snapshotter, key=key)
        answer = self._connection.call(self._stub.Usage, request, self._doing("usage of", key))
        return Usage(answer.size, answer.inodes)

    def cleanup(self) -> None:
        """Delete the directories of removed snapshots now. Raises UnsupportedError if it has no such call."""
        request = pb.CleanupRequest(snapshotter=self.snapshotter)
        self._connection.call(self._stub.Cleanup, request, f"cleanup of {self.snapshotter}")

    def _doing(self, verb: str, key: str) -> str:
        return f"{self.snapshotter}: {verb} snapshot {key!r}"


@dataclass(frozen=True, slots=True)
class Made:
    """A layer blob that containerd made and has in its content store."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]


class Differ:
    """The diff service: containerd itself unpacks a layer of its content store into a snapshot, and makes layers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub: DiffStub = make_stub(connection.channel, diff_pb2.DESCRIPTOR, "Diff")

    def apply(self, media_type: str, digest: str, size: int, mounts: Sequence[Mount]) -> str:
        """Unpack a layer (tar, also gzip or zstd by its media type) into ``mounts``.

        Returns the digest of the uncompressed tar. Raises NotFoundError if the blob is not in the content store.
        """
        request = diff_pb2.ApplyRequest(
            diff=types_pb2.Descriptor(media_type=media_type, digest=digest, size=size), mounts=_messages(mounts)
        )
        doing = f"unpacking layer {digest}"
        return self._connection.call(self._stub.Apply, request, doing, timeout_s=APPLY_TIMEOUT_S).applied.digest

    def diff(self, left: Sequence[Mount], right: Sequence[Mount], labels: Mapping[str, str] | None = None) -> Made:
        """Make a layer of the changes from ``left`` to ``right``; its blob gets the ``labels``."""
        request = diff_pb2.DiffRequest(left=_messages(left), right=_messages(right), labels=labels)
        answer = self._connection.call(self._stub.Diff, request, "making a layer", timeout_s=APPLY_TIMEOUT_S).diff
        return Made(answer.media_type, answer.digest, answer.size, dict(answer.annotations))


def _messages(mounts: Sequence[Mount]) -> list[types_pb2.Mount]:
    return [
        types_pb2.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        for mount in mounts
    ]


def _mounts(mounts: Sequence[types_pb2.Mount]) -> list[Mount]:
    return [Mount(mount.type, mount.source, tuple(mount.options), mount.target) for mount in mounts]


def _info(info: pb.Info) -> SnapshotInfo:
    return SnapshotInfo(info.name, info.parent, Kind(info.kind), dict(info.labels))
