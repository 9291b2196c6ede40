"""The differ on containerd's wire: ``containerd.services.diff.v1.Diff``, beside the snapshotter on its socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from obdlab.containerd._pb import diff_pb2 as pb
from obdlab.containerd._pb import types_pb2
from obdlab.differ.filling import Caller, Filling, Layer, Work
from obdlab.differ.jobs import Jobs
from obdlab.differ.making import Making
from obdlab.differ.sides import Sides, mounts_of
from obdlab.formats.oci import OCI_LAYER
from obdlab.snapshotter.service import answering

if TYPE_CHECKING:
    import grpc

    from obdlab.differ.filling import DifferOptions
    from obdlab.server.client import Devices
    from obdlab.snapshotter.core import Snapshotter

SERVICE = pb.DESCRIPTOR.services_by_name["Diff"]


class DiffService:
    """Answers Apply and Diff for the snapshots of one root; containerd's next differ does what this one cannot."""

    def __init__(self, snapshotter: Snapshotter, devices: Devices, options: DifferOptions) -> None:
        """Delete the files and thaw the file systems that a killed service left."""
        snapshots = snapshotter.snapshots
        sides, jobs, work = Sides(snapshots, devices), Jobs(), Work(snapshots.layout.root)
        self._filling = Filling(snapshots, sides, jobs, work, options, devices.settings)
        self._making = Making(snapshotter, sides, jobs, work, options, devices.settings)
        self._making.recover()

    def Apply(self, request: pb.ApplyRequest, context: grpc.ServicerContext) -> pb.ApplyResponse:
        """Unpack a layer of the content store into a snapshot."""
        diff = request.diff
        with answering(context, "Apply", f"apply {diff.digest!r}"):
            layer = Layer(diff.digest, diff.size, diff.media_type, dict(diff.annotations))
            digest, size = self._filling.apply(layer, mounts_of(request.mounts), _caller(context))
            return pb.ApplyResponse(applied=types_pb2.Descriptor(media_type=OCI_LAYER, digest=digest, size=size))

    def Diff(self, request: pb.DiffRequest, context: grpc.ServicerContext) -> pb.DiffResponse:
        """Make a layer of the right side's changes to the left one."""
        with answering(context, "Diff", "diff"):
            left, right = mounts_of(request.left), mounts_of(request.right)
            made = self._making.diff(left, right, request.media_type, request.ref, request.labels, _caller(context))
            return pb.DiffResponse(
                diff=types_pb2.Descriptor(
                    media_type=made.media_type, digest=made.digest, size=made.size, annotations=made.annotations
                )
            )


# containerd sends its client's namespace along, but not as Debian 13 builds it: see Caller.
def _caller(context: grpc.ServicerContext) -> Caller:
    sent = [value for key, value in context.invocation_metadata() if key == "containerd-namespace"]
    return Caller(str(sent[0]) if sent else "", context.is_active)
