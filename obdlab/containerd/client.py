"""A client of containerd: its content, image, lease and snapshot stores, typed and with a deadline on every call."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty

from obdlab.closing import Closing
from obdlab.containerd._pb import version_pb2
from obdlab.containerd.channel import Connection
from obdlab.containerd.content import ContentStore
from obdlab.containerd.errors import ContainerdError
from obdlab.containerd.images import ImageStore
from obdlab.containerd.leases import Leases
from obdlab.containerd.services import make_stub
from obdlab.containerd.snapshots import Differ, Snapshots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obdlab.containerd._pb.version_pb2_grpc import VersionStub

DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True, slots=True)
class Version:
    """Version and source revision of the running containerd."""

    version: str
    revision: str


class Containerd(Closing):
    """One namespace of the containerd behind a unix socket. May be used from several threads at once.

    Every method of it and its stores raises ContainerdError, or a subclass if the caller may want to handle it. No
    call waits longer than ``timeout_s`` except transfers, unpacking and synchronous removal, which have deadlines of
    their own.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, namespace: str = DEFAULT_NAMESPACE, *, timeout_s: float = 60.0
    ) -> None:
        self._bind(Connection.open(address, namespace, timeout_s))

    def _bind(self, connection: Connection) -> None:
        self._connection = connection
        self.content = ContentStore(connection)
        self.images = ImageStore(connection)
        self.leases = Leases(connection)
        self.differ = Differ(connection)

    @property
    def namespace(self) -> str:
        """The namespace of all calls."""
        return self._connection.namespace

    @property
    def address(self) -> str:
        """Path of the socket."""
        return self._connection.address

    def snapshots(self, snapshotter: str) -> Snapshots:
        """Return the snapshot service of the snapshotter with this name."""
        return Snapshots(self._connection, snapshotter)

    def version(self) -> Version:
        """Ask containerd for its version."""
        service: VersionStub = make_stub(self._connection.channel, version_pb2.DESCRIPTOR, "Version")
        answer = self._connection.call(service.Version, Empty(), "version")
        return Version(answer.version, answer.revision)

    @contextmanager
    def lease(self, *, expire_s: float) -> Iterator[LeasedContainerd]:
        """Hold everything made through the yielded client until the block ends.

        The lease also ends by itself after ``expire_s`` seconds, so that a killed client leaves no content for ever.
        If the block fails, content made under the lease is collected before the error is raised.
        """
        lease_id = f"obdlab-{os.urandom(8).hex()}"
        self.leases.create(lease_id, expire_s=expire_s)
        try:
            yield LeasedContainerd(self._connection, lease_id)
        except BaseException:
            with suppress(ContainerdError):  # the error of the block matters more, and the lease expires
                self.leases.delete(lease_id, sync=True)
            raise
        self.leases.delete(lease_id)

    def under(self, lease_id: str) -> LeasedContainerd:
        """Return a client that makes every call under an existing lease."""
        return LeasedContainerd(self._connection, lease_id)

    def close(self) -> None:
        """Close the channel. Clients that share it (from :meth:`lease` and :meth:`under`) stop working."""
        self._connection.channel.close()


class LeasedContainerd(Containerd):
    """The same containerd, with every call made under a lease."""

    def __init__(self, connection: Connection, lease_id: str) -> None:
        self.lease_id = lease_id
        self._bind(connection.leased(lease_id))

    def hold_snapshot(self, snapshotter: str, key: str) -> None:
        """Hold a snapshot that may be older than the lease, and with it its parents."""
        self.leases.hold_snapshot(self.lease_id, snapshotter, key)
