"""Leases: an object made or named under a lease is safe from containerd's garbage collector."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from obdlab.containerd._pb import leases_pb2 as pb
from obdlab.containerd.services import make_stub

if TYPE_CHECKING:
    from obdlab.containerd._pb.leases_pb2_grpc import LeasesStub
    from obdlab.containerd.channel import Connection

EXPIRE_LABEL = "containerd.io/gc.expire"


class Leases:
    """The lease service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub: LeasesStub = make_stub(connection.channel, pb.DESCRIPTOR, "Leases")

    def create(self, lease_id: str, *, expire_s: float) -> None:
        """Make a lease that ends by itself after ``expire_s`` seconds. Raises AlreadyExistsError."""
        end = datetime.now(UTC) + timedelta(seconds=expire_s)
        labels = {EXPIRE_LABEL: end.isoformat(timespec="seconds").replace("+00:00", "Z")}
        self._connection.call(self._stub.Create, pb.CreateRequest(id=lease_id, labels=labels), f"lease {lease_id}")

    def delete(self, lease_id: str, *, sync: bool = False) -> None:
        """End a lease; ``sync`` waits for the garbage collection that follows. Raises NotFoundError."""
        self._connection.call(self._stub.Delete, pb.DeleteRequest(id=lease_id, sync=sync), f"ending lease {lease_id}")

    def hold_snapshot(self, lease_id: str, snapshotter: str, key: str) -> None:
        """Keep a snapshot that may be older than the lease, and with it its parents."""
        resource = pb.Resource(id=key, type=f"snapshots/{snapshotter}")
        request = pb.AddResourceRequest(id=lease_id, resource=resource)
        self._connection.call(self._stub.AddResource, request, f"lease {lease_id}: holding snapshot {key}")

    def resources(self, lease_id: str) -> list[tuple[str, str]]:
        """Return (type, id) of everything the lease holds."""
        request = pb.ListResourcesRequest(id=lease_id)
        answer = self._connection.call(self._stub.ListResources, request, f"lease {lease_id}")
        return [(resource.type, resource.id) for resource in answer.resources]

    def list(self) -> list[str]:
        """Return the ids of all leases of the namespace."""
        answer = self._connection.call(self._stub.List, pb.ListRequest(), "listing leases")
        return [lease.id for lease in answer.leases]
